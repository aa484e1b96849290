"""How a context becomes a memory: contexts, rows, objectives, ways back, writers, and the batches they work on."""
