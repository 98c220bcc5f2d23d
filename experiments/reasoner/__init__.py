"""The project's own small reasoner: its tokenizer, its training data, its training."""
