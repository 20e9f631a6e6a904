"""Containers with tensors in them keep their type, inside a forward and as outputs; those of eval() may differ."""

from __future__ import annotations

import collections
import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.capture.containers import leaves, tensors
from fx_approx.policies import Uniform
from tests.helpers.models import same
from tests.helpers.modules import made_of

VALUE = Uniform(0.5)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None = None


@dataclasses.dataclass
class Record:
    logits: Tensor
    hidden: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    name: str = "frozen"


class Features(OrderedDict):  # type: ignore[type-arg]
    """A class of its own, without an ``__init__``."""


class Backbone(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Any:
        low = self.a(x).relu()
        high = self.b(low).relu()
        if self.kind in ("ordered", "features", "dict"):
            result = {"ordered": OrderedDict(), "features": Features(), "dict": {}}[self.kind]
            result["low"] = low
            result["high"] = high
            return result
        return {"pair": Pair, "record": lambda a, b: Record(b, [a]), "frozen": lambda a, b: Frozen(b + a)}[self.kind](
            low, high
        )


class Segmenter(nn.Module):
    """Reads the container of its backbone, and gives one of the same kind."""

    def __init__(self, kind: str, hooked: bool = False) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(kind), nn.Conv2d(16, 4, 1)
        if hooked:
            self.backbone.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        if isinstance(features, dict):
            assert list(features) == list(features.keys()) and "high" in features
            made = {"ordered": OrderedDict, "features": Features, "dict": dict}[self.backbone.kind]
            return made((name, self.head(value)) for name, value in features.items())
        if isinstance(features, tuple):
            first, second = features
            return Pair(self.head(first), self.head(second))
        return dataclasses.replace(features, logits=self.head(features.logits))


KINDS = ["ordered", "features", "dict", "pair", "record", "frozen"]
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("example", [x, None], ids=["inputs", "no_inputs"])
def test_a_container_keeps_its_type_and_is_traced(kind: str, example: Any) -> None:
    model = Segmenter(kind)
    approx = fx_approx.transform(model, VALUE if example is not None else Uniform(0.5, scores="online"), example)
    fx_approx.set_sampling(approx, enabled=False)
    for mode in (True, False):
        found, expected = approx.train(mode)(x), model.train(mode)(x)
        assert type(found) is type(expected)
        assert same(tensors(found), tensors(expected)) and tensors(found)
        if isinstance(expected, dict):
            assert list(found) == list(expected)
    fx_approx.set_sampling(approx, enabled=True)
    assert not same(tensors(approx.train()(x)), tensors(model.train()(x)))


@pytest.mark.parametrize("kind", ["ordered", "pair"])
def test_the_container_of_an_untraced_part_can_be_read(kind: str) -> None:
    model, seen = Segmenter(kind, hooked=True), []
    model.backbone.register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(fx_approx.errors.CaptureWarning, match=r"backbone: has hooks"):
        approx = fx_approx.transform(model, VALUE, x)
    assert approx._fx_approx.program.graph is not None and seen == []
    fx_approx.set_sampling(approx, enabled=False)
    assert same(tensors(approx(x)), tensors(model(x)))


def test_outputs_of_hugging_face_keep_their_type() -> None:
    generic = pytest.importorskip("transformers.utils.generic")

    @dataclasses.dataclass
    class Output(generic.ModelOutput):  # type: ignore[misc, name-defined]
        logits: Any = None
        hidden: Any = None
        extra: Any = None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4)

        def encode(self, values: Tensor) -> Any:
            return Output(logits=self.a(values).relu(), hidden=(values,))

        def forward(self, values: Tensor) -> Any:
            inner = self.encode(values)
            return Output(logits=self.b(inner[0]), hidden=(*inner.hidden, inner.logits))

    model = Model()
    values = torch.randn(5, 12)
    approx = fx_approx.transform(model, VALUE, values)  # a CaptureWarning would be an error here
    fx_approx.set_sampling(approx, enabled=False)
    found, expected = approx(values), model(values)
    assert type(found) is type(expected) and list(found.keys()) == list(expected.keys())
    assert torch.equal(found["logits"], expected.logits) and len(found.hidden) == 2


class Detector(nn.Module):
    """Gives its maps in training, and decodes them in evaluation."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        maps = [self.a(x), self.b(x)]
        if self.form == "keys":
            out = {"maps": maps}
            return out if self.training else {**out, "scores": maps[0].sigmoid()}
        if self.form == "order":
            return dict(zip("ab" if self.training else "ba", maps, strict=True))
        if self.form == "argument":
            return torch.cat(maps if self.training else [*maps, x], 1)
        if self.form == "type":
            return tuple(maps) if self.training else maps
        if self.form == "class":
            return OrderedDict(m=maps[0]) if self.training else Pair(*maps)
        return maps if self.training else (torch.cat([one.flatten(2) for one in maps], 1), maps)


@pytest.mark.parametrize("form", ["keys", "order", "argument", "type", "class", "decoded"])
@pytest.mark.parametrize("example", [x, None], ids=["inputs", "no_inputs"])
def test_a_container_may_differ_between_the_modes(form: str, example: Any) -> None:
    model = Detector(form)
    approx = fx_approx.transform(model, Uniform(0.5, scope="layer"), example)
    assert approx._fx_approx.program.graph is not None
    for enabled in (True, False):
        fx_approx.set_sampling(approx, enabled=enabled)
        for mode in (False, True):
            found, expected = approx.train(mode)(x), model.train(mode)(x)
            assert type(found) is type(expected)
            if isinstance(expected, dict):
                assert list(found) == list(expected)
            exact = not (mode and enabled)
            assert same(tensors(found), tensors(expected)) is exact


def test_a_graph_that_does_not_do_what_the_model_does_is_not_the_example_inputs_fault() -> None:
    @made_of(lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 4)})
    def Odd(self: Any, x: Tensor) -> Tensor:
        """Its list is another each time; tracing sees the first form."""
        width = 7 if isinstance(x, torch.fx.Proxy) else 16
        return self.b(self.a(x)[..., :width])

    with pytest.warns(fx_approx.errors.CaptureWarning, match="its graph does not compute what its Python does"):
        approx = fx_approx.transform(Odd(), VALUE, torch.randn(3, 12))
    assert approx(torch.randn(3, 12)).shape == (3, 4)


def test_nested_containers_are_looked_through() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert same(tensors({"x": [a, Record(b, [c])], "y": (None, 3)}), [a, b, c])
    assert tensors(collections.UserDict()) == []


def test_records_are_verified_leaf_by_leaf() -> None:
    @made_of(lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 4)})
    def Recorded(self: Any, x: Tensor) -> Record:
        hidden = self.a(x).relu()
        return Record(self.b(hidden), [hidden.sum()])

    x = torch.randn(3, 12)
    found = fx_approx.analysis.verify(fx_approx.transform(Recorded(), VALUE, x), x)
    assert found.passed
    assert [one.name for one in found.differences if one.kind == "output"] == ["0", "1"]


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A record that is a dict, with its fields as items, as outputs of Hugging Face models are."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        self.update({name: one for name, one in vars(self).items() if one is not None})


def test_one_rule_says_what_a_container_holds() -> None:
    a, b, c, d = (torch.ones(size) for size in range(1, 5))
    output = Output(logits=a)
    output["more"] = b
    nested = [Features(low=c), collections.deque([{d}]), output, Pair(a), torch.Size([2]), None]
    assert [str(type(one).__name__) for one in leaves(nested)] == [
        *["Tensor"] * 2,
        *["NoneType", "Tensor", "Tensor"],
        *["Tensor", "NoneType"],
        *["int", "NoneType"],
    ]
    found = [c, d, a, b, a]
    assert all(one is other for one, other in zip(tensors(nested), found, strict=True))
