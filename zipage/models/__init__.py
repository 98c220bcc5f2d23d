"""The model: one decoder for Llama, Qwen2 and Qwen3, its loader and its tokenizer."""
