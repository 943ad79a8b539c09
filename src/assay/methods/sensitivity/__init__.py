"""Sensitivities: each file is one way to say which weight matrices matter most."""
