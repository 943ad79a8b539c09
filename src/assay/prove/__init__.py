"""Proof: how far a compressed model is from its original, with intervals."""
