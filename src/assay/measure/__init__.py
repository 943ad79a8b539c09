"""Measuring: calibration text, streamed passes over a model, and the statistics they leave."""
