"""Passes: graph to facts, or graph to graph; none both decides and rewrites. Their order: compiler/pipeline.py."""
