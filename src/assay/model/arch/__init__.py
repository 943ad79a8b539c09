"""Facts about model families, as data: no code per family."""
