"""What a saved model consists of: the adapter, the base that it names or includes, and the model card."""
