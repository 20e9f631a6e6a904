"""Images as batches: a whole data set in memory on the device, or a folder that torchvision reads.

    python examples/experiments/images.py FOLDER FILE.npz

stores MNIST, Fashion-MNIST or CIFAR-10 in any of the known layouts in one file, which needs numpy only.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import runpy
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from config import ConfigError, Data, needs
from torch import Tensor

from fx_approx.demo.images import read_idx

Batch = tuple[Tensor, Tensor]
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_PARTS = ("train", "train_labels", "test", "test_labels")
_EVALUATED = 1000
"""Test images at a time on a CPU; four times as many elsewhere."""

_SPLIT = 30
"""The seed that examples are held out by, the same for all runs."""


def split(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The numbers of ``size`` examples that are kept, and of ``count`` that are held out; always the same ones."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_SPLIT))
    return order[count:].sort().values, order[:count].sort().values


class Source(Protocol):
    """What a network is trained on.

    Attributes:
        name: For people.
        classes: Of the labels.
        size: Training examples.
    """

    name: str
    classes: int
    size: int

    def epoch(self, seed: int, number: int, batch: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The full batches of epoch ``number``; a function of the arguments alone.

        ``order`` has the numbers of the examples that it reads, where a set can be read by numbers; None for all.
        """
        ...

    def test(self) -> Iterator[Batch]:
        """The test examples in big batches."""
        ...

    def held_out(self, count: int) -> Source:
        """The same set without ``count`` of its training examples, which stand in the place of the test examples."""
        ...


class Images:
    """A data set of images that is kept on the device as bytes, and whose batches are made there.

    Crops and flips are drawn for each image by itself, all of an epoch at once on the CPU, so that every device sees
    the same ones.
    """

    def __init__(self, arrays: Arrays, data: Data, device: torch.device, name: str) -> None:
        """Takes over bytes ``[N, height, width, channels]`` and labels."""
        train, train_labels, test, test_labels = (torch.from_numpy(np.ascontiguousarray(one)) for one in arrays)
        limit, test_limit = data.limit or len(train), data.test_limit or len(test)
        self.name, self._augment, self._device = name, data.augment, device
        self.classes = int(train_labels.max()) + 1
        # Of all training images, whatever the limit.
        flat = train[:: max(1, len(train) // 10_000)].reshape(-1, train.shape[-1]).float()
        train, test = (_shaped(one, data) for one in (train[:limit], test[:test_limit]))
        self.size, self._height = len(train), train.shape[1]
        self._margin = 4 if data.augment != "none" else 0
        padded = torch.nn.functional.pad(train, (0, 0, *[self._margin] * 4))
        self._train, self._labels = padded.to(device), train_labels[:limit].long().to(device)
        self._test, self._test_labels = test.to(device), test_labels[:test_limit].long().to(device)
        self._mean = flat.mean(0).to(device)
        self._std = flat.std(0).to(device)

    def epoch(self, seed: int, number: int, batch: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The full batches of an epoch, in random order or in ``order``."""
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        everything = torch.randperm(self.size, generator=generator)
        order = (everything if order is None else order).to(self._device)
        count = len(order) // batch * batch
        if not self._margin:
            for chosen in order[:count].split(batch):
                yield self._normalised(self._train[chosen]), self._labels[chosen]
            return
        shifts = torch.randint(2 * self._margin + 1, (2, self.size), generator=generator).to(self._device)
        flips = torch.rand(self.size, generator=generator).to(self._device) < 0.5
        flips &= torch.tensor(self._augment == "crop-flip", device=self._device)
        steps = torch.arange(self._height, device=self._device)
        for first in range(0, count, batch):
            part = slice(first, first + batch)
            chosen = order[part]
            rows = shifts[0, part, None] + steps
            columns = shifts[1, part, None] + torch.where(flips[part, None], steps.flip(0), steps)
            pixels = self._train[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self._normalised(pixels), self._labels[chosen]

    def test(self) -> Iterator[Batch]:
        """All test images."""
        size = _EVALUATED * (1 if self._device.type == "cpu" else 4)
        for pixels, labels in zip(self._test.split(size), self._test_labels.split(size), strict=True):
            yield self._normalised(pixels), labels

    def held_out(self, count: int) -> Images:
        """The same images but for ``count`` of those that are trained on, which are normalised like them."""
        kept, out = (one.to(self._device) for one in split(self.size, count))
        inner = slice(self._margin, self._margin + self._height)
        made = copy.copy(self)
        made._test, made._test_labels = self._train[out, inner, inner], self._labels[out]
        made._train, made._labels, made.size = self._train[kept], self._labels[kept], len(kept)
        return made

    def _normalised(self, pixels: Tensor) -> Tensor:
        """``[N, channels, height, width]``, in memory as channels_last."""
        return ((pixels - self._mean) / self._std).permute(0, 3, 1, 2)


def _shaped(pixels: Tensor, data: Data) -> Tensor:
    if data.size and data.size < pixels.shape[1]:
        raise ConfigError(f"data.size: expected {pixels.shape[1]} or more for these images, got {data.size}")
    if data.channels and pixels.shape[-1] not in (1, data.channels):
        raise ConfigError(f"data.channels: expected {pixels.shape[-1]} for these images, got {data.channels}")
    if data.size:
        before = (data.size - pixels.shape[1]) // 2
        after = data.size - pixels.shape[1] - before
        pixels = torch.nn.functional.pad(pixels, (0, 0, before, after, before, after))
    return pixels.expand(*pixels.shape[:-1], data.channels or pixels.shape[-1]).contiguous()


# ---- layouts on disk


def read(folder: Path, name: str, download: bool = False) -> Arrays:
    """The arrays of a set below ``folder``: bytes ``[N, height, width, channels]`` and labels, train and test.

    Raises:
        ConfigError: No known layout is there; says what was looked for, and how to get it.
    """
    places = [folder / name, folder / f"{name}.npz", folder]
    places += [folder / "MNIST" / "raw"] * (name == "mnist") + [folder / "FashionMNIST" / "raw"] * ("fashion" in name)
    if download:
        _download(folder, name)
    for place in places:
        for reader in (_npz, _idx, _batches, _mosaics):
            found = reader(place)
            if found is not None:
                return found
    raise ConfigError(
        f"--data {folder}: no {name} is there: expected {name}/ with the four IDX files of MNIST, with "
        f"cifar-10-batches-py, or with train_1.webp and labels.npz; or {name}.npz with {', '.join(_PARTS)}. "
        "Where there is internet, --download gets it through torchvision."
    )


def _npz(place: Path) -> Arrays | None:
    if place.suffix != ".npz" or not place.is_file():
        return None
    with np.load(place) as found:
        train, train_labels, test, test_labels = (found[part] for part in _PARTS)
    return train, train_labels, test, test_labels


def _idx(place: Path) -> Arrays | None:
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    paths = [next((p for p in (place / one, place / f"{one}.gz") if p.is_file()), None) for one in names]
    if not all(paths):
        return None
    train, train_labels, test, test_labels = (read_idx(path).numpy() for path in paths)
    return train[..., None], train_labels, test[..., None], test_labels


def _batches(place: Path) -> Arrays | None:
    """CIFAR-10 as its authors distribute it, for Python."""
    place = place / "cifar-10-batches-py" if (place / "cifar-10-batches-py").is_dir() else place
    if not (place / "data_batch_1").is_file():
        return None
    parts = []
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        with (place / name).open("rb") as file:
            found = pickle.load(file, encoding="bytes")
        parts.append((found[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(found[b"labels"])))
    train, train_labels = (np.concatenate(each) for each in zip(*parts[:5], strict=True))
    return train, train_labels.astype(np.uint8), parts[5][0], parts[5][1].astype(np.uint8)


def _mosaics(place: Path) -> Arrays | None:
    """Pictures of 100 x 100 images, lossless, and ``labels.npz``."""
    if not ((place / "train_1.webp").is_file() and (place / "labels.npz").is_file()):
        return None
    with needs("pillow"):
        image = importlib.import_module("PIL.Image")

    def opened(name: str) -> np.ndarray:
        with image.open(place / f"{name}.webp") as picture:
            pixels = np.asarray(picture)
        return pixels.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)

    with np.load(place / "labels.npz") as labels:
        train = np.concatenate([opened(f"train_{number}") for number in range(1, 6)])
        return train, labels["train"], opened("test"), labels["test"]


def torchvision() -> Any:
    """torchvision, also beside a torch for which its compiled library was not made.

    Raises:
        ConfigError: It is not installed.
    """
    compat = runpy.run_path(str(Path(__file__).parents[2] / "tests" / "helpers" / "torchvision_compat.py"))
    with needs("torchvision"):
        return compat["import_torchvision"]()


def _download(folder: Path, name: str) -> None:
    known = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    if name not in known:
        raise ConfigError(f"--download: expected one of {', '.join(known)}, got {name!r}")
    try:
        getattr(torchvision().datasets, known[name])(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--download: {name} could not be had ({error}); put it into --data {folder}") from None


# ---- a folder of files


class Folder:
    """ImageFolder with ``train`` and ``val``, with the transforms of torchvision's reference trainer."""

    def __init__(self, place: Path, data: Data, device: torch.device, small: int = 224) -> None:
        """Lists the files."""
        transforms, folder = torchvision().transforms, torchvision().datasets.ImageFolder
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        first = [transforms.RandomResizedCrop(small), transforms.RandomHorizontalFlip()]
        train = folder(place / "train", transforms.Compose([*first, *last]))
        sized = [transforms.Resize(small * 256 // 224), transforms.CenterCrop(small)]
        self._whole = transforms.Compose([*sized, *last])
        test = folder(place / "val", self._whole)
        self.classes = len(train.classes)
        self._train, self._test = _spread(train, data.limit), _spread(test, data.test_limit)
        self._workers, self._device = data.workers, device
        self.name, self.size = place.name, len(self._train)

    def epoch(self, seed: int, number: int, batch: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The full batches of an epoch in random order."""
        # Workers take their seeds from the generator, so that crops are a function of seed and epoch, too.
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        yield from self._loaded(self._train, batch, shuffle=True, drop_last=True, generator=generator)

    def test(self) -> Iterator[Batch]:
        """All test images."""
        yield from self._loaded(self._test, 64 if self._device.type == "cpu" else 256)

    def held_out(self, count: int) -> Folder:
        """The same files but for ``count`` of those that are trained on, which are cut as those of the test are."""
        kept, out = (one.tolist() for one in split(self.size, count))
        made = copy.copy(self)
        made._test = torch.utils.data.Subset(_transformed(self._train, self._whole), out)
        made._train, made.size = torch.utils.data.Subset(self._train, kept), len(kept)
        return made

    def _loaded(self, files: Any, batch: int, **options: Any) -> Iterator[Batch]:
        pinned = self._device.type == "cuda"
        loader = torch.utils.data.DataLoader(files, batch, num_workers=self._workers, pin_memory=pinned, **options)
        for images, labels in loader:
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def _spread(files: Any, limit: int) -> Any:
    """``limit`` of the files at even distances, so that all classes are there."""
    if not limit or limit >= len(files):
        return files
    return torch.utils.data.Subset(files, [place * len(files) // limit for place in range(limit)])


def _transformed(files: Any, transform: Any) -> Any:
    """The same files through another transform."""
    made = copy.copy(files)
    if isinstance(files, torch.utils.data.Subset):
        made.dataset = _transformed(files.dataset, transform)
        return made
    made.transform = transform
    return made


def folder_of(root: Path, name: str, unpacked: Path) -> Path:
    """The folder with ``train`` and ``val`` below ``root``; a zip of them is unpacked into ``unpacked`` once."""
    for place in (root / name, root):
        if (place / "train").is_dir() and (place / "val").is_dir():
            return place
        packed = sorted(place.glob("*.zip")) if place.is_dir() else []
        if packed:
            target = unpacked / packed[0].stem
            if not (target / "complete").exists():
                with zipfile.ZipFile(packed[0]) as archive:
                    archive.extractall(target)
                (target / "complete").touch()
            return target
    raise ConfigError(
        f"--data {root}: expected {name}/train and {name}/val with a folder for each class (or a zip of them), as "
        "torchvision's ImageFolder has it; ImageNet itself is to be had from image-net.org only"
    )


def main(arguments: Sequence[str]) -> None:
    """Stores a set in one file."""
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    source, target = map(Path, arguments)
    arrays = read(source.parent, source.name)
    np.savez_compressed(target, **dict(zip(_PARTS, arrays, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
