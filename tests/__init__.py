"""Tests of fx_approx; the folders mirror the package."""
