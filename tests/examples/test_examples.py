"""The demo, its images and the benchmarks, as small as they go."""

from __future__ import annotations

import gzip
import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ("--limit", "128", "--epochs", "3", "--width", "2")


def scripts(folder: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """Modules of a folder of scripts, imported as when one of them is run; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(REPOSITORY / folder))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for modules in scripts("examples", ("data",), monkeypatch):
        yield modules[0]


@pytest.fixture
def demo(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("COLUMNS", "110")
    for modules in scripts("examples", ("demo",), monkeypatch):
        yield modules[0]


@pytest.fixture
def transform_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for modules in scripts("benchmarks", ("_header", "transform_time"), monkeypatch):
        yield modules[1]


def idx(array: Tensor) -> bytes:
    header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    return header + bytes(array.flatten().tolist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four IDX files of random images in ten classes, two of them compressed."""
    for name, count in (("train", 200), ("t10k", 30)):
        images = torch.randint(256, (count, 20, 18), dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    return tmp_path


# ---- images


@pytest.mark.parametrize("shape", [(3, 5, 4), (7,), (0, 2, 2)])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_round_trip(data: ModuleType, tmp_path: Path, shape: tuple[int, ...], compressed: bool) -> None:
    array = torch.randint(256, shape, dtype=torch.uint8)
    path = tmp_path / ("x.gz" if compressed else "x")
    path.write_bytes(gzip.compress(idx(array), mtime=0) if compressed else idx(array))
    read = data.read_idx(path)
    assert read.dtype == torch.uint8
    assert torch.equal(read, array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", b"", "no IDX file"),
        ("x", b"P5 20 20", "no IDX file"),
        ("x", bytes([0, 0, 13, 1, 0, 0, 0, 1, 0]), "no IDX file of unsigned bytes"),
        ("x", bytes([0, 0, 8, 3, 0, 0]), "inside its header"),
        ("x", bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), "cut short or too long"),
        ("x.gz", b"not compressed", "no complete gzip file"),
        ("x.gz", gzip.compress(b"cut short" * 9, mtime=0)[:-9], "no complete gzip file"),
    ],
)
def test_bad_idx_file(data: ModuleType, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / name)


def test_folder(data: ModuleType, folder: Path) -> None:
    images = data.idx_folder(folder, limit=50)
    assert images.train.shape == (50, 1, 20, 18)
    assert images.test.shape == (30, 1, 20, 18)
    assert images.classes == 10
    assert abs(float(images.train.mean())) < 1e-5
    assert abs(float(images.train.std()) - 1) < 1e-5
    # Images and labels are shuffled together.
    same = data.idx_folder(folder, limit=50)
    assert torch.equal(images.train, same.train)
    assert torch.equal(images.train_labels, same.train_labels)
    whole = data.idx_folder(folder)
    assert torch.equal(whole.train_labels.bincount(), torch.full((10,), 20))


@pytest.mark.parametrize("missing", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_file_is_named(data: ModuleType, folder: Path, missing: str) -> None:
    next(folder.glob(f"{missing}*")).unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {missing} nor {missing}.gz"):
        data.idx_folder(folder)


def test_images_and_labels_must_belong_together(data: ModuleType, folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(29, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="N images and N labels"):
        data.idx_folder(folder)


def test_digits(data: ModuleType) -> None:
    images = data.digits()
    assert images.train.shape[1:] == (1, 8, 8)
    assert len(images.train) + len(images.test) == 1797
    assert images.classes == 10


# ---- demo


def test_demo(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main((*TINY, "--epochs", "6")) == 0  # more steps than the warm-up
    said = capsys.readouterr()
    for text in ("MLP: 2 of 3 multiplies", "CNN: 3 of 5 multiplies", "not recalibrated", "approx / exact"):
        assert text in said.out
    assert max(map(len, said.out.splitlines())) <= 110
    assert "loss exact" in said.err  # the progress bar, so that the output can be redirected without it


def test_demo_on_a_folder_with_an_exact_tail(
    demo: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", str(folder), "--sampler", "systematic", "--ratio", "0.25", "--exact-tail", "0.5")
    assert demo.main((*TINY, "--epochs", "1", *options)) == 0
    said = capsys.readouterr().out
    assert "20 x 18 pixels" in said
    assert "systematic/online" in said
    assert "The last 50 % of the approximate model's steps were exact" in said
    assert "too few steps to tell" in said


def test_both_models_start_from_the_same_weights(demo: ModuleType, data: ModuleType) -> None:
    # Both models must learn the same when nothing is sampled.
    options = demo.parse([*TINY, "--exact-tail", "1"])
    result = demo.compare("CNN", data.digits(options.limit), options)
    assert result.exact == result.as_trained
    assert result.timed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0"), "--ratio: expected a number above 0 and at most 1, got '0'"),
        (("--ratio", "nan"), "--ratio: expected a number above 0"),
        (("--epochs", "0"), "--epochs: expected a whole number from 1 on, got '0'"),
        (("--limit", "10"), "--limit: expected a whole number from 64 on"),
        (("--width", "-3"), "--width: expected"),
        (("--sampler", "best"), "--sampler: invalid choice: 'best'"),
        (("--exact-tail", "1.5"), "--exact-tail: expected"),
    ],
)
def test_bad_option(
    demo: ModuleType, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_folder(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(("--data", str(tmp_path / "nowhere"))) == 2
    assert demo.main(("--data", str(tmp_path))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "nowhere is no folder" in said.err
    assert "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz" in said.err


# ---- benchmarks


def test_transform_time(transform_time: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "numbers.json"
    transform_time.main(["--chains", "2", "5", "--runs", "1", "--without-resnet", "--json", str(target)])
    assert "chain of 5" in capsys.readouterr().out
    stored = json.loads(target.read_text(encoding="utf-8"))
    assert [each["products"] for each in stored["results"]] == [2, 5]
    assert {"processor", "cores", "torch", "fx_approx"} <= set(stored["environment"])


# ---- pictures of tokens


@pytest.mark.slow
def test_token_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for (module,) in scripts("examples", ("token_pictures",), monkeypatch):
        module.main(["--out", str(tmp_path)])
    assert (tmp_path / "tokens.png").stat().st_size > 1000
    shown = (REPOSITORY / "docs" / "tokens.md").read_text(encoding="utf-8")
    skipped = capsys.readouterr().out.split('== Tokens(0.5, mode="skip")\n')[1].split("\n\n==")[0]
    assert skipped in shown, "the page shows what is printed"
    assert "python examples/token_pictures.py --out docs/figures" in shown


# ---- sweep


@pytest.mark.slow
def test_sweep(
    data: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for (module,) in scripts("examples", ("sweep",), monkeypatch):
        figure = tmp_path / "front.png"
        module.main(["--steps", "2", "--seeds", "0", "--figure", str(figure), "--directory", str(tmp_path / "runs")])
        assert figure.stat().st_size > 1000 and len(list((tmp_path / "runs").iterdir())) == 2 * 6
        names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:8]]
        assert [name.removesuffix(" *") for name in names] == [
            *("exact", "paper 0.5", "value 0.75", "value 0.5", "value 0.25", "half of the FLOPs")
        ]
