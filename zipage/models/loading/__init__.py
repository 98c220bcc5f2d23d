"""From a model's name to its spec, its weights and its tokenizer."""
