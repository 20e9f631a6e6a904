"""The page of examples: their sources, what they printed, and their pictures."""

from __future__ import annotations

from pathlib import Path


def gallery(repository: Path) -> str:
    """The page, of what lies in docs/gallery."""
    return "# Gallery\n"
