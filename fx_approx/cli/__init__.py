"""The command line, ``python -m fx_approx``: looks at a model as fx_approx sees it, without training it."""
