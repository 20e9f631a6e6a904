"""Helpers that know nothing of sampling: timing, a cache on disk, tables, optional imports."""
