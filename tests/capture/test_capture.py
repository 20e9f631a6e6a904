"""Capture: the user's model is not touched, one graph serves both modes, nothing is frozen or dropped silently."""

from __future__ import annotations

import copy
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Uniform
from tests.helpers.models import (
    MODEL_FILE,
    UNTRACED,
    ZOO,
    Checkpointed,
    Counting,
    NestedAuxiliary,
    NestedDropout,
    Optional,
    WithDataDependent,
    mlp,
    same,
    tensors,
    train_step,
)
from tests.helpers.modules import made_of
from tests.helpers.quick import in_turn, thinned

HALF = Uniform(0.5, "systematic", scores="online")
every_model = pytest.mark.parametrize("name", ZOO)


def transformed(model: nn.Module, policy: Any = HALF, example: Any = None, **options: Any) -> Any:
    """Transform whatever it warns of: a zoo model with an untraced part, or one where all is exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        return fx_approx.transform(model, policy, example, **options)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything a user can see of a model, by value and by identity."""
    seen: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "torch": torch.get_rng_state(),
    }
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            contents = copy.copy(value) if isinstance(value, (dict, list)) else value
            seen[f"{path}.{name}"] = (id(value), contents)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
        seen[f"tensor {name}"] = (id(tensor), tensor._version, tensor.detach().clone(), tensor.requires_grad, grad)
    seen["class"] = {path: type(module) for path, module in model.named_modules()}
    return seen


@pytest.mark.parametrize("name", thinned(ZOO))
def test_the_users_model_is_not_touched(name: str) -> None:
    build, inputs = ZOO[name]
    model, x = build(), inputs()
    train_step(model, x)  # so that there are gradients and BatchNorm counts
    modules = list(model.modules())
    modules[1 % len(modules)].eval()
    modules[-1].register_forward_hook(lambda *_: None)
    random.seed(3)
    before = photograph(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for verb, given in ((fx_approx.transform, (x,)), (fx_approx.explain, None), (fx_approx.explain, (x,))):
            verb(model, HALF, given)
            after = photograph(model)
            assert list(after) == list(before)
            assert [key for key in before if not same(after[key], before[key])] == [], verb


def test_the_copy_starts_with_the_python_attributes_of_the_model() -> None:
    model = Counting()
    model.last, model.history = 7, [1, 2]
    approx = transformed(model)
    assert approx.last == 7 and approx.history == [1, 2]
    assert approx.history is not model.history


def test_tracing_leaves_nothing_in_containers_of_the_copy() -> None:
    approx = transformed(Checkpointed(None))
    assert approx.block.calls == []


@pytest.mark.parametrize(("name", "given"), in_turn(ZOO, [True, False]))
def test_one_transform_serves_both_modes_and_a_sampled_step_differs(name: str, given: bool) -> None:
    build, inputs = ZOO[name]
    model, x = build(), inputs()
    approx = transformed(model, HALF, (x,) if given else None)
    assert same(tensors(approx.eval()(x)), tensors(model.eval()(x)))
    model.train(), approx.train()
    fx_approx.set_sampling(approx, 1.0)
    state = copy.deepcopy(model.state_dict())  # BatchNorm statistics and counters are shared
    expected = train_step(model, x)
    stepped = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert same(train_step(approx, x), expected)
    assert same(dict(model.state_dict()), dict(stepped))
    fx_approx.set_sampling(approx, 0.5)
    sampled = train_step(approx, x)
    assert not same(sampled[0], expected[0])
    assert {n for n, g in sampled[1].items() if g is None} == {n for n, g in expected[1].items() if g is None}
    assert all(bool(grad.isfinite().all()) for grad in sampled[1].values() if grad is not None)


@pytest.mark.parametrize("name", sorted(set(ZOO) - UNTRACED))
def test_what_can_be_traced_is_traced(name: str) -> None:
    build, inputs = ZOO[name]
    fx_approx.transform(build(), HALF, (inputs(),))  # a CaptureWarning would be an error here


def test_functional_dropout_follows_the_flag_of_its_owner() -> None:
    model = NestedDropout()
    approx = fx_approx.transform(model, HALF)
    fx_approx.set_sampling(approx, enabled=False)
    x = torch.randn(6, 12)
    for outer, inner in ((True, True), (True, False), (False, True), (False, False)):
        for one in (model, approx):
            one.train(outer)
            one.layer1.train(inner)
        assert same(train_step(approx, x), train_step(model, x)), f"training={outer}, layer1.training={inner}"


def test_functional_dropout_with_a_flag_that_is_not_training_stays_as_written() -> None:
    @made_of(lambda: {"fc": nn.Linear(12, 64)})
    def Always(self: Any, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, training=True)

    approx = fx_approx.transform(Always(), HALF).eval()
    assert bool((approx(torch.randn(6, 12)) == 0).any())


def test_a_branching_submodule_in_eval_alone_takes_its_eval_path_and_the_others_are_sampled() -> None:
    model = NestedAuxiliary()
    approx = fx_approx.transform(model, Uniform(0.5, scores="online"))
    x = torch.randn(6, 12)
    approx.branch.eval(), model.branch.eval()
    assert not torch.equal(approx(x), model(x)), "first and last are in training mode, so sampled"
    fx_approx.set_sampling(approx, enabled={"first": False, "last": False})
    assert torch.equal(approx(x), model(x))


def test_a_model_that_trains_by_another_name_of_the_flag() -> None:
    """The constant chosen by the flag is no bool."""

    @made_of(lambda: {"fc": nn.Linear(12, 4)})
    def Scaled(self: Any, x: Tensor) -> Tensor:
        return self.fc(x) * (2.0 if self.training else 0.5)

    model = Scaled()
    approx = fx_approx.transform(model, Uniform(1.0, scores="online"))
    x = torch.randn(6, 12)
    assert torch.equal(approx(x), model(x))
    assert torch.equal(approx.eval()(x), model.eval()(x))


def test_what_cannot_be_traced_is_named_with_module_and_line() -> None:
    source = Path(MODEL_FILE).read_text().splitlines()
    line = next(n for n, text in enumerate(source, 1) if "where tracing stops" in text)
    with pytest.warns(
        fx_approx.errors.CaptureWarning, match=rf"middle: .*{re.escape(MODEL_FILE)}:{line} in forward"
    ) as seen:
        approx = fx_approx.transform(WithDataDependent(), Uniform(0.5, scores="online"))
    assert len(seen) == 1
    assert "middle" in "".join(fx_approx.report(approx).notes)


class Effect(nn.Module):
    """Calls its first layer inside something that a traced graph does not keep."""

    def __init__(self, effect: str) -> None:
        super().__init__()
        self.effect, self.a, self.b = effect, nn.Linear(12, 12), nn.Linear(12, 4)
        self.norm = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.effect == "no_grad":
            with torch.no_grad():
                x = self.a(x)
        elif self.effect == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.a(x).float()
        elif self.effect == "autocast_off":
            with torch.autocast("cpu", enabled=False):
                x = self.a(x)
        elif self.effect == "noise":
            x = self.a(x + torch.randn(12))
        elif self.effect == "python_random":
            x = self.a(x) if random.random() < 0.5 else x
        elif self.effect == "numpy_random":
            x = self.a(x) * float(numpy.random.rand())
        elif self.effect == "assignment":
            x = self.a(x)
            self.norm = x.norm()
        return self.b(x)


@pytest.mark.parametrize(
    ("effect", "nested"),
    [
        *(("no_grad", False), ("autocast", True), ("autocast_off", False), ("noise", True), ("python_random", False)),
        *(("numpy_random", True), ("assignment", False), ("assignment", True)),
    ],
)
def test_what_a_graph_cannot_hold_is_not_dropped(effect: str, nested: bool) -> None:
    inner = Effect(effect)
    model = nn.Sequential(inner) if nested else inner
    place = "0" if nested else "the model"
    with pytest.warns(fx_approx.errors.CaptureWarning, match=rf"{place}: .* would remove at .*test_capture\.py:\d+"):
        approx = fx_approx.transform(model, Uniform(1.0, scores="online"))
    own = approx[0] if nested else approx
    for seed in range(4):
        results = []
        for one in (model, approx):
            random.seed(seed), numpy.random.seed(seed)
            results.append(train_step(one, torch.ones(6, 12), seed))
        assert same(results[0], results[1])
    assert torch.equal(own.norm, inner.norm)
    context = torch.autocast("cpu", torch.bfloat16)
    with context:
        assert same(tensors(approx(torch.ones(6, 12)))[0].dtype, tensors(model(torch.ones(6, 12)))[0].dtype)


def test_capture_works_under_no_grad_and_autocast() -> None:
    model, x = mlp(), torch.randn(6, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        approx = fx_approx.transform(model, Uniform(1.0, scores="online"), x)
        report = fx_approx.report(approx)
    assert same(train_step(approx, x), train_step(model, x))
    assert report.totals.exact == fx_approx.explain(model, Uniform(1.0, scores="online"), x).report.totals.exact


def variants() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x, mask, gain = torch.randn(6, 12), torch.rand(6, 16), torch.rand(16)
    return [
        ((x,), {}),
        ((), {"x": x}),
        ((x, None), {}),
        ((x, mask), {}),
        ((x,), {"mask": mask}),
        ((x,), {"gain": gain}),
        ((x, mask), {"gain": gain, "double": True}),
        ((x,), {"double": True}),
    ]


@pytest.mark.parametrize("captured_with", [-1, 2, 3, 5, 6])
def test_calls_in_another_form_than_captured_are_right_too(captured_with: int) -> None:
    """Served by module swap where the graph does not fit: never by a graph of other arguments."""
    model, calls = Optional(), variants()
    example: Any = None
    if captured_with >= 0:
        args, kwargs = calls[captured_with]
        example = args if not kwargs else {**dict(zip(("x", "mask"), args, strict=False)), **kwargs}
    approx = fx_approx.transform(model, Uniform(0.5, scores="online"), example)
    sampled = fx_approx.transform(model, Uniform(0.5, scores="online"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        for args, kwargs in calls:
            approx.train()
            assert torch.equal(approx(*args, **kwargs), sampled(*args, **kwargs))
            assert not torch.equal(approx(*args, **kwargs), model(*args, **kwargs))
            assert torch.equal(approx.eval()(*args, **kwargs), model(*args, **kwargs))


def test_a_call_in_another_form_warns_once() -> None:
    approx = fx_approx.transform(Optional(), Uniform(0.5, scores="online"), torch.randn(6, 12))
    x, mask = torch.randn(6, 12), torch.rand(6, 16)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="called in another way than it was captured") as seen:
        approx(x, mask)
        approx(x, mask)
    assert len(seen) == 1
    assert Path(seen[0].filename) == Path(__file__)


def test_the_exact_policy_changes_nothing_and_says_so() -> None:
    model = mlp()
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="every layer stays exact"):
        approx = fx_approx.transform(model, Exact())
    x = torch.randn(6, 12)
    assert same(train_step(approx, x), train_step(model, x))


@made_of(lambda: {"first": nn.Linear(8, 16), "second": nn.Linear(16, 8)})
def Open(self: Any, x: Tensor, *rest: Tensor, scale: float = 1.0, **more: Any) -> Tensor:
    """Takes further tensors by position and by name."""
    x = self.second(torch.relu(self.first(x))) * scale
    for one in rest:
        x = x + one
    return x + more["skip"] if more.get("skip") is not None else x


@pytest.mark.parametrize("count, named", [(3, {}), (0, {"skip": None}), (0, {"skip": None, "scale": 2.0, "flag": "a"})])
def test_further_arguments_are_inputs_like_any_other(count: int, named: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Open()

    def example() -> Any:
        if count:
            return tuple(torch.randn(4, 8) for _ in range(count))
        return {"x": torch.randn(4, 8), **{name: torch.randn(4, 8) if v is None else v for name, v in named.items()}}

    def called(module: nn.Module, given: Any) -> Tensor:
        return module(*given) if count else module(given["x"], **{name: v for name, v in given.items() if name != "x"})

    approx = fx_approx.transform(model, Uniform(0.5), example())
    assert approx._fx_approx.program.stages[-1][0] == "demand"
    given = example()
    assert not torch.equal(called(approx, given), called(model, given))
    assert torch.equal(called(approx.eval(), given), called(model, given))
    others = [{"x": torch.ones(4, 8)}, {"x": torch.ones(4, 8), "skip": torch.ones(4, 8), "more": 3}]
    for one in others:
        with pytest.warns(fx_approx.errors.CaptureWarning, match="called in another way") as heard:
            result = approx.train()(**one)
        assert result.shape == (4, 8) and len(heard) == 1
        approx._fx_approx.warned.clear()
