"""Facts about model families, as data: no code per family."""

CACHED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Families whose attention rotates keys, updates one cache layer, and calls the attention function that the config names."""
