"""Activation sparsity: each file masks the inputs of linear maps while the model runs. Files that begin with `_` are helpers."""
