"""Multi-head attention taken apart: the fused layer is the oracle, in training to rounding, in evaluation bitwise."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.core.plan_effects import FULL
from fx_approx.policies import Exact, Override
from tests.helpers.quick import thinned
from tests.helpers.torchvision_compat import import_torchvision

from .attention import AHEAD, HEADS, LENGTH, ONLINE, SIZE, Block, Calls, Watch, names, transformed


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients, with the same dropout masks each time."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def differences(model: nn.Module, approx: nn.Module, x: Tensor) -> Iterator[float]:
    """Of output and gradients, relative to the largest entry of each kind."""
    ours, theirs = step(approx, x), step(model, x)
    scales = [float(theirs[0].abs().max())] + [max(float(t.abs().max()) for t in theirs[1:])] * (len(theirs) - 1)
    assert len(ours) == len(theirs)
    return (float((a - b).abs().max()) / scale for a, b, scale in zip(ours, theirs, scales, strict=True))


def causal() -> Tensor:
    return torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)


def padding() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor([4, LENGTH, 2])[:, None]


def waves(*shape: int) -> Tensor:
    """A mask of which no row is another with a constant added, which would weight values alike."""
    return torch.linspace(0, 99, math.prod(shape), dtype=torch.float64).sin().view(shape)


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "batch_first": ({}, (3, LENGTH, SIZE)),
    "batch_second": ({"batch_first": False}, (LENGTH, 3, SIZE)),
    "one_example": ({}, (1, LENGTH, SIZE)),
    "no_batches": ({}, (LENGTH, SIZE)),
    "no_batches_second": ({"batch_first": False}, (LENGTH, SIZE)),
    "no_bias": ({"bias": False}, (3, LENGTH, SIZE)),
    "dropout": ({"dropout": 0.3}, (3, LENGTH, SIZE)),
    "float_mask": ({"mask": waves(LENGTH, LENGTH)}, (3, LENGTH, SIZE)),
    "mask_of_heads": ({"mask": waves(12, LENGTH, LENGTH)}, (3, LENGTH, SIZE)),
    "bool_mask": ({"mask": causal() < 0}, (3, LENGTH, SIZE)),
    "mask_no_batches": ({"mask": waves(4, LENGTH, LENGTH)}, (LENGTH, SIZE)),
    "causal": ({"mask": causal(), "causal": True}, (3, LENGTH, SIZE)),
    "padding": ({"padding": padding()}, (3, LENGTH, SIZE)),
    "float_padding": ({"padding": padding().double() * -1e4, "batch_first": False}, (LENGTH, 3, SIZE)),
    "padding_and_mask": ({"padding": padding(), "mask": causal() < 0, "causal": True}, (3, LENGTH, SIZE)),
    "padding_and_heads": (
        {"padding": padding().double() * -1e4, "mask": waves(12, LENGTH, LENGTH)},
        (3, LENGTH, SIZE),
    ),
    "padding_no_batches": ({"padding": padding()[0]}, (LENGTH, SIZE)),
    "key_size": ({"kdim": 12}, (3, LENGTH, SIZE)),
    "key_size_second": ({"kdim": 12, "batch_first": False}, (LENGTH, 3, SIZE)),
    "key_size_no_bias": ({"kdim": 12, "bias": False}, (3, LENGTH, SIZE)),
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    options, shape = CASES[name]
    return Block(**options).double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", thinned(CASES, 4))
def test_an_exact_step_is_that_of_the_fused_layer_and_demand_reaches_the_projections(name: str) -> None:
    """Those that are packed in one weight, too: it has three times as many rows as the kept heads have entries."""
    model, x = case(name)
    exact = transformed(model, Exact(), x)
    assert "attn.out_proj" in names(exact)
    assert max(differences(model, exact, x)) < 1e-12
    approx = transformed(model, AHEAD, x)
    model.attn.dropout = approx.attn.dropout = 0.0
    verification = fx_approx.analysis.verify(approx, x)
    assert verification.hoisted and verification.passed, verification
    with Watch() as watch:
        approx(x)
    ((*_, heads, length, each),) = watch.attended
    assert (heads, length, each) == (HEADS // 2, LENGTH, SIZE // HEADS)
    have = {node.name: classes for node, classes in approx._fx_approx.record.analysis.demand.have.items()}
    projected = {kept for node, classes in have.items() if node.startswith("linear") for kept in classes}
    assert FULL not in projected and projected == set(have["scaled_dot_product_attention"])
    if model.attn.in_proj_weight is not None:
        assert 3 * SIZE // 2 in [shape[0] for shape in watch.weights]


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"dropout": 0.3}, {"bias": False, "batch_first": False}], ids=str
)
def test_an_exact_step_is_bitwise_that_of_the_fused_layer_in_float32(options: Any) -> None:
    model, x = Block(**options), torch.randn(5, LENGTH, SIZE)
    approx = transformed(model, Exact(), x)
    assert all(map(torch.equal, step(approx, x), step(model, x)))
    # Dropout is read at every call.
    approx.attn.dropout = model.attn.dropout = 0.1
    assert all(map(torch.equal, step(approx, x), step(model, x)))


@pytest.mark.parametrize("heads", thinned([1, 2, 3, 6, 12]))
def test_any_number_of_heads(heads: int) -> None:
    """One head leaves nothing to choose; 2 and 3 look like a split into query and key; 12 have one entry each."""
    model = nn.Sequential(nn.Linear(12, 12), Calls(lambda attn, x: attn(x, x, x, need_weights=False)[0]))
    model[1].fc, model[1].attn = nn.Linear(12, 12), nn.MultiheadAttention(12, heads, batch_first=True)
    model, x = model.double(), torch.randn(3, LENGTH, 12, dtype=torch.float64)
    assert max(differences(model, transformed(model, Exact(), x), x)) < 1e-12
    approx = transformed(model, AHEAD, x)
    verification = fx_approx.analysis.verify(approx, x)
    assert verification.passed and verification.hoisted
    with Watch() as watch:
        approx(x)
    kept = {1: 1, 2: 1, 3: 2, 6: 3, 12: 6}[heads]
    assert watch.attended == [(3, kept, LENGTH, 12 // heads)]


def test_the_encoder_of_a_vision_transformer() -> None:
    vit = import_torchvision().models.vision_transformer
    model = vit.EncoderBlock(HEADS, SIZE, 2 * SIZE, dropout=0.0, attention_dropout=0.0).double()
    x = torch.randn(3, LENGTH, SIZE, dtype=torch.float64)
    assert max(differences(model, transformed(model, Exact(), x), x)) < 1e-12

    approx = transformed(model, AHEAD, x)
    assert fx_approx.analysis.verify(approx, x).passed
    analysis = approx._fx_approx.record.analysis
    have = {node.name: classes for node, classes in analysis.demand.have.items()}
    (heads,) = set(have["linear"])
    assert heads != FULL and have["scaled_dot_product_attention"] == (heads,)
    kept = analysis.sharing.classes[heads]
    assert (kept.units, [(r.name, r.block) for r in kept.readings]) == (
        HEADS,
        [("self_attention.out_proj", SIZE // HEADS)],
    )
    with Watch() as watch:
        approx(x)
    assert watch.attended == [(3, HEADS // 2, LENGTH, SIZE // HEADS)]
    assert (3 * SIZE // 2, SIZE // 2) in watch.weights


@pytest.mark.parametrize("policy", [AHEAD, ONLINE], ids=["ahead", "online"])
def test_rows_are_those_of_the_parts(policy: Any) -> None:
    x = torch.randn(3, LENGTH, SIZE)
    for inputs in (x, None) if policy is ONLINE else (x,):  # what is shared is decided by shapes
        approx = transformed(Block(), policy, inputs)
        approx(x)
        report = fx_approx.report(approx)
        parts = ["attn.linear", "attn.scaled_dot_product_attention", "attn.out_proj"]
        assert [row.name for row in report.rows] == ["pre", *parts, "post"]
        assert all(report[name].samples and report[name].exact for name in ("attn.linear", "attn.out_proj"))
        assert report["attn.scaled_dot_product_attention"].reason.startswith("fused attention")


def test_parts_can_be_chosen_by_name() -> None:
    plan = fx_approx.explain(Block(), Override({"attn.linear": Exact()}, ONLINE)).plan
    assert not plan["attn.linear"].roles and plan["attn.out_proj"].roles
    rows = fx_approx.explain(Block(kdim=12), ONLINE).report.rows
    assert {"attn.linear", "attn.linear#2", "attn.linear#3"} <= {row.name for row in rows}


@pytest.mark.parametrize("name", ["batch_first", "batch_second", "no_bias", "bool_mask", "dropout"])
def test_evaluation_is_bitwise_exact(name: str) -> None:
    """Without gradients torch takes its fast path, which no graph of parts could repeat."""
    (model, x), policies = case(name), (AHEAD, ONLINE, Exact())
    for policy in policies if name == "batch_first" else policies[:1]:
        approx = transformed(model, policy, x)
        approx(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(approx.eval()(x), model.eval()(x))
        assert policy is policies[-1] or not torch.equal(approx.train()(x), model.train()(x))


def test_an_attention_in_evaluation_mode_is_its_own_python() -> None:
    """And the flag of the model still counts where its graph serves training only."""
    model, x = Block(), torch.randn(3, LENGTH, SIZE)
    approx = transformed(model, Override({"attn*": AHEAD}, Exact()), x)
    assert not torch.equal(approx(x), model(x))
    approx.attn.eval()
    assert torch.equal(approx(x), model(x))
    approx.attn.train()
    assert not torch.equal(approx(x), model(x))

    class Branching(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 if self.training else super().forward(x).relu()

    model = Branching()
    approx = transformed(model, AHEAD, x)
    for module in (model, approx):
        module.eval()
        module.attn.train()
    assert torch.equal(approx(x), model(x))


def test_names_order_and_objects_are_those_of_the_model() -> None:
    model, x = Block(), torch.randn(3, LENGTH, SIZE)
    before = copy.deepcopy(vars(model.attn))
    approx = transformed(model, AHEAD, x)
    assert vars(model.attn).keys() == before.keys() and type(model.attn) is nn.MultiheadAttention
    assert list(approx.state_dict()) == list(model.state_dict())
    assert [(n, id(p)) for n, p in approx.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [n for n, _ in approx.named_modules()] == [n for n, _ in model.named_modules()]
    restored = fx_approx.restore(approx)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_the_same(copied: Any) -> None:
    x = torch.randn(3, LENGTH, SIZE, dtype=torch.float64)
    approx = transformed(Block().double(), AHEAD, x)
    other = copied(approx)
    assert torch.equal(other(x), approx(x)) and names(other) == names(approx)
    assert torch.equal(other.eval()(x), approx.eval()(x))
    assert fx_approx.analysis.verify(other.train(), x).passed


def test_one_layer_called_twice_and_unbatched_inputs() -> None:
    def call(attn: nn.Module, x: Tensor) -> Any:
        x = attn(x, x, x, need_weights=False)[0]
        return attn(x, x, x, need_weights=False)[0]

    model, x = Calls(call).double(), torch.randn(3, LENGTH, SIZE, dtype=torch.float64)
    assert max(differences(model, transformed(model, Exact(), x), x)) < 1e-12
    single = Block().double()
    for inputs in (x, None):  # unbatched inputs of a model captured on batches
        assert max(differences(single, transformed(single, Exact(), inputs), x[0])) < 1e-12
    approx = transformed(model, AHEAD, x)
    assert {"attn.linear", "attn.linear#2", "attn.out_proj", "attn.out_proj#2"} <= set(names(approx))
    assert fx_approx.analysis.verify(approx, x).passed


def test_there_are_no_weights_to_return() -> None:
    model, x = Calls(lambda attn, x: attn(x, x, x, need_weights=False)[::1]), torch.randn(3, LENGTH, SIZE)
    assert "attn" in names(transformed(model, ONLINE, x)), "a slice of the pair"

    def call(attn: nn.Module, x: Tensor) -> Any:
        output, weights = attn(x, x, x, need_weights=False)
        return output, {"weights": weights}

    output, rest = transformed(Calls(call), ONLINE, x)(x)
    assert output.shape == x.shape and rest == {"weights": None}


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: setattr(attn, "num_heads", 2),
        lambda attn: setattr(attn, "batch_first", False),
        lambda attn: setattr(attn, "out_proj", nn.Linear(SIZE, SIZE)),
        lambda attn: attn.register_forward_pre_hook(lambda module, args: None),
    ],
    ids=["num_heads", "batch_first", "out_proj", "hook"],
)
def test_a_layer_that_was_changed_runs_as_it_is(change: Callable[[Any], Any]) -> None:
    x = torch.randn(3, LENGTH, SIZE)
    approx = transformed(Block(), Override({"attn.linear": AHEAD}, Exact()), x)
    change(approx.attn)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="MultiheadAttention"):
        output = approx(x)
    assert torch.equal(output, fx_approx.restore(approx)(x))


@pytest.mark.slow
def test_compiled_in_one_piece() -> None:
    x = torch.randn(3, LENGTH, SIZE)
    approx = transformed(Block(), AHEAD, x)
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), approx(x))
    torch.testing.assert_close(compiled.eval()(x), approx.eval()(x))
