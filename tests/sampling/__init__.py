"""Tests of fx_approx.sampling."""
