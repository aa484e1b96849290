"""Training: rows into batches, recipes, and the stock `transformers.Trainer` around them."""
