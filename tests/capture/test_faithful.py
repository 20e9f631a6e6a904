"""What a forward does beside its graph: nothing of it may be dropped, frozen or shared silently."""

from __future__ import annotations

import collections
import copy
import linecache
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Paper, Uniform
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

ALL = Uniform(1.0, scores="online")
HALF = Uniform(0.5, "systematic", scores="online")

Forward = Callable[..., Any]


@made_of(lambda: {"aux": None})
def Child(self: Any, x: Tensor) -> Tensor:
    self.aux = x.mean()
    return x


class Model(nn.Module):
    """Two layers and whatever a test wants between them."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.l, self.q = nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop, self.child = nn.Dropout(0.5), Child()
        self.temp, self.use, self.aux = 1.0, True, []
        self.queue: collections.deque[Any] = collections.deque(maxlen=2)
        self.nested: Any = collections.defaultdict(list)
        self.array = numpy.zeros(1)
        self.act, self.pair = F.relu, (1.0, 2.0)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def filled(s: Model, x: Tensor) -> Tensor:
    h = torch.zeros(8, 16)
    h += s.l(x)
    return s.q(h)


def added_in_place(s: Model, x: Tensor) -> Tensor:
    h = torch.zeros(8, 16)
    h.add_(s.l(x))
    return s.q(h) + torch.ones(16) + torch.tensor(0.5)


def another_name(s: Model, x: Tensor) -> Tensor:
    """fx.Proxy alone would record z = h + 1 and leave h as it was."""
    h = s.l(x)
    z = h
    z += 1.0
    z *= 0.5
    z -= 0.25
    z /= 3.0
    rows = x.shape[0]
    rows //= 2
    return s.q(h) * rows


def written(s: Model, x: Tensor) -> Tensor:
    h = torch.zeros(8, 16)
    h[:, 1:] = s.l(x)[:, 1:]
    return s.q(h)


def changed_before_use(s: Model, x: Tensor) -> Tensor:
    h = torch.zeros(16)
    y = s.l(x) + h
    h.fill_(1.0)
    return s.q(y)


def scaled(s: Model, x: Tensor) -> Tensor:
    return s.q(s.l(x) * s.temp)


def branched(s: Model, x: Tensor) -> Tensor:
    h = s.l(x)
    return s.q(h) if s.use else h


def flag_of_another(s: Model, x: Tensor) -> Tensor:
    h = F.dropout(s.l(x), s.drop.p, s.drop.training)
    return s.q(h.relu() if s.drop.training else h)


def grad_mode(s: Model, x: Tensor) -> Tensor:
    h = s.l(x)
    return s.q(h.relu() if torch.is_grad_enabled() else h)


def appended(s: Model, x: Tensor) -> Tensor:
    h = s.l(x)
    s.aux.clear()
    s.aux.append(h.mean())
    return s.q(h)


def stored_in_a_layer(s: Model, x: Tensor) -> Tensor:
    h = s.l(x)
    s.l.last = h
    return s.q(h)


def aux_of_a_child(s: Model, x: Tensor) -> Any:
    return s.q(s.child(s.l(x))), s.child.aux


def queued(s: Model, x: Tensor) -> Tensor:
    s.queue.append(s.l(x))
    return s.q(s.queue[-1])


def nested(s: Model, x: Tensor) -> Tensor:
    s.nested["a"].append(s.l(x))
    return s.q(s.nested["a"][-1])


def counted_in_numpy(s: Model, x: Tensor) -> Tensor:
    s.array[0] += 1
    return s.q(s.l(x)) * float(s.array[0])


def by_function(s: Model, x: Tensor) -> Tensor:
    return s.q(s.act(s.l(x)) * s.pair[0])


def ordered(s: Model, x: Tensor) -> Any:
    return collections.OrderedDict(y=s.q(s.l(x)))


BODIES = [
    queued, nested, counted_in_numpy, by_function, ordered,
    filled, added_in_place, another_name, written, changed_before_use, scaled, branched, flag_of_another, grad_mode,
    appended, stored_in_a_layer, aux_of_a_child,
]  # fmt: skip


def made(body: Forward) -> Model:
    torch.manual_seed(0)
    return Model(body)


def quietly(model: nn.Module, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        return fx_approx.transform(model, *args, **options)


def assert_same(approx: Any, exact: Any, x: Tensor) -> None:
    """Three calls each in training and evaluation, with and without gradients: equal outputs, states and gradients."""
    for training in (True, False):
        approx.train(training), exact.train(training)
        for enabled in (True, False):
            for _ in range(3):
                with torch.set_grad_enabled(enabled):
                    torch.manual_seed(1)
                    ours = approx(x)
                    torch.manual_seed(1)
                    theirs = exact(x)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
                if enabled:
                    approx.zero_grad(), exact.zero_grad()
                    torch.utils._pytree.tree_leaves(ours)[0].sum().backward()
                    torch.utils._pytree.tree_leaves(theirs)[0].sum().backward()
                    for p, q in zip(approx.parameters(), exact.parameters(), strict=True):
                        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
    assert len(approx.aux) == len(exact.aux)
    assert hasattr(approx.l, "last") == hasattr(exact.l, "last")


@pytest.mark.parametrize("body", thinned(BODIES))
def test_at_ratio_one_it_is_the_model(body: Forward) -> None:
    x = torch.randn(8, 16)
    for given in (None, x):
        approx = quietly(made(body), ALL, given)
        assert_same(approx, made(body), x)
        assert len(fx_approx.report(approx).rows) == 2


@pytest.mark.parametrize("body", [filled, added_in_place, another_name, written, scaled, branched])
def test_what_can_stay_in_the_graph_does(body: Forward) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        approx = fx_approx.transform(made(body), HALF, torch.randn(8, 16))
    assert approx._fx_approx.program.graph is not None and approx._fx_approx.program.capture.branching == ()


def test_a_returned_constant_is_not_shared_between_calls() -> None:
    approx = fx_approx.transform(made(lambda s, x: (s.q(s.l(x)), torch.zeros(3) + 0)), HALF)
    approx(torch.randn(8, 16))[1].add_(5)
    assert approx(torch.randn(8, 16))[1].sum() == 0


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (scaled, "temp", 3.0),
        (scaled, "temp", torch.full((16,), 2.0)),
        (branched, "use", False),
        (by_function, "act", F.gelu),
        (by_function, "pair", (3.0, 1.0)),
    ],
)
def test_an_attribute_changed_later_counts(body: Forward, name: str, value: Any) -> None:
    approx, exact, x = quietly(made(body), ALL), made(body), torch.randn(8, 16)
    setattr(approx, name, value), setattr(exact, name, value)
    for training in (True, False):
        assert torch.equal(approx.train(training)(x), exact.train(training)(x))


def test_an_attribute_changed_later_is_said_once_and_layers_stay_sampled() -> None:
    approx, x = fx_approx.transform(made(scaled), HALF), torch.randn(8, 16)
    approx.temp = 2.0
    with pytest.warns(fx_approx.errors.CaptureWarning, match="attribute temp of .* was changed"):
        approx(x).sum().backward()
    assert (approx.q.weight.grad.abs().sum(0) == 0).sum() == 8
    approx(x)


def test_an_attribute_that_is_not_a_number_is_not_a_change() -> None:
    model = made(branched)
    model.use = float("nan")
    approx = fx_approx.transform(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        approx(torch.randn(8, 16))
        copy.deepcopy(approx)(torch.randn(8, 16))


def test_an_attribute_changed_later_counts_when_compiled() -> None:
    approx, exact, x = quietly(made(scaled), ALL), made(scaled), torch.randn(8, 16)
    compiled = torch.compile(approx, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), exact(x))
    approx.temp = exact.temp = 3.0
    assert torch.equal(compiled(x), exact(x))


def test_a_flag_of_another_module_counts() -> None:
    approx, exact, x = quietly(made(flag_of_another), ALL), made(flag_of_another), torch.randn(8, 16)
    approx.drop.eval(), exact.drop.eval()
    assert torch.equal(approx(x), exact(x))


def test_a_child_added_later_runs() -> None:
    approx, x = fx_approx.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), HALF), torch.randn(4, 8)
    approx.append(nn.Softmax(-1))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="a child of a ApproxSequential was changed"):
        torch.testing.assert_close(approx(x).sum(-1), torch.ones(4))


def test_a_copy_made_while_held_is_not_held() -> None:
    approx, x = fx_approx.transform(made(scaled), HALF), torch.randn(8, 16)
    with fx_approx.reuse_selection(approx):
        twin = copy.deepcopy(approx)
    assert not torch.equal(twin(x), twin(x))


def test_a_model_transformed_in_inference_mode_trains() -> None:
    x = torch.randn(8, 16)
    for policy in (HALF, Paper(0.5)):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.inference_mode():
            approx = fx_approx.transform(model, policy)
            approx(x)
        approx(x).sum().backward()


@made_of(lambda: {"l": nn.Linear(16, 16)})
def Masked(self: Any, x: Tensor, mask: Tensor | None = None, deep: bool = False) -> Tensor:
    y = self.l(x)
    if mask is not None:
        y = y @ mask
    return self.l(y) if deep else y


@pytest.mark.parametrize("inputs", [{"mask": True}, {"deep": True}, {}], ids=str)
def test_pickling_keeps_the_form_of_the_call(inputs: dict[str, bool]) -> None:
    x = torch.randn(4, 16)
    call = {"x": x, **{name: torch.eye(16) if name == "mask" else True for name in inputs}}
    approx = fx_approx.transform(Masked(), HALF, call, seed=5)
    twin = pickle.loads(pickle.dumps(approx))
    assert torch.equal(approx(**call), twin(**call))
    assert fx_approx.report(twin).to_dict() == fx_approx.report(approx).to_dict()


def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    import gc

    from fx_approx.runtime import rng as state

    x = torch.randn(8, 16)
    gc.collect()
    lines = len(linecache.cache)
    approx = fx_approx.transform(made(scaled), HALF)
    approx(x)
    number = approx._fx_approx.randomness.number
    assert any(call[0] == number for call in state._calls)
    del approx
    gc.collect()
    assert len(linecache.cache) <= lines
    assert not any(call[0] == number for call in state._calls)


@pytest.mark.parametrize("body", [counted_in_numpy, nested, queued])
def test_capture_leaves_the_values_of_the_users_model(body: Forward) -> None:
    model = made(body)
    quietly(model, HALF, torch.randn(8, 16))
    assert model.array[0] == 0 and not model.nested and not model.queue


class Quarter(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_an_attribute_read_by_a_layer_of_torch_counts() -> None:
    approx = quietly(nn.Sequential(nn.Linear(16, 16), Quarter(0.25)), ALL)
    approx[1].p = 1.0
    assert not approx(torch.randn(4, 16)).any()


def test_concurrent_transforms_leave_torch_as_it_was() -> None:
    models = [made(scaled) for _ in range(6)]
    threads = [threading.Thread(target=quietly, args=(model, HALF)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "__getattribute__" not in vars(nn.Module)
    assert torch.is_grad_enabled() and torch.is_grad_enabled.__module__ != "fx_approx.capture.side_effects"
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.bfloat16
