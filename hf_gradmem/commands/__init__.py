"""What the command line does, without a terminal: opening models and memories, the demo, writing, pushing."""
