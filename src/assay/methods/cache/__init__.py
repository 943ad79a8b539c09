"""Cache policies: each file drops tokens, stores them smaller, or reads fewer. Files that begin with `_` are helpers."""
