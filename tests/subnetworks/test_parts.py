"""Subnetworks of models that are not one graph, and of what keeps its whole weights."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.core.candidates import Role
from fx_approx.core.plan import Decision
from fx_approx.errors import UnsupportedError
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import SamplerConfig, Selection
from fx_approx.schedules import PlanRatios
from fx_approx.subnetworks import Phases, extract, load, merge, record_of, reselect, restore, save, summary
from fx_approx.subnetworks.part_layers import PartLayer, make_heads_attention
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, loss_of, perturbed
from tests.helpers.quick import quick

pytestmark = pytest.mark.filterwarnings("ignore:not traced:fx_approx.errors.CaptureWarning")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


class Head(nn.Module):
    """Its parent calls a method of it that no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.boxes, self.classes = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.tower(x)
        return {"boxes": self.boxes(x), "classes": self.classes(x)}

    def decode(self, found: dict[str, Tensor]) -> Tensor:
        return found["boxes"].mean((2, 3)) * found["classes"].amax((1, 2, 3)).unsqueeze(1)


class NumberedHead(Head):
    """Names the number of its channels."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.tower(x)
        x = x.view(x.shape[0], 12, 8, 8)
        return {"boxes": self.boxes(x), "classes": self.classes(x)}


class Detector(nn.Module):
    """Decides by values between its parts, calls the last layer itself, and decodes in evaluation."""

    def __init__(self, head: type[Head] = Head) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.head, self.last = head(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.backbone(x)
        found = self.head(x) if x.abs().max() > 0 else {}
        if self.training:
            return found, self.last(found["boxes"].mean((2, 3)))
        return self.head.decode(found)


def detector(head: type[Head] = Head, scope: str = "value", sampler: str = "topk") -> nn.Module:
    torch.manual_seed(0)
    return fx_approx.transform(perturbed(Detector(head).double()), Layers(sampler, 0.5, "weight", scope), X)


def steps(model: nn.Module, count: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model(X)).backward()
        optimizer.step()


def assert_trains_as(approx: nn.Module, sub: nn.Module, x: Any = None) -> None:
    """The same steps, merged, to 1e-10 of the largest change of a weight."""
    kept, before = copy.deepcopy(approx), copy.deepcopy(approx.state_dict())
    with fx_approx.reuse_selection(kept):
        steps(kept)
    steps(sub)
    merge(sub, approx)
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in kept.named_parameters())
    pairs = zip((*approx.parameters(), *approx.buffers()), (*kept.parameters(), *kept.buffers()), strict=True)
    assert moved > 0 and max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs) <= 1e-10 * moved


# ---- sections


@pytest.mark.parametrize(
    ("head", "how", "scope"),
    quick(
        itertools.product([Head, NumberedHead], ["own", "graphs"], ["value", "group"]),
        lambda head, how, scope: (head is Head) == ((how == "own") == (scope == "value")),  # each pair of values
    ),
)
def test_sections_train_as_the_model_does(head: type[Head], how: str, scope: str) -> None:
    example = X if how == "own" else None
    approx = detector(head, scope)
    assert [s.path for s in find(approx)._fx_approx.program.capture.sections] == ["backbone", "head"]
    sub = extract(approx, example_inputs=example)
    assert type(sub) is Detector and isinstance(sub.head, head) and record_of(sub).own_forward
    assert (type(sub.head) is head) is (example is not None and head is Head)
    if head is NumberedHead:
        assert "head: the model's own Python does not run" in record_of(sub).reason or example is None
    assert sub.head.tower[0].out_channels == 6
    assert_trains_as(approx, sub)
    assert sub.eval()(X).shape == (4, 4), "decoded by the head's own method"


def test_layers_that_python_calls_are_narrowed_too() -> None:
    approx = detector(sampler="systematic")
    sub = extract(approx, example_inputs=X)
    assert sub.last.weight.shape == (4, 2) and isinstance(sub.last, nn.Linear)
    chosen = record_of(sub).selections
    assert chosen[-1] is not None and chosen[-1].indices.shape == (1, 2)
    again = extract(approx, chosen, example_inputs=X)
    assert torch.equal(again.last.weight, sub.last.weight)
    with pytest.raises(ValueError, match=f"expected {len(chosen)}, one for each"):
        extract(approx, chosen[:-1])


def test_other_selections_come_into_the_same_tensors_of_sections() -> None:
    approx = detector(sampler="systematic")
    sub = extract(approx, example_inputs=X)
    steps(sub, 1)
    merge(sub, approx)
    objects = {id(t) for t in (*sub.parameters(), *sub.buffers())}
    steps(approx, 1)
    reselect(sub, approx)
    assert {id(t) for t in (*sub.parameters(), *sub.buffers())} == objects
    fresh = extract(approx, record_of(sub).selections, example_inputs=X)
    assert list(sub.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in sub.state_dict().items())


@pytest.mark.parametrize("example", [X, None], ids=["own", "graphs"])
def test_copied_and_pickled(example: Tensor | None) -> None:
    sub = extract(detector(NumberedHead), example_inputs=example)
    expected = loss_of(sub(X))
    for other in (copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        assert torch.equal(loss_of(other(X)), expected)
        assert isinstance(other.head, NumberedHead) and record_of(other).reason == record_of(sub).reason
        assert not {id(p) for p in other.parameters()} & {id(p) for p in sub.parameters()}


@pytest.mark.parametrize("example", [X, None], ids=["own", "graphs"])
def test_stored_in_the_forms_of_its_parts(example: Tensor | None) -> None:
    approx, file = detector(NumberedHead), io.BytesIO()
    sub = extract(approx, example_inputs=example)
    save(sub, file)
    file.seek(0)
    again = load(file, approx, example_inputs=X)
    assert record_of(again).forms == record_of(sub).forms and torch.equal(loss_of(again(X)), loss_of(sub(X)))
    merge(again, approx)
    reselect(again, approx)
    assert "head: " in str(summary(sub, approx)) or example is None


def test_phases_of_sections() -> None:
    approx = detector()
    optimizer = torch.optim.SGD(approx.parameters(), 1e-3)
    phases = Phases(approx, optimizer, PlanRatios(), interval=2, preserve=False, example_inputs=X)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(phases.model(X)).backward()
        optimizer.step()
        phases.step()
    assert phases.finish() is find(approx)


# ---- one graph


class Tied(nn.Module):
    """The head has the weights of the embedding, and reads a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1)[:, :6].abs().mul(3).long())
        result: Tensor = self.head(x + self.down(F.relu(self.up(x))))
        return result


class Twice(nn.Module):
    """A convolution, a normalisation and a grouped convolution on two values each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.shared = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.grouped, self.out = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)
        self.other = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (F.relu(self.norm(layer(x))) for layer in (self.first, self.second))
        return self.out(F.relu(self.grouped(a))), self.other(F.relu(self.grouped(self.shared(b))))


class Transposed(nn.Module):
    """A transposed convolution with one kernel for each channel, as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.kernel, self.bias = nn.Parameter(torch.randn(8, 1, 2, 2)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(self.up(x), self.kernel, self.bias, 2, 0, 0, 8)
        result: Tensor = self.down(F.relu(x))
        return result


class Functions(nn.Module):
    """Normalisations as functions, which ask the flag of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm
        args = own.running_mean, own.running_var, own.weight, own.bias, own.training
        result: Tensor = self.down(F.relu(F.batch_norm(self.up(x), *args, 0.1, 1e-5)))
        return result


@pytest.mark.parametrize(
    ("build", "scope", "sampler"),
    quick(
        itertools.product([Tied, Twice, Transposed, Functions], ["value", "group"], ["topk", "systematic"]),
        lambda build, scope, sampler: (scope == "value") == (sampler == "topk") or build is Tied,
    ),
)
def test_what_several_selections_read_stays_whole(build: type[nn.Module], scope: str, sampler: str) -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(perturbed(build().double()), Layers(sampler, 0.5, "weight", scope), X)
    sub = extract(approx, example_inputs=X)
    kept, one = copy.deepcopy(approx), copy.deepcopy(sub)
    with fx_approx.reuse_selection(kept):  # which keeps scales in float32
        assert torch.allclose(loss_of(one(X)), loss_of(kept(X)), rtol=1e-6)
    if record_of(sub).sliced:
        with pytest.raises(UnsupportedError, match="no exact model computes the same"):
            restore(sub, approx)
    if sampler == "topk":  # the scale of an unbiased one makes other steps
        assert_trains_as(approx, sub)


@pytest.mark.parametrize(("build", "name"), [(Tied, "head.weight"), (Twice, "grouped.weight")])
def test_what_no_exact_model_computes_is_said(build: type[nn.Module], name: str) -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(perturbed(build().double()), Layers("topk", 0.5, "weight", "value"), X)
    sub = extract(approx)
    assert record_of(sub).sliced[0] == name
    with pytest.raises(UnsupportedError, match=f"sub: {name} "):
        restore(sub, approx)
    with pytest.warns(fx_approx.errors.NoEffectWarning, match=f"^{name} .*: the exact model computes something else"):
        merge(sub, approx, preserve=True)


def test_names_follow_from_the_places_of_selections_and_not_from_their_objects() -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(Twice().double(), Layers("topk", 0.5, "weight", "value"), X)
    own = record_of(extract(approx)).selections
    one = own[1]  # the grouped convolution reads by the second and by the fifth
    assert one is not None
    made = [extract(approx, [*own[:4], way, own[5]]) for way in (Selection(one.indices.clone(), None), one)]
    assert "_selected6" in made[0].state_dict() and list(made[0].state_dict()) == list(made[1].state_dict())
    stream = io.BytesIO()
    save(made[0], stream)
    stream.seek(0)
    again = load(stream, Twice().double(), example_inputs=X)
    assert torch.equal(again(X)[0], made[0](X)[0])
    merge(made[1], approx)
    reselect(made[1], approx, own)
    assert torch.equal(made[1](X)[0], extract(approx, own)(X)[0])


class Encoder(nn.Module):
    """Layers that torch computes in one call in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True) for _ in range(2)))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layers(self.first(x.flatten(2).mT)))
        return result


@pytest.mark.parametrize(
    "policy",
    [
        *(Override({f"*{name}": Uniform(0.5)}, Exact()) for name in ("linear1", "self_attn*")),
        *(Layers("topk", 0.5, "weight", scope) for scope in ("group", "value")),
    ],
    ids=["linear1", "attention", "group", "value"],
)
def test_fused_layers_compute_the_same_in_evaluation(policy: fx_approx.Policy) -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(perturbed(Encoder().double()), policy, X)
    sub = extract(approx, example_inputs=X)
    assert record_of(sub).own_forward, record_of(sub).reason
    full, other = restore(sub, approx).eval(), torch.cat([X, X])[:6, :, :5]
    with torch.no_grad():
        assert torch.allclose(sub.eval()(other), full(other), rtol=1e-10)


def test_heads_of_three_values_are_refused() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    make_heads_attention(layer, None)
    x = torch.randn(2, 3, 8)
    layer(x, x, x, need_weights=False)
    with pytest.raises(UnsupportedError, match="one value as query, key and value"):
        layer(x, x + 1, x, need_weights=False)


class Products(nn.Module):
    """Two activations are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        q, k = self.q(x), self.k(x)
        result: Tensor = self.out(torch.softmax(q @ k.transpose(1, 2) / 3, -1) + torch.einsum("bic,bjc->bij", q, k))
        return result


class Everything:
    """Samples every product, those of two activations by uniform scores; layers straight through."""

    needs_shapes = True

    def decide(self, candidates: Any) -> list[Decision]:
        return [
            Decision(
                c.name,
                {Role.OUTPUT: SamplerConfig("systematic", 0.5, scores="weight" if c.kind == "linear" else "uniform")},
                straight_through=c.name == "out",
            )
            for c in candidates
        ]


def test_products_of_two_activations_and_straight_through_layers() -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(Products().double(), Everything(), X)
    kept = copy.deepcopy(approx)
    sub = extract(approx, example_inputs=X)
    with fx_approx.reuse_selection(kept):
        one, other = (loss_of(model(X)) for model in (sub, kept))
    assert torch.allclose(one, other, rtol=1e-6)
    assert "matmul_1 is a product of chosen pairs" in record_of(sub).reason
    grads = [torch.autograd.grad(value, model.out.weight)[0] for value, model in ((one, sub), (other, kept))]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4)
    merge(sub, approx)


class Standardised(nn.Linear):
    """Its weight is computed in each step."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / self.weight.std(1, keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("model", "name"),
    [(Products(), "matmul"), (nn.Sequential(nn.Linear(8, 12), Standardised(12, 12), nn.Linear(12, 5)), "1.linear")],
    ids=["activations", "computed weight"],
)
def test_scores_of_what_the_step_computes_are_refused_by_name(model: nn.Module, name: str) -> None:
    """No fixed network computes the same; with those products exact, the subnetwork does."""
    model = model.double()
    with pytest.raises(
        UnsupportedError, match=rf"model: {name}.*: its selection follows .* Exact\(\) or scores uniform"
    ):
        extract(fx_approx.transform(copy.deepcopy(model), Uniform(0.5), X))
    rest = {"1.linear": Exact()} if name == "1.linear" else {"matmul*": Exact(), "einsum*": Exact()}
    approx = fx_approx.transform(copy.deepcopy(model), Override(rest, Uniform(0.5)), X)
    sub = extract(approx, example_inputs=X)
    with fx_approx.reuse_selection(approx):
        assert torch.allclose(sub(X), approx(X), rtol=1e-12)
    assert sum(p.numel() for p in sub.parameters()) < sum(p.numel() for p in model.parameters())


# ---- with other tools


@pytest.mark.slow
@pytest.mark.parametrize("example", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["own", "graph"])
def test_parts_of_wide_values_are_exported_and_compiled(example: bool) -> None:
    torch.manual_seed(0)
    build, shape = NETS["post-activation"]
    x = torch.randn(*shape)
    approx = fx_approx.transform(build(), Layers("topk", 0.5, "weight", "value"), x)
    approx[1].eval()
    sub = extract(approx, example_inputs=x if example else None)
    assert record_of(sub).own_forward is example and not sub.get_submodule("1").training
    assert example is any(isinstance(module, PartLayer) for module in sub.modules())
    expected = sub.eval()(x)
    assert torch.allclose(torch.export.export(sub, (x,)).module()(x), expected, atol=1e-6)
    assert torch.allclose(torch.compile(sub, backend="aot_eager", fullgraph=True)(x), expected, atol=1e-6)
    assert torch.equal(copy.deepcopy(sub).double().float()(x), expected)


class Masked(nn.Module):
    """Gives scores that are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        scores = self.down(F.relu(self.up(x)))
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return scores.mean(), scores[:, 0, :4].masked_fill(~mask, float("-inf"))


def test_masked_scores_are_compared() -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(Masked().double(), Layers("topk", 0.5, "weight", "value"), X)
    assert type(extract(approx, example_inputs=X)) is Masked


class InEvaluation(nn.Module):
    """Does something else in evaluation, by a function that is told how; a target is welcome in training only."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(8, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        hidden = F.relu(self.up(x))
        if self.training:
            result: Tensor = self.down(hidden)
            return result if target is None else result - target
        if target is not None:
            raise ValueError("a target is for training")
        ways = {
            "right": lambda: self.down(hidden).softmax(-1),
            "size": lambda: self.down(hidden) * self.up.out_features,
            "more": lambda: self.down(hidden) + hidden.sum(-1, keepdim=True),
            "fails": lambda: self.down(hidden) + hidden[:, 15:],
            "parts": lambda: hidden,
        }
        made: Tensor = ways[self.how]()
        return made


def in_evaluation(how: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 8).double()
    return fx_approx.transform(InEvaluation(how).double(), Override({"down": Uniform(0.5)}, Exact()), {"x": x}), x


def test_python_that_goes_another_way_in_evaluation_is_compared_there_too() -> None:
    approx, x = in_evaluation("right")
    sub = extract(approx, example_inputs=x)
    assert type(sub) is InEvaluation and not record_of(sub).notes
    assert torch.allclose(sub.eval()(x), restore(sub, approx).eval()(x))
    for how, message in (
        ("size", "gives other numbers on narrow layers in evaluation"),
        ("more", "gives other numbers on narrow layers in evaluation"),
        ("fails", "does not run on narrow layers in evaluation: .*size"),
    ):
        approx, x = in_evaluation(how)
        sub = extract(approx, example_inputs=x)
        assert isinstance(sub, torch.fx.GraphModule) and re.search(message, record_of(sub).reason)
        with pytest.raises(RuntimeError, match="serves training only"):
            sub.eval()(x)


def test_what_was_not_compared_in_evaluation_is_said() -> None:
    approx, x = in_evaluation("parts")
    sub = extract(approx, example_inputs=x)
    assert type(sub) is InEvaluation
    assert record_of(sub).notes == (
        "its evaluation was not compared: it returns values of other sizes than the full model",
    )
    given = {"x": x, "target": torch.zeros(4, 4).double()}
    approx = fx_approx.transform(InEvaluation("right").double(), Override({"down": Uniform(0.5)}, Exact()), given)
    (note,) = record_of(extract(approx, example_inputs=given)).notes
    assert note.startswith("its evaluation was not compared: the full model does not run there") and "a target" in note


# ---- which calls a graph serves


class Scaled(nn.Module):
    """Has an argument that is no tensor, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.b(F.relu(self.a(x * scale)))
        return result + self.b(x.new_ones(16)) if not self.training else result


def test_a_graph_refuses_calls_that_it_does_not_serve() -> None:
    x = torch.randn(4, 8)
    approx = fx_approx.transform(Scaled(), Uniform(0.5), {"x": x, "scale": 2.0})
    sub = extract(approx)
    for one in (sub, copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        assert isinstance(one, torch.fx.GraphModule) and record_of(one).reason
        assert torch.allclose(one(x, 2.0), sub(x=x, scale=2.0))
        with pytest.raises(RuntimeError, match="called in another way than it was captured"):
            one(x)
        with pytest.raises(RuntimeError, match="serves training only"):
            one.eval()(x, 2.0)
        one.train()
    merge(sub, approx)


def test_what_follows_gradients_is_refused() -> None:
    class Gradients:
        needs_shapes = True

        def decide(self, candidates: Any) -> list[Decision]:
            spec, grads = SamplerConfig("topk", 0.5, scores="weight"), SamplerConfig("topk", 0.5, scores="gradient")
            return [Decision(c.name, {Role.OUTPUT: spec, Role.GRAD_WEIGHT: grads}) for c in candidates]

    approx = fx_approx.transform(Scaled(), Gradients(), torch.randn(4, 8))
    with pytest.raises(UnsupportedError, match="follows the activations or gradients"):
        extract(approx)
