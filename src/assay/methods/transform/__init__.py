"""Exact changes of a whole model: other weights, the same function. Files that begin with `_` are helpers."""
