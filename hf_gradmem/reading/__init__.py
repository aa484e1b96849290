"""How a query is answered: its layout behind a memory, its loss, its scores, and generation."""
