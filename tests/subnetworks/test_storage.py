"""A subnetwork in a file comes back bitwise from the full model's code, and goes back to full size exactly."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import PlanMismatchError, UnsupportedError
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.subnetworks import description, extract, load, merge, rebuild, record_of, restore, save
from fx_approx.subnetworks.record import tensors_of
from tests.helpers.demand_nets import NETS, BasicBlock
from tests.helpers.hoisting import Layers, loss_of, perturbed
from tests.helpers.quick import in_turn, thinned
from tests.subnetworks.nets import X, hidden, transformed

TWICE = "plain-residual"  # a layer that is called with two selections


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Tied(nn.Module):
    """One weight at both ends, statistics that no state has, and sizes in an object, as a Hugging Face config is."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(6), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens + self.positions)
        result: Tensor = self.head(x + self.down(F.relu(self.up(x))))
        return result


IMAGES = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(3))
TOKENS = torch.arange(24).view(4, 6)
OWN: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "residual": (block, Override({"*.conv2": Uniform(0.5)}, Exact()), IMAGES),
    "tied": (Tied, Override({"down": Uniform(0.5)}, Exact()), TOKENS),
}


def made(build: Callable[[], nn.Module], policy: Any, x: Tensor, graph: bool = False) -> tuple[nn.Module, nn.Module]:
    """A subnetwork after a step, and the plain model that it was cut out of."""
    torch.manual_seed(0)
    model = perturbed(build().double())
    x = x.double() if x.is_floating_point() else x
    sub = extract(fx_approx.transform(model, policy, x), example_inputs=None if graph else x)
    loss_of(sub(x)).backward()
    torch.optim.SGD(sub.parameters(), 1e-2).step()
    return sub, model


def written(sub: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    save(sub, stream)
    stream.seek(0)
    return stream


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().double()


def run(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        result: Tensor = model(x)
    return result


def assert_the_same(one: nn.Module, other: nn.Module, x: Tensor, tolerance: float = 0.0) -> None:
    for training in (True, False):
        expected = run(other, x, training)
        assert float((run(one, x, training) - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ---- there and back


UNBIASED = ("post-activation", "fused-heads")


@pytest.mark.parametrize(
    ("name", "sampler"),
    thinned([*((name, "topk") for name in NETS if name != TWICE), *((name, "systematic") for name in UNBIASED)], 4),
)
def test_graphs_come_back_bitwise_without_weights_at_hand_and_at_full_size(name: str, sampler: str) -> None:
    build, shape = NETS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()
    sub, _ = made(build, Layers(sampler, 0.5, "weight", "value"), x, graph=True)
    empty = without_weights(build)
    again = load(written(sub), empty, example_inputs=x)
    assert isinstance(again, torch.fx.GraphModule) and record_of(again).reason == record_of(sub).reason
    assert_the_same(again, sub, x)
    assert_the_same(restore(again, empty), sub, x, 1e-12)
    assert all(tensor.is_meta for tensor in tensors_of(empty).values())


@pytest.mark.parametrize("name", OWN)
def test_own_classes_come_back_without_a_trace(name: str, tmp_path: Path) -> None:
    build, policy, x = OWN[name]
    sub, model = made(build, policy, x)
    x = x.double() if x.is_floating_point() else x
    save(sub, tmp_path / "narrow.pt")
    assert set(torch.load(tmp_path / "narrow.pt", weights_only=True)) == {"description", "tensors"}
    for plain in (without_weights(build), build(), model):
        again = load(tmp_path / "narrow.pt", plain)
        assert type(again) is type(sub) and str(again) == str(sub)
        assert_the_same(again, sub, x)
        assert [name for name, _ in again.named_parameters()] == [name for name, _ in sub.named_parameters()]
        assert_the_same(restore(again, plain), sub, x, 1e-12)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


def test_it_trains_on_and_is_written_back() -> None:
    build, policy, x = OWN["tied"]
    sub, model = made(build, policy, x)
    again = load(written(sub), without_weights(build))
    assert again.head.weight is again.embed.weight
    for one in (sub, again):
        one.zero_grad()
        loss_of(one(x)).backward()
        torch.optim.SGD(one.parameters(), 1e-2).step()
    assert all(torch.equal(p, q) for p, q in zip(sub.parameters(), again.parameters(), strict=True))
    approx = fx_approx.transform(model, policy, x)
    merge(again, approx)
    for name, tensor in approx.named_parameters():
        cut = record_of(sub).cut_of(name)
        assert torch.equal(cut.taken(tensor), sub.get_parameter(name)), name


def test_a_ratio_that_was_changed_since_the_transform_is_kept() -> None:
    build, shape = NETS["vgg"]
    x = torch.randn(*shape).double()
    approx = fx_approx.transform(build().double(), Layers("topk", 0.5, "weight", "value"), x)
    fx_approx.set_sampling(approx, 0.25)
    sub = extract(approx)
    assert_the_same(load(written(sub), build().double(), example_inputs=x), sub, x)


def test_the_two_halves_serve_other_formats_of_checkpoints() -> None:
    build, policy, x = OWN["residual"]
    sub, model = made(build, policy, x)
    told = json.loads(json.dumps(description(sub)))
    assert told == description(sub) and told["form"] == "class" and told["rebuilt_by"] == "narrowing"
    assert told["attributes"]["1.conv2"] == {"in_channels": 4} and told["fx_approx"] == "0.2.0"
    state = sub.state_dict()
    again = rebuild(model, told)
    assert torch.equal(
        again.get_parameter("1.conv2.weight"), record_of(sub).cut_of("1.conv2.weight").of(model[1].conv2.weight)
    )
    again.load_state_dict(state)
    empty = rebuild(without_weights(build), told)
    assert all(tensor.is_meta for tensor in tensors_of(empty).values())
    empty.load_state_dict(state, assign=True)
    for one in (again, empty):
        assert_the_same(one, sub, x.double())


def test_many_tensors_share_one_list_of_indices() -> None:
    sub, _ = made(*OWN["residual"])
    told = description(sub)
    assert len(told["cuts"]) > 3 and len(told["selections"]) == 1


def test_full_size_of_an_unbiased_sampler_keeps_its_scale() -> None:
    build, shape = NETS["post-activation"]
    x = torch.randn(*shape).double()
    sub, model = made(build, Layers("systematic", 0.5, "weight", "value"), x)
    before = copy.deepcopy(model.state_dict())
    full = restore(sub, fx_approx.transform(model, Layers("systematic", 0.5, "weight", "value"), x))
    assert type(full) is type(model) and full.training is sub.training
    assert_the_same(full, sub, x, 1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- what is refused


def refused(
    change: Callable[[dict[str, Any]], None], build: Callable[[], nn.Module] = block, name: str = "residual"
) -> str:
    """What ``load`` says of a file with a change in it."""
    content = torch.load(written(made(*OWN[name])[0]), weights_only=True)
    change(content)
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load(stream, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_what_is_wrong_with_a_file_is_named() -> None:
    assert "'fx_approx.subnetwork/9', written by fx_approx 0.2.0" in refused(
        lambda content: content["description"].update(format="fx_approx.subnetwork/9")
    )
    assert "it has no 'cuts'" in refused(lambda content: content["description"].pop("cuts"))
    assert "it has no 1.bn1.bias (1 differ)" in refused(lambda content: content["tensors"].pop("1.bn1.bias"))
    assert "it has more, which the model has not" in refused(
        lambda content: content["tensors"].update(more=torch.ones(1))
    )
    wide = {"1.bn1.bias": torch.ones(8)}
    assert "expected 1.bn1.bias of shape (4,), got (8,)" in refused(lambda content: content["tensors"].update(wide))
    assert "path: expected what fx_approx.subnetworks.save writes, got ['tensors']" in refused(
        lambda content: content.pop("description")
    )


def test_another_model_is_named() -> None:
    def nothing(content: dict[str, Any]) -> None:
        pass

    assert refused(nothing, lambda: block()[:-1]) == (
        "model: expected a parameter 4.weight as in the Sequential that was cut; there is none"
    )
    more = lambda: nn.Sequential(*block(), nn.Linear(4, 2))  # noqa: E731
    assert "expected no parameter 5.weight" in refused(nothing, more)
    other = lambda: nn.Sequential(nn.Conv2d(3, 8, 5), *block()[1:])  # noqa: E731
    assert "expected 0.weight of shape (8, 3, 3, 3)" in refused(nothing, other)
    sub, _ = made(*OWN["residual"])
    with pytest.raises(ValueError, match="cut out of another model"):
        restore(sub, nn.Linear(3, 3))
    with pytest.raises(ValueError, match="expected what fx_approx"):
        save(nn.Linear(3, 3), io.BytesIO())
    with pytest.raises(ValueError, match="got a list"):
        rebuild(block(), [])  # type: ignore[arg-type]


class Other(nn.Module):
    """The parameters of an MLP, which are read otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + self.b(F.relu(self.a(x))))  # type: ignore[no-any-return]


class Turned(Other):
    """The same, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + self.a(F.relu(self.b(x))))  # type: ignore[no-any-return]


def test_a_graph_needs_example_inputs_weights_and_the_same_code() -> None:
    x = torch.randn(4, 8).double()
    sub, model = made(Other, Layers("topk", 0.5, "weight", "value"), x, graph=True)
    with pytest.raises(ValueError, match=r"example_inputs: .*\(it is a graph: "):
        load(written(sub), model)
    with pytest.raises(ValueError, match="on the meta device"):
        rebuild(without_weights(Other), description(sub), example_inputs=x)
    with pytest.raises(ValueError, match="its graph is another one"):
        load(written(sub), Turned().double(), example_inputs=x)
    told = description(sub)
    told["plan"] = {**told["plan"], "candidates": {**told["plan"]["candidates"], "d": {}}}
    with pytest.raises(PlanMismatchError, match="only in the plan: d"):
        rebuild(model, told, example_inputs=x)


def test_what_no_description_makes_again_is_refused() -> None:
    x = torch.randn(4, 8).double()
    sub, _ = made(Other, Layers("topk", 0.5, "weight", "value"), x, graph=True)
    record_of(sub).origin = None
    with pytest.raises(UnsupportedError, match="merge it instead"):
        save(sub, io.BytesIO())


def test_tensors_that_no_file_has_are_named() -> None:
    class Offset(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.offset = torch.ones(8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.offset  # type: ignore[no-any-return]

    x = torch.randn(4, 8).double()
    sub, _ = made(Offset, Override({"2": Uniform(0.5)}, Exact()), x)
    assert record_of(sub).own_forward
    with pytest.raises(ValueError, match=r"\.offset is a tensor on the meta device"):
        load(written(sub), without_weights(Offset))


def test_what_wraps_a_subnetwork_is_looked_into() -> None:
    approx = hidden()
    sub = extract(approx, example_inputs=X)
    wrapped = torch.optim.swa_utils.AveragedModel(sub)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.mul_(2)
    file = io.BytesIO()
    save(wrapped, file)
    file.seek(0)
    full = restore(wrapped, approx).eval()
    assert torch.allclose(full(X), wrapped.eval()(X))
    assert torch.equal(load(file, approx).eval()(X), wrapped(X))


@pytest.mark.parametrize(("name", "scope"), in_turn(NETS, ["group", "value"], step=2))
def test_in_evaluation_and_on_other_batches_it_computes_what_full_size_does(name: str, scope: str) -> None:
    approx, x = transformed(name, scope)
    sub = extract(approx, example_inputs=x)
    other = torch.randn(2 * len(x) + 1, *x.shape[1:]).double()
    if record_of(sub).sliced:
        with pytest.raises(UnsupportedError, match="no exact model computes the same"):
            restore(sub, approx)
        return
    full = restore(sub, approx)
    assert torch.allclose(copy.deepcopy(sub)(other), copy.deepcopy(full)(other), rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(sub.eval()(other), full.eval()(other), rtol=1e-8, atol=1e-10)
