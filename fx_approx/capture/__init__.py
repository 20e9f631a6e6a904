"""Capture: a model in, one graph for both modes out."""
