"""Images for the demo and the examples: handwritten digits that come with the package, or a folder of IDX files."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UNSIGNED_BYTE = 0x08
"""The type code of the only element type that MNIST and Fashion-MNIST use."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images ``[N, 1, H, W]``, standardised by the training images, and labels ``[N]``."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1


def digits(limit: int | None = None, seed: int = 0) -> Images:
    """1,797 handwritten digits of 8 x 8 pixels, which come with this package; every fifth is for the test.

    They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine
    Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0).

    Args:
        limit: Use so many training images, at most.
        seed: Which images are for the test, and which training images are used.
    """
    here = Path(__file__).parent
    pixels = read_idx(here / "digits-images-idx3-ubyte.gz").float().unsqueeze(1)
    labels = read_idx(here / "digits-labels-idx1-ubyte.gz").long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 5], order[len(order) // 5 :][:limit]
    return _standardised("handwritten digits", pixels[train], labels[train], pixels[test], labels[test])


def idx_folder(folder: Path, limit: int | None = None, seed: int = 0) -> Images:
    """MNIST or Fashion-MNIST in the usual four IDX files, each with or without ``.gz``.

    Args:
        folder: Where the files are.
        limit: Use so many training and so many test images, at most.
        seed: Which images are used.

    Raises:
        FileNotFoundError: Names the missing file.
        ValueError: Names the file that is not what it should be.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part, (image_file, label_file) in _FILES.items():
        images, labels = read_idx(_find(folder, image_file)), read_idx(_find(folder, label_file))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: {image_file} and {label_file} should hold N images and N labels, "
                f"not shapes {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        parts[part] = images.float().unsqueeze(1), labels.long()
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for part in ("train", "test"):
        images, labels = parts[part]
        order = torch.randperm(len(labels), generator=generator)[:limit]
        chosen += [images[order], labels[order]]
    return _standardised(folder.resolve().name, *chosen)


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file of unsigned bytes (magic number, sizes, elements; all big-endian).

    Raises:
        ValueError: The file is not of that format, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is no complete gzip file: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} is cut short: it ends inside its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    elements = torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8) if content[start:] else torch.empty(0)
    if elements.numel() != torch.Size(shape).numel():
        raise ValueError(f"{path} is cut short or too long: {shape} needs other than {elements.numel()} bytes")
    return elements.to(torch.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")


def _standardised(name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
    std, mean = torch.std_mean(train)
    return Images(name, (train - mean) / std, train_labels, (test - mean) / std, test_labels)
