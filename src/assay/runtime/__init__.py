"""What a model keeps while it runs: a cache that drops, thins and quantizes, and the attention that reads it."""
