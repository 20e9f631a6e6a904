"""The demo: exact training and recipes side by side, for ``python -m fx_approx demo``."""
