"""Ratios that change over a training."""
