"""GGUF, the file format of llama.cpp: metadata, tokenizer, tensors, and reading them back."""
