"""Passes: graph to facts, or graph to graph; none of them both decides and rewrites."""

from fx_approx.passes.annotate import Found, annotate
from fx_approx.passes.decide import decide
from fx_approx.passes.rewrite import rewrite
from fx_approx.passes.shapes import Shapes, propagate

__all__ = ["Found", "Shapes", "annotate", "decide", "propagate", "rewrite"]
