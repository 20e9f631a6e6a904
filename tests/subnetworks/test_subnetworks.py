"""A subnetwork trains as the transformed model does under one kept selection, and is written back to its places."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import UnsupportedError
from fx_approx.policies import Exact, GradientSampling, Override, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import Selection
from fx_approx.subnetworks import extract, merge, record_of
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers
from tests.helpers.quick import in_turn
from tests.subnetworks.nets import TWICE, X, hidden, largest, mlp, steps, transformed

BY_NUMBER = ("fused-heads", "written-attention", "stacked-heads")  # their Python names numbers of channels

# ---- the same training


@pytest.mark.parametrize(("name", "scope"), in_turn(NETS, ["value", "group"]))
def test_plain_sgd_is_that_of_the_model_under_one_selection(name: str, scope: str) -> None:
    approx, x = transformed(name, scope)
    kept, before = copy.deepcopy(approx), copy.deepcopy(approx.state_dict())
    sub = extract(approx, example_inputs=x)
    assert sum(p.numel() for p in sub.parameters()) < (0.75 if name == TWICE else 0.55) * sum(
        p.numel() for p in approx.parameters()
    )
    assert name in (TWICE, *BY_NUMBER) or type(sub) is type(NETS[name][0]())
    assert not any(isinstance(module, type(find(approx))) for module in sub.modules())
    with fx_approx.reuse_selection(kept):
        steps(kept, torch.optim.SGD(kept.parameters(), 1e-3), x)
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-3), x)
    assert all(torch.equal(value, before[name]) for name, value in approx.state_dict().items()), "not yet"
    merge(sub, approx)
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in kept.named_parameters())
    assert moved > 0 and largest(approx, kept) <= 1e-10 * moved


class TokenNorm(nn.Module):
    """BatchNorm over all tokens, whose result takes the shape of its input again, as in LeViT."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x) if self.residual else self.first(x)
        return self.last(self.norm(x.flatten(0, 1)).reshape_as(x).relu())


@pytest.mark.parametrize("residual", [False, True])
def test_the_shape_of_another_value(residual: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16).double()
    approx = fx_approx.transform(TokenNorm(residual).double(), Layers("topk", 0.5, "weight", "value"), x)
    own, graph = extract(approx, example_inputs=x), extract(approx)
    assert own.norm.num_features == 8
    with fx_approx.reuse_selection(approx):
        expected = approx(x)
    assert torch.allclose(own(x), expected, atol=1e-12) and torch.allclose(graph(x), expected, atol=1e-12)
    program = torch.export.export(graph, (x,))
    assert torch.allclose(program.module()(x), graph(x), atol=1e-12)


def test_an_unbiased_sampler_has_its_scale_in_the_weights_and_out_of_them_again() -> None:
    approx, x = transformed("post-activation", sampler="systematic")
    kept, before = copy.deepcopy(approx), [p.detach().clone() for p in approx.parameters()]
    sub = extract(approx)
    with fx_approx.reuse_selection(kept):
        assert torch.allclose(sub(x), kept(x), atol=1e-12)
    merge(sub, approx)
    assert all(torch.allclose(p, q, rtol=1e-14, atol=0) for p, q in zip(approx.parameters(), before, strict=True))


# ---- what it is


def test_where_the_forward_allows_it_is_the_users_own_class_of_ordinary_layers() -> None:
    approx = hidden()
    sub = extract(approx, example_inputs=X)
    assert type(sub) is nn.Sequential and record_of(sub).own_forward
    assert [type(module) for module in sub] == [type(module) for module in mlp()]
    assert [(m.in_features, m.out_features) for m in sub if isinstance(m, nn.Linear)] == [(20, 32), (32, 32), (32, 5)]
    assert sub[1].num_features == 32 and len(sub[1].running_mean) == 32
    graph = extract(hidden())
    assert isinstance(graph, torch.fx.GraphModule) and "no example_inputs" in record_of(graph).reason
    assert torch.allclose(sub(X), graph(X))


def test_exported_compiled_and_pickled() -> None:
    sub = extract(hidden(), example_inputs=X).eval()
    expected = sub(X)
    assert torch.allclose(torch.export.export(sub, (X,)).module()(X), expected)
    assert torch.allclose(torch.compile(sub, backend="aot_eager", fullgraph=True)(X), expected)
    stream = io.BytesIO()
    torch.save(sub, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(X), expected)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 64), nn.Linear(64, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            result: Tensor = self.head(x + self.down(F.relu(self.up(x))))
            return result

    tokens = torch.arange(24).view(4, 6)
    approx = fx_approx.transform(Tied(), Override({"down": Uniform(0.5)}, Exact()), tokens)
    sub = extract(approx, example_inputs=tokens)
    assert sub.head.weight is sub.embed.weight and sub.up.out_features == sub.down.in_features == 32
    sub.embed.weight.data.add_(1.0)
    merge(sub, approx)
    assert torch.equal(approx.head.weight, sub.head.weight) and approx.head.weight is approx.embed.weight


def test_tied_weights_that_are_read_differently_stay_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Linear(8, width) for width in (8, 8, 8, 3))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.b(self.a(self.stem(x).tanh()).tanh()).tanh())
            return result

    torch.manual_seed(0)
    x = torch.randn(4, 8).double()
    approx = fx_approx.transform(Tied().double(), Uniform(0.5, min_k=1), x)
    kept, before = copy.deepcopy(approx), copy.deepcopy(approx.state_dict())
    sub = extract(approx, example_inputs=x)
    assert sub.get_parameter("a.weight") is sub.get_parameter("b.weight")
    assert sub.get_parameter("a.weight").shape == (8, 8) and sub.get_parameter("head.weight").shape == (3, 4)
    with fx_approx.reuse_selection(kept):
        steps(kept, torch.optim.SGD(kept.parameters(), 1e-2), x)
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-2), x)
    merge(sub, approx)
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in kept.named_parameters())
    assert moved > 0 and largest(approx, kept) <= 1e-10 * moved


# ---- back, and again


def test_preserved_the_exact_model_computes_what_the_subnetwork_does() -> None:
    approx = hidden()
    sub = extract(approx)
    steps(sub, torch.optim.SGD(sub.parameters(), 0.01), X)
    merge(sub, approx, preserve=True)
    assert torch.allclose(approx.eval()(X), sub.eval()(X), atol=1e-12)


@pytest.mark.parametrize(("name", "scope"), in_turn(["grouped", "squeeze-excite", "fused-heads"], ["value", "group"]))
def test_preserved_in_groups_and_heads(name: str, scope: str) -> None:
    approx, x = transformed(name, scope)
    sub = extract(approx)
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-3), x)
    merge(sub, approx, preserve=True)
    assert torch.allclose(approx.eval()(x), sub.eval()(x), atol=1e-12)


def test_given_selections() -> None:
    approx = hidden()
    shared = list(find(approx)._fx_approx.resample.each())
    chosen = [Selection(torch.arange(5, 5 + one.k).view(1, -1), None) for one in shared]
    sub = extract(approx, chosen)
    assert torch.equal(sub.get_submodule("3").weight, approx[3].weight[5:37, 5:37])


# ---- what is refused


def test_what_cannot_be_cut_out_says_why() -> None:
    with pytest.raises(UnsupportedError, match="follows the activations"):
        model = fx_approx.transform(mlp(), Override({"3": Uniform(0.5)}, Uniform(0.5, scores="online")), X.float())
        extract(model)
    with pytest.raises(ValueError, match="no selection is made ahead"):
        extract(fx_approx.transform(mlp(), GradientSampling.backward(0.5)))
    with pytest.raises(ValueError, match="is not a transformed model"):
        extract(mlp())
    approx = hidden()
    count = len(list(find(approx)._fx_approx.resample.each()))
    for wrong, message in (
        ([], f"expected {count}, one for each"),
        ([Selection(torch.tensor([[0, 0]]), None)] * count, "units once each"),
        ([Selection(torch.tensor([[0, 64]]), None)] * count, r"selections\[0\]: expected indices .* below 64, got"),
        ([Selection(torch.zeros(1, 0, dtype=torch.int64), None)] * count, r"k at least 1, got torch.int64 of shape"),
        ([Selection(torch.tensor([[0.0]]), None)] * count, "expected int64 indices .*, got torch.float32"),
        ([Selection(torch.tensor([0]), None)] * count, r"expected int64 indices \[1, k\].* of shape \(1,\)"),
        ([Selection(torch.tensor([[0, 1]]), torch.ones(2))] * count, r"a scale of shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(approx, wrong)


def test_nothing_is_half_written() -> None:
    approx, other = hidden(), fx_approx.transform(nn.Sequential(mlp()), Uniform(0.5), X.float())
    sub = extract(approx)
    before = copy.deepcopy(approx.state_dict())
    with pytest.raises(ValueError, match="cut out of another model"):
        merge(sub, other)
    with pytest.raises(ValueError, match=r"expected what fx_approx\.subnetworks\.extract returned"):
        merge(mlp(), approx)
    with torch.no_grad():
        approx[5].bias.add_(1.0)
    with pytest.raises(ValueError, match=r"5\.bias was changed since"):
        merge(sub, approx)
    before["5.bias"] += 1.0
    assert all(torch.equal(value, before[name]) for name, value in approx.state_dict().items())
    sub = extract(approx)
    merge(sub, approx)
    with pytest.raises(ValueError, match="was written back before"):
        merge(sub, approx)
    sub = extract(approx)
    with torch.no_grad():
        approx[1].running_mean.add_(1.0)
    with pytest.raises(ValueError, match=r"1\.running_mean was changed since"):
        merge(sub, approx)
    merge(sub, copy.deepcopy(approx))  # of a copy nobody can tell
    scaled, _ = transformed("post-activation", sampler="systematic")
    sub, before = extract(scaled), copy.deepcopy(scaled.state_dict())
    with pytest.raises(ValueError, match=r"preserve: .*weight is read by a sampler that scales"):
        merge(sub, scaled, preserve=True)
    assert all(torch.equal(value, before[name]) for name, value in scaled.state_dict().items())
    merge(sub, scaled)
