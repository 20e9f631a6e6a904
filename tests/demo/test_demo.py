"""The demo and its images, as small as they go."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fx_approx.__main__ import main
from fx_approx.cli.demo_arguments import LEAST_IMAGES, NETWORKS
from fx_approx.demo import images as data
from fx_approx.demo import run, training
from fx_approx.recipes import calls as recipes_calls
from fx_approx.recipes.gain import Gain

TINY = ("demo", "--limit", "128", "--epochs", "3", "--width", "16")


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
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], compressed: bool) -> None:
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
def test_bad_idx_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / name)


def test_folder(folder: Path) -> None:
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
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    next(folder.glob(f"{missing}*")).unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {missing} nor {missing}.gz"):
        data.idx_folder(folder)


def test_images_and_labels_must_belong_together(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(29, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="N images and N labels"):
        data.idx_folder(folder)


def test_digits() -> None:
    images = data.digits()
    assert images.train.shape[1:] == (1, 8, 8)
    assert len(images.train) + len(images.test) == 1797
    assert images.classes == 10


# ---- demo


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes do not time steps, which would decide about small networks by chance; none takes more epochs."""
    for name, case in training.CASES.items():
        unchecked = functools.partial(_unchecked, case.recipe)
        short = dataclasses.replace(case, recipe=unchecked, epochs=min(1.0, case.epochs))
        monkeypatch.setitem(training.CASES, name, short)
    monkeypatch.setenv("COLUMNS", "110")


def _unchecked(recipe: Callable[..., Any], model: Any, batch: Any, steps: int, *rest: Any) -> Any:
    before = recipes_calls.timed
    recipes_calls.timed = lambda *args: Gain(2.0, 1.0)
    try:
        return recipe(model, batch, steps, *rest)
    finally:
        recipes_calls.timed = before


@pytest.mark.usefixtures("quick")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "demo.html"
    assert main((*TINY, "--epochs", "32", "--html", str(page))) == 0
    said = capsys.readouterr()
    rows = {line.split()[0]: line for line in said.out.splitlines() if line[:3] in ("CNN", "ViT", "MLP")}
    assert all("→" in rows[name] for name in rows if "," not in rows[name].split()[0])
    for text in ("of exact", "shipped:", "0.5 of the channels of all layers", "0.5 of the tokens"):
        assert text in said.out
    assert len(said.out.splitlines()) <= 30 and max(map(len, said.out.splitlines())) <= 110
    assert not said.err  # where it is no terminal, there is no progress line
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 6 and "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.usefixtures("quick")
def test_demo_on_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", str(folder), "--ratio", "0.25", "--networks", "MLP", "--html", str(tmp_path / "page.html"))
    assert main((*TINY, "--epochs", "1", *options)) == 0
    assert "20 x 18 pixels" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_the_numbers_of_a_seed(tmp_path: Path) -> None:
    """What the table has, as JSON; another seed has other accuracies, and the same one the same."""
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        file = tmp_path / f"{name}.json"
        options = ("--networks", "CNN", "--seed", seed, "--json", str(file), "--html", str(tmp_path / "page.html"))
        assert main((*TINY, "--epochs", "30", *options)) == 0
        found.append(json.loads(file.read_text(encoding="utf-8")))
    same, again, other = (one["results"][0] for one in found)
    assert [one["options"]["seed"] for one in found] == [1, 1, 2] and same["name"] == "CNN" and not same["left_exact"]
    assert {"name", "threads", "torch", "python", "fx_approx", "date"} <= set(found[0]["environment"])
    assert same["accuracies"] == again["accuracies"] != other["accuracies"]
    assert 0 < same["saved"] < 1 and len(same["step_ratio"]) == 3 and same["parameters"][1] < same["parameters"][0]


def test_where_nothing_is_sampled_both_learn_the_same() -> None:
    options = training.Options(epochs=3, width=16)
    for name in ("CNN", "MLP"):
        result = training.compare(name, data.digits(128), options)  # too few steps for a recipe
        assert result.recipe.exact and result.exact.losses == result.sampled.losses
        assert result.accuracies[0] == result.accuracies[1] and result.step_ratio is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0"), "--ratio: expected a number between 0 and 1, got '0'"),
        (("--ratio", "nan"), "--ratio: expected a number between 0 and 1"),
        (("--epochs", "0"), "--epochs: expected a whole number from 1 on, got '0'"),
        (("--limit", "10"), "--limit: expected a whole number from 64 on"),
        (("--width", "-3"), "--width: expected"),
        (("--networks", "RNN"), "--networks: invalid choice: 'RNN'"),
    ],
)
def test_bad_option(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("demo", *options)) == 2
    assert message in capsys.readouterr().err


def test_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("demo", "--data", str(tmp_path / "nowhere"))) == 2
    assert main(("demo", "--data", str(tmp_path))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "nowhere is no folder" in said.err
    assert "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz" in said.err


def test_page_that_cannot_be_written_is_told_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--html", "--json"):
        here = ("--html", str(tmp_path / "page.html"))
        assert main((*TINY, *here, option, str(tmp_path / "nowhere" / "file"))) == 2
        said = capsys.readouterr()
        assert said.out == "" and "nowhere" in said.err


def test_the_line_of_progress_overwrites_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for step in (1, 2):
        run._progress("CNN", step, 2)
    said = capsys.readouterr().err
    assert "\n" not in said and "step 1 of 2" in said and said.endswith(" \r")


def test_the_command_line_knows_the_demo() -> None:
    assert tuple(training.CASES) == NETWORKS and training.BATCH == LEAST_IMAGES
