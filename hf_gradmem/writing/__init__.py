"""How a context becomes a memory: the objective, the inner loop and its update rules."""
