"""Modules inside a forward that cannot be traced have graphs of their own, sampled, shared and narrowed as any."""

from __future__ import annotations

import collections
import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.hoisting import loss_of, narrow_producers, perturbed
from tests.helpers.models import same
from tests.helpers.modes import MODES
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

AHEAD = Uniform(0.5)
RANDOM = Uniform(0.5, "crs")

pytestmark = pytest.mark.filterwarnings("ignore:not traced:fx_approx.errors.CaptureWarning")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Conv2d(16, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        high = self.up(self.stem(x))
        return collections.OrderedDict([("low", self.down(F.relu(high))), ("high", self.down(high))])


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.tower = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.score = nn.Conv2d(16, 4, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.score(self.tower(one)).flatten(2).mean(2) for one in maps]


class Detector(nn.Module):
    """As detection models are: the Python before and behind its modules depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Head()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor, targets: list[Tensor]) -> dict[str, Tensor] | list[Tensor]:
        if min(float(target.min()) for target in targets) < 0:
            raise ValueError("a target is negative")
        features = self.backbone(x)
        scores = [self.last(one) for one in self.head(list(features.values()))]
        if not self.training:
            return [one.argmax(1) for one in scores]
        found = [number for number, target in enumerate(targets) if float(target[0]) > 0]
        chosen = [one[found] for one in scores]
        return {"low": chosen[0].square().mean(), "high": (chosen[1] - 1).square().mean(), "all": sum(scores).mean()}


def made(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, list[Tensor]]]:
    torch.manual_seed(seed)
    model = perturbed(Detector()).double()
    return model, (torch.randn(3, 3, 16, 12, dtype=torch.float64), [torch.ones(2), torch.zeros(2), torch.ones(2)])


def sections(approx: nn.Module) -> list[str]:
    return [section.path for section in approx._fx_approx.program.capture.sections]


def gradients(model: nn.Module, call: Any, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    output = call(*inputs)
    wanted = dict(model.named_parameters())
    return output, dict(zip(wanted, torch.autograd.grad(loss_of(output), list(wanted.values())), strict=True))


def columns(grad: Tensor) -> int:
    """How many columns of a convolution's weight were read."""
    return int((grad != 0).flatten(2).any(2).any(0).sum())


def test_the_largest_modules_that_can_be_traced_have_graphs() -> None:
    model, inputs = made()
    with pytest.warns(
        fx_approx.errors.CaptureWarning, match="by graphs of backbone, head, and by module swap: the model"
    ):
        approx = fx_approx.transform(model, AHEAD, inputs)
    assert sections(approx) == ["backbone", "head"]
    assert narrow_producers(approx) == {"backbone.stem.0", "backbone.up.0", "head.tower.0", "head.tower.2"}
    rows = {row.name: row for row in fx_approx.report(approx).rows}
    assert set(rows) == {
        *("backbone.stem.0", "backbone.up.0", "backbone.down", "backbone.down#2"),
        *("head.tower.0", "head.tower.2", "head.score", "head.tower.0#2", "head.tower.2#2", "head.score#2", "last"),
    }
    assert all(row.exact is not None for row in rows.values())
    assert str(fx_approx.explain(model, AHEAD, inputs).report) == str(fx_approx.report(approx))


def test_they_compute_the_sampled_function() -> None:
    """The oracle is the original model with those columns of its weights zeroed that were not read."""
    model, inputs = made()
    approx = fx_approx.transform(copy.deepcopy(model), AHEAD, inputs)
    found, grads = gradients(approx, approx, inputs)
    read = {
        name: (grad != 0).flatten(2).any(2).any(0).to(grad.dtype)[:, None, None]
        if grad.dim() > 2
        else (grad != 0).any(0).to(grad.dtype)
        for name, grad in grads.items()
        if grad.dim() > 1
    }
    counts = {name: int(kept.sum()) for name, kept in read.items()}
    assert counts.pop("backbone.stem.0.weight") == 2 and counts.pop("head.score.weight") in (7, 8)  # one is never > 0
    assert all(2 * count == read[name].shape[0] for name, count in counts.items())
    exact = copy.deepcopy(model)
    leaves = dict(exact.named_parameters())
    zeroed = {name: p * read[name] if name in read else p for name, p in leaves.items()}
    whole = torch.func.functional_call(exact, zeroed, inputs)
    expected = torch.autograd.grad(loss_of(whole), list(leaves.values()))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(grads.values()), list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", thinned(["forward", "positions", "combined_straight"]))
def test_at_ratio_one_the_model_is_exact(mode: str) -> None:
    model, inputs = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        approx = fx_approx.transform(copy.deepcopy(model), MODES[mode](1.0), inputs)
    assert sections(approx) == ["backbone", "head"]
    (ours, own), (theirs, other) = gradients(approx, approx, inputs), gradients(model, model, inputs)
    assert same(ours, theirs) and same(own, other)
    assert same(dict(approx.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("policy", thinned([RANDOM, AHEAD, Uniform(0.5, scores="online")]))
def test_demand_changes_no_number(policy: Any) -> None:
    model, inputs = made()
    approx = fx_approx.transform(model, policy, inputs)
    found = fx_approx.analysis.verify(approx, inputs, loss_of)
    assert found.passed, found


def test_evaluation_is_exact_and_the_model_is_not_touched() -> None:
    model, inputs = made()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    approx = fx_approx.transform(model, RANDOM, inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert same(state, model.state_dict()) and type(model.backbone) is Backbone
    assert same(approx.eval()(*inputs), model.eval()(*inputs))
    assert list(approx.state_dict()) == list(state)


def test_mixed_modes() -> None:
    """A backbone in evaluation is exact, the head beside it still sampled."""
    model, inputs = made()
    approx = fx_approx.transform(model, AHEAD, inputs)
    approx.backbone.eval()
    _, grads = gradients(approx, approx, inputs)
    assert columns(grads["backbone.up.0.weight"]) == 8
    assert columns(grads["head.tower.0.weight"]) == 4


def test_another_size_of_the_images_is_served_by_the_graphs() -> None:
    model, (x, targets) = made()
    approx = fx_approx.transform(model, AHEAD, (x, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((3, 3, 24, 20), (2, 3, 10, 14)):
            inputs = torch.randn(shape, dtype=x.dtype), targets[: shape[0]]
            _, grads = gradients(approx, approx, inputs)
            assert columns(grads["backbone.up.0.weight"]) == 4


def test_a_section_that_does_not_fit_a_call_runs_its_own_python() -> None:
    model, inputs = made()
    approx = fx_approx.transform(copy.deepcopy(model), AHEAD, inputs)
    approx.head.tower[1] = nn.Tanh()
    approx.head.tower.register_forward_hook(lambda *_: None)
    with pytest.warns(
        fx_approx.errors.CaptureWarning, match="graph of Head cannot serve this call: a Sequential got hooks"
    ):
        _, grads = gradients(approx, approx, inputs)
    assert columns(grads["head.tower.2.weight"]) == columns(grads["backbone.down.weight"]) == 8
    assert columns(grads["backbone.up.0.weight"]) == 4


def test_copies_pickles_and_the_exact_model() -> None:
    model, inputs = made()
    approx = fx_approx.transform(model, RANDOM, inputs, seed=5)
    twin = copy.deepcopy(approx)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = pickle.loads(pickle.dumps(approx))
    assert sections(stored) == ["backbone", "head"]
    runs = [gradients(one, one, inputs) for one in (approx, twin, stored)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    with torch.no_grad():
        twin.backbone.stem[0].weight.zero_()
    assert not torch.equal(approx.backbone.stem[0].weight, twin.backbone.stem[0].weight)
    exact = fx_approx.restore(approx)
    assert type(exact.backbone) is Backbone and type(exact.head) is Head
    assert same(gradients(exact, exact, inputs), gradients(model, model, inputs))


def test_a_section_called_by_itself_draws_for_itself() -> None:
    model, inputs = made()
    approx = fx_approx.transform(model, RANDOM, inputs)
    one, other = (approx.backbone(inputs[0]) for _ in range(2))
    assert type(one) is collections.OrderedDict and not same(one, other)


@made_of(lambda: {"block": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))})
def Twice(self: Any, x: Tensor) -> list[Tensor]:
    """Calls a module several times from Python that cannot be traced."""
    return [self.block(x) for _ in range(3)] if bool(x.sum() == x.sum()) else []


def test_each_call_of_a_section_draws_for_itself() -> None:
    """A sample shared by two calls is biased where one follows the other."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    approx = fx_approx.transform(Twice(), RANDOM, x)
    assert sections(approx) == ["block"] and len(approx._fx_approx.program.capture.sections[0].called.calls) == 3
    found = approx(x)
    assert not same(found[0], found[1]) and not same(found[1], found[2])
    with fx_approx.reuse_selection(approx):  # what is held is one selection
        found, again = approx(x), approx(x)
        with torch.no_grad():
            approx.block[0].weight.mul_(2)
        kept = approx(x)
    assert same(found, again) and same(found[0], found[1])
    used = [(torch.autograd.grad(one.sum(), approx.block[0].weight)[0] != 0).any(0) for one in (found[0], kept[2])]
    assert same(*used)
    rows = fx_approx.report(approx).rows
    assert [row.exact.total for row in rows] == [3 * 2 * 4 * 8 * 16 * 2, 3 * 2 * 4 * 8 * 16 * 3]


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))
        self.end = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.on else self.block(x)
        return self.end(x) if bool(x.sum() == x.sum()) else x


@pytest.mark.parametrize("policy", thinned([AHEAD, RANDOM, Uniform(0.5, "crs", scores="ema")]))
def test_under_a_checkpoint_a_section_is_recomputed_with_the_same_selections(policy: Any) -> None:
    x = torch.randn(6, 8)
    results = []
    for on in (True, False):
        torch.manual_seed(1)
        approx = fx_approx.transform(Checkpointed(on), policy, x, seed=3)
        assert sections(approx) == ["block", "end"]
        results.append([gradients(approx, approx, (x,)) for _ in range(3)])
    assert same(*results)


@pytest.mark.filterwarnings("ignore::fx_approx.errors.BatchNormWarning")
def test_below_a_part_of_a_traced_model() -> None:
    """The model around it has a graph as well, which calls that part."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
            self.detector = Detector()

        def forward(self, x: Tensor, targets: list[Tensor]) -> Any:
            return self.detector(self.before(x), targets)

    _, inputs = made()
    model = perturbed(Wrapper()).double()
    approx = fx_approx.transform(copy.deepcopy(model), RANDOM, inputs)
    assert sections(approx) == ["", "detector.backbone", "detector.head"]
    assert narrow_producers(approx) >= {"before.0", "detector.backbone.up.0", "detector.head.tower.0"}
    assert fx_approx.analysis.verify(approx, inputs, loss_of).passed
    names = [row.name for row in fx_approx.report(approx).rows]
    assert len(names) == len(set(names)) == 13
    first, twin = gradients(approx, approx, inputs), copy.deepcopy(approx)
    second = gradients(approx, approx, inputs)
    assert not same(first, second) and same(second, gradients(twin, twin, inputs))
    assert same(approx.eval()(*inputs), model.eval()(*inputs))


def test_sizes_that_the_graph_around_relies_on_count() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return y if y.detach().sum() < 1e9 else x

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Inner(), nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for place in range(y.shape[1]):
                x = x + y[:, place : place + 1]
            return self.last(self.inner(x))

    model, x = Unrolled(), torch.randn(3, 8)
    approx = fx_approx.transform(model, RANDOM, (x, torch.randn(3, 2)))
    assert sections(approx) == ["", "inner.block"]
    y = torch.randn(3, 5)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="axis 1 of input y is not 2 long"):
        approx(x, y)
    assert torch.equal(approx.eval()(x, y), model.eval()(x, y))


def test_ends_are_those_of_the_whole_model() -> None:
    """The first layer reads no other's output, the last feeds no other, though each is in a graph of its own."""
    model, inputs = made()
    ends = {c.name: (c.first, c.last) for c in fx_approx.transform(model, AHEAD, inputs)._fx_approx.record.candidates}
    assert [name for name, (first, _) in ends.items() if first] == ["backbone.stem.0"]
    assert [name for name, (_, last) in ends.items() if last] == ["last"]


def test_an_example_that_does_not_run() -> None:
    model, (x, targets) = made()
    with pytest.raises(ValueError, match=r"example_inputs: the model does not run on them: .*expected input"):
        fx_approx.transform(model, AHEAD, (x[:, :2], targets))
    with pytest.raises(ValueError, match="example_inputs: the model does not run on them: ValueError: a target is neg"):
        fx_approx.transform(model, AHEAD, (x, [target - 2 for target in targets]))


MEMORY = torch.zeros(4, dtype=torch.float64)


class Remembers(Detector):
    """Writes to a tensor that belongs to no module."""

    def forward(self, x: Tensor, targets: list[Tensor]) -> Any:
        found = super().forward(x, targets)
        MEMORY.add_(1)
        x.zero_()
        return found


def test_a_run_on_the_example_changes_nothing_elsewhere() -> None:
    _, (x, targets) = made()
    kept = x.clone()
    with pytest.warns(
        fx_approx.errors.CaptureWarning, match="it changes a tensor in place that is no attribute of a module"
    ):
        approx = fx_approx.transform(perturbed(Remembers()).double(), AHEAD, (x, targets))
    assert torch.equal(MEMORY, torch.zeros_like(MEMORY)) and torch.equal(x, kept)
    assert sections(approx) == ["backbone", "head"]


def test_without_example_inputs_layers_are_swapped() -> None:
    model, inputs = made()
    approx = fx_approx.transform(model, Uniform(0.5, scores="online"))
    assert sections(approx) == [] and fx_approx.report(approx).totals is not None
    gradients(approx, approx, inputs)


def test_update_bn_gathers_exact_statistics() -> None:
    model, inputs = made()
    approx = fx_approx.transform(copy.deepcopy(model), AHEAD, inputs)
    for one in (model, approx):
        torch.optim.swa_utils.update_bn([], one)
        one.train()
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            one(*inputs)
    assert same(dict(approx.named_buffers()), dict(model.named_buffers()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled() -> None:
    model, inputs = made()
    approx = fx_approx.transform(model, AHEAD, inputs)
    expected, grads = gradients(approx, approx, inputs)
    torch._dynamo.reset()
    found, own = gradients(approx, torch.compile(approx, backend="eager"), inputs)
    torch.testing.assert_close((found, own), (expected, grads), rtol=1e-10, atol=1e-12)
    assert columns(own["backbone.up.0.weight"]) == 4
