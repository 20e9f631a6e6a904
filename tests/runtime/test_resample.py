"""Selections made ahead: who shares them, by what scores, what they learn, how long they are kept, and recomputed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.ops.input_norm_ema import aged
from fx_approx.policies import Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.shared_selection import SharedSelection, SharedSelections
from fx_approx.sampling import SamplerConfig
from tests.helpers.ahead import Readers, batch, indices, names, readers, same, selections, shared, shuffle
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, assert_same_numbers, pair, perturbed, training_step
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

# ---- which readers scope, and by what


def test_who_shares() -> None:
    assert names(readers(Layers(scope="layer"))) == [["first"], ["left"], ["right"], ["last"]]
    assert names(readers(Layers(scope="value"))) == [["first"], ["left", "right"], ["last"]]
    assert names(readers(Layers(scope="group"))) == [["first"], ["left", "right", "last"]]


class Shown(Readers):
    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        y = x + self.left(x)
        return torch.cat([self.right(x), self.last(y)], 1), y


def test_nothing_is_shared_over_an_addition_whose_result_is_needed_whole() -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(Shown().double(), Layers(scope="group"), batch())
    assert names(approx) == [["first"], ["left", "right"], ["last"]]


def test_shared_selections_are_of_the_sum_of_the_scores() -> None:
    model = readers(Layers("topk", scope="group"))
    total = model.left.weight.norm(dim=0) + model.right.weight.norm(dim=0) + model.last.weight.norm(dim=0)
    expected = [sorted(model.first.weight.norm(dim=0).topk(3).indices.tolist()), sorted(total.topk(8).indices.tolist())]
    assert indices(model, batch()) == expected


def test_scales_are_those_of_the_sum_of_the_scores() -> None:
    model = readers(Layers("systematic", scope="value"))
    weights = (model.left.weight.norm(dim=0) + model.right.weight.norm(dim=0)).detach()
    for _ in range(3):
        chosen = selections(model, batch())[1]
        assert chosen is not None
        assert chosen.scale is not None
        # Inclusion probabilities by bisection of the water level, mixed with a tenth of uniform.
        low, high = 0.0, 1e6
        for _ in range(200):
            level = (low + high) / 2
            low, high = (level, high) if float((level * weights).clamp(max=1).sum()) < 8 else (low, level)
        p = 0.9 * (level * weights).clamp(max=1) + 0.1 * 8 / 16
        torch.testing.assert_close(chosen.scale[0], 1 / p[chosen.indices[0]], rtol=1e-9, atol=0)


def test_heads_are_scored_by_the_norm_of_their_block() -> None:
    torch.manual_seed(0)
    build, shape = NETS["fused-heads"]
    model = build().double()
    approx = fx_approx.transform(model, Layers(scope="value"), torch.randn(shape).double())
    places = {
        r.name: (i, r.block)
        for i, c in enumerate(approx._fx_approx.record.analysis.sharing.classes)
        for r in c.readings
    }
    place, block = places["proj"]
    assert block == 3
    scores = model.proj.weight.square().sum(0).view(4, 3).sum(1).sqrt()
    assert indices(approx, torch.randn(shape).double())[place] == sorted(scores.topk(2).indices.tolist())


def test_a_flattened_map_is_scored_as_one_channel() -> None:
    torch.manual_seed(0)
    build, shape = NETS["vgg"]
    model = build().double()
    approx = fx_approx.transform(model, Layers(scope="value"), torch.randn(shape).double())
    place = next(i for i, own in enumerate(names(approx)) if own == ["classifier.0"])
    scores = model.classifier[0].weight.square().sum(0).view(10, 4).sum(1).sqrt()
    assert indices(approx, torch.randn(shape).double())[place] == sorted(scores.topk(5).indices.tolist())


@made_of(lambda: {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 6, 1), "last": nn.Linear(56, 5)})
def Beside(self: Any, x: Tensor) -> Tensor:
    """Two flattened maps, one behind the other."""
    return self.last(torch.cat([self.a(x).relu().flatten(1), self.b(x).relu().flatten(1)], 1))


def test_maps_side_by_side_are_scored_by_their_own_columns() -> None:
    torch.manual_seed(0)
    model = Beside().double()
    approx = fx_approx.transform(model, Layers(scope="value"), torch.randn(2, 3, 2, 2).double())
    chosen = indices(approx, torch.randn(2, 3, 2, 2).double())
    found = [one for own, one in zip(names(approx), chosen, strict=True) if own == ["last"]]
    norms = model.last.weight.square().sum(0).view(14, 4).sum(1).sqrt()
    assert found == [sorted(norms[:8].topk(4).indices.tolist()), sorted(norms[8:].topk(3).indices.tolist())]


def test_groups_give_as_many_each() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 9, 1, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 1)
    model = nn.Sequential(*layers).double()
    approx = fx_approx.transform(model, Layers(scope="value"), torch.randn(2, 3, 4, 4).double())
    chosen = selections(approx, torch.randn(2, 3, 4, 4).double())
    norms = model[2].weight.square().sum((2, 3)).view(3, 3, 4).sum(1).sqrt()
    assert chosen[1].indices.tolist() == [sorted(row.topk(2).indices.tolist()) for row in norms]
    assert chosen[2].indices.shape == (3, 2)


def test_running_norms_of_groups_are_those_of_their_own_channels() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 9, 1, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 1)
    x = torch.randn(2, 3, 4, 4).double()
    approx = fx_approx.transform(nn.Sequential(*layers).double(), Layers(scores="ema", scope="value"), x)
    approx(x)  # the first step is exact
    chosen = selections(approx, x)[1]
    places = chosen.indices + 4 * torch.arange(3).unsqueeze(1)
    assert (shared(approx)[1].age == 0).nonzero().flatten().tolist() == sorted(places.flatten().tolist())


@pytest.mark.parametrize(
    ("options", "units", "block", "groups", "reader_groups", "expected"),
    [
        ({}, 16, 1, 1, 1, 8),
        ({"round_to": 8}, 16, 4, 1, 1, 8),  # 32 of 64 pairs; two units are a granule
        ({"round_to": 8}, 15, 4, 1, 1, 8),  # 7.5 units, up to a multiple of two
        ({"min_k": 10}, 16, 4, 1, 1, 8),
        ({"min_k": 50}, 16, 4, 1, 1, 13),  # 50 pairs are 12.5 units
        ({"min_k": 6}, 4, 1, 4, 1, 2),  # a plain reader beside four groups: 8 in all
        ({"min_k": 6}, 4, 1, 4, 4, 4),  # a grouped one: 6 of each group
        ({"round_to": 4}, 4, 1, 4, 1, 2),
    ],
)
def test_unit_count(
    options: dict[str, int], units: int, block: int, groups: int, reader_groups: int, expected: int
) -> None:
    assert SamplerConfig(**options).count_units(units, block, groups, reader_groups) == expected


# ---- scores that learn


def test_the_first_step_of_stale_scores_is_exact() -> None:
    model = readers(Layers(scores="ema", scope="group"))
    torch.manual_seed(0)
    exact = Readers().double()
    one, other = training_step(model, batch()), training_step(exact, batch())
    assert torch.equal(one.outputs[0], other.outputs[0])
    for name, grad in one.grads.items():
        assert torch.equal(grad, other.grads[name]), name
    assert all(one is not None for one in selections(model, batch()))


def test_running_norms_start_from_the_exact_step() -> None:
    model = readers(Layers(scores="ema", scope="value"))
    x = batch()
    hidden = F.linear(x, model.first.weight, model.first.bias).relu().detach()
    model(x)
    torch.testing.assert_close(shared(model)[0].running[0], x.norm(dim=0).float())
    for row in shared(model)[1].running:
        torch.testing.assert_close(row, hidden.norm(dim=0).float())


def test_running_norms_move_on_sampled_channels_only() -> None:
    model = readers(Layers(scores="ema", scope="value"))
    model(batch())
    one = shared(model)[0]
    before = one.running.clone()
    x = batch(1)
    (chosen, *_) = indices(model, x)
    assert len(chosen) == 3
    norms = x.norm(dim=0).float()
    expected = before[0].clone()
    expected[chosen] = 0.9 * expected[chosen] + 0.1 * norms[chosen]
    torch.testing.assert_close(one.running[0], expected)
    assert one.age.tolist() == [0 if unit in chosen else 1 for unit in range(6)]


@pytest.mark.parametrize(
    ("name", "scope"),
    thinned(
        [
            *(("grouped", "group"), ("post-activation", "group"), ("dense", "value"), ("squeeze-excite", "value")),
            *(("fused-heads", "layer"), ("vgg", "layer")),
        ]
    ),
)
def test_running_norms_are_those_without_demand(name: str, scope: str) -> None:
    build, shape = NETS[name]
    x = torch.randn(shape).double()
    hoisted, whole = pair(perturbed(build()).double(), Layers("topk", 0.5, "ema", scope), x)
    for _ in range(3):
        hoisted(x)
        whole(x)
    for one, other in zip(shared(hoisted), shared(whole), strict=True):
        torch.testing.assert_close(one.running, other.running)
        assert torch.equal(one.age, other.age)
        assert (one.running >= 0).all()


def test_scores_are_weight_norms_times_running_norms() -> None:
    model = readers(Layers(scores="ema", scope="value"))
    model(batch())
    weight = model.left.weight.norm(dim=0) * shared(model)[1].running[0]
    weight = weight + model.right.weight.norm(dim=0) * shared(model)[1].running[1]
    assert indices(model, batch())[1] == sorted(weight.topk(8).indices.tolist())


@pytest.mark.slow
def test_no_channel_starves() -> None:
    """TopK on fixed weights and one batch would choose the same channels for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        model[2].weight[:, 3] *= 1e-3
    approx = fx_approx.transform(model, Layers(scores="ema", scope="value"), batch())
    seen: set[int] = set()
    for _ in range(1100):
        seen |= set(indices(approx, batch())[1] or ())
    assert seen == set(range(16))


def test_age_raises_scores_toward_the_largest() -> None:
    scores = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(aged(scores, torch.zeros(3, dtype=torch.int64)), scores)
    torch.testing.assert_close(aged(scores, torch.full((3,), 138)), (4 + scores) / 2, rtol=1e-3, atol=1e-2)
    assert (aged(scores, torch.full((3,), 100_000)) == 4).all()


def test_coverage() -> None:
    model = readers(Layers(scores="ema", scope="value"))
    assert all(one.coverage == 1 for one in shared(model))
    for one in shared(model):
        one.age.fill_(1000)
    for _ in range(2):  # the first looks at all
        model(batch())
    assert all(one.coverage == 1 for one in shared(model))
    one = shared(model)[0]
    one.age[:3] = 1000
    assert one.coverage == 0.5
    assert readers(Layers(scope="value"))._fx_approx.resample.shared[0].coverage is None


def test_ages_leave_scores_that_are_not_finite_alone() -> None:
    ages = torch.tensor([0, 200, 0, 7])
    scores = aged(torch.tensor([1.0, 1.0, float("inf"), 4.0]), ages)
    assert scores[0] == 1 and 1 < scores[1] < 4 and scores[2] == float("inf") and scores[3] == 4
    assert aged(torch.tensor([1.0, float("nan"), 2.0]), ages[:3]).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scores", ["weight", "ema"])
def test_all_that_is_kept_lies_on_the_device_of_the_weights(scores: str) -> None:
    approx = fx_approx.transform(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), Uniform(0.5, min_k=1, scores=scores), torch.randn(2, 8)
    )
    device = torch.device("meta")
    made = approx._fx_approx.resample
    resample = SharedSelections(
        [SharedSelection(one.members, one.units, one.groups, device) for one in made.each()], device
    )
    resample.published = resample.tracker()
    resample.fit()
    fx_approx.set_sampling(approx, 0.25)
    resample.fit()
    found = dict(resample.named_buffers())
    assert {"held_key", "held_indices", "held_scale", "published.mask"} <= set(found)
    assert ("shared.0.running" in found) == (scores == "ema")
    assert {buffer.device.type for buffer in found.values()} == {"meta"}


# ---- keeping one sample


@pytest.mark.parametrize(
    ("sampler", "scores"), [("topk", "weight"), ("topk", "ema"), ("systematic", "ema"), ("systematic", "uniform")]
)
def test_hold_keeps_a_sample_while_weights_and_norms_move(sampler: str, scores: str) -> None:
    model = readers(Layers(sampler, scores=scores, scope="value"))
    model(batch())
    model(batch())
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        for step in range(3):
            shuffle(model)
            again = selections(model, batch(step) * 3)
            assert same(first, again)
    after = selections(model, batch())
    assert not same(first, after)


@pytest.mark.parametrize(("sampler", "scores"), [("topk", "ema"), ("systematic", "weight")])
def test_every_keeps_a_sample_for_so_many_forwards(sampler: str, scores: str) -> None:
    model = readers(Layers(sampler, scores=scores, scope="value"), selection_interval=3)
    if scores == "ema":
        for _ in range(3):
            model(batch())
    for _ in range(3):
        period = []
        for step in range(3):
            shuffle(model)
            period.append(selections(model, batch(step)))
        assert same(period[0], period[1])
        assert same(period[0], period[2])
        shuffle(model)
    fresh = selections(model, batch())
    assert not same(fresh, period[0])


def test_bernoulli_keeps_its_numbers() -> None:
    for scores in ("weight", "ema"):
        model = readers(Layers("bernoulli", scores=scores, scope="value"))
        model(batch())
        with fx_approx.reuse_selection(model):
            first = selections(model, batch())
            if scores == "weight":
                assert same(first, selections(model, batch(1)))
            model(batch())


def test_hold_keeps_a_sample_while_a_reader_is_off() -> None:
    model = readers(Layers(scope="value"))
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        model.last.eval()
        shuffle(model)
        second = selections(model, batch())
        model.last.train()
        third = selections(model, batch())
    assert second[2] is None
    assert same(first[:2], second[:2])
    assert same(first, third)


def test_a_held_sample_can_be_taken_up_by_a_layer_that_was_off() -> None:
    model = readers(Layers("systematic", scope="value"))
    model.last.eval()
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        model.last.train()
        second = selections(model, batch())
    assert first[2] is None
    assert same(first[:2], second[:2])
    assert second[2].indices.unique().numel() == 8
    assert second[2].scale.min() >= 1


# ---- recomputation


@pytest.mark.parametrize(
    ("scope", "scores", "sampler"),
    [("value", "ema", "topk"), ("group", "ema", "systematic"), ("group", "weight", "topk")],
)
def test_a_checkpoint_of_the_whole_model_changes_nothing(scope: str, scores: str, sampler: str) -> None:
    build, shape = NETS["post-activation"]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    net = perturbed(build()).double()
    plain, kept = (fx_approx.transform(copy.deepcopy(net), Layers(sampler, 0.5, scores, scope), x) for _ in range(2))
    calls = [0]
    find(kept)._fx_approx.resample.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for _ in range(3):
        expected = training_step(plain, x)
        found = training_step(_Checkpointed(kept), x)
        assert torch.equal(found.outputs[0], expected.outputs[0])
        for name, grad in expected.grads.items():
            torch.testing.assert_close(found.grads[f"model.{name}"], grad, rtol=1e-12, atol=1e-13)
    assert calls[0] == 6, "the checkpoint did not recompute"


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize(("scores", "sampler"), [("weight", "systematic"), ("ema", "topk")])
def test_two_forwards_wait_for_their_recomputation(scores: str, sampler: str) -> None:
    def gradients(keep: bool) -> list[Tensor]:
        model = readers(Layers(sampler, scores=scores, scope="value"))
        model(batch())
        x, y = batch(1), batch(2)
        if keep:
            first, second = (checkpoint(model, t, use_reentrant=False) for t in (x, y))
        else:
            first, second = model(x), model(y)
        wanted = list(model.parameters())
        return [*torch.autograd.grad(first.square().sum(), wanted), *torch.autograd.grad(second.square().sum(), wanted)]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_recomputation_teaches_nothing() -> None:
    model, plain = (readers(Layers(scores="ema", scope="value")) for _ in range(2))
    for _ in range(3):
        checkpoint(model, batch(), use_reentrant=False).sum().backward()
        plain(batch()).sum().backward()
    for one, other in zip(shared(model), shared(plain), strict=True):
        assert torch.equal(one.running, other.running)
        assert torch.equal(one.age, other.age)


def test_a_copy_recomputes_with_its_own_selections() -> None:
    """Both are at the same step of the same seed, but have learnt different norms."""
    model = readers(Layers(scores="ema", scope="value"))
    twin = copy.deepcopy(model)
    model(batch(1))
    twin(batch(2) * torch.linspace(0.01, 9, 6))
    expected = indices(copy.deepcopy(model), batch(3)), indices(copy.deepcopy(twin), batch(3))
    assert expected[0] != expected[1]
    wanted, alone = list(model.parameters()), copy.deepcopy(model)
    x = batch(3)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    checkpoint(twin, batch(3), use_reentrant=False)
    found = torch.autograd.grad(loss, wanted)
    right = torch.autograd.grad(alone(x).square().sum(), list(alone.parameters()))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_hoisted_equals_whole_under_a_checkpoint() -> None:
    build, shape = NETS["squeeze-excite"]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    hoisted, whole = pair(perturbed(build()).double(), Layers("systematic", 0.5, "ema", "group"), x)
    for _ in range(2):
        one, other = training_step(_Checkpointed(hoisted), x), training_step(_Checkpointed(whole), x)
    assert_same_numbers(one, other, 1e-10)  # the statistics are updated twice, as by any checkpoint


@pytest.mark.slow
def test_a_checkpoint_around_a_compiled_model_takes_the_selections_of_its_forward() -> None:
    """Running norms move in every forward, so a recomputation that chose anew would choose otherwise."""
    torch._dynamo.reset()
    model = readers(Layers("topk", scores="ema", scope="value"))
    for step in range(2):
        model(batch(step))
    state = fx_approx.sampler_state_dict(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def uneven(step: int) -> Tensor:
        return batch(step) * 1e3 ** torch.eye(6, dtype=torch.float64)[step]

    def gradients(call: object) -> list[Tensor]:
        fx_approx.load_sampler_state_dict(model, state)
        inputs = [uneven(step).requires_grad_() for step in range(5)]
        outputs = [call(x) for x in inputs]  # type: ignore[operator]
        return list(torch.autograd.grad(sum(y.square().sum() for y in outputs), [*inputs, *model.parameters()]))

    plain = gradients(compiled)
    again = gradients(lambda x: checkpoint(compiled, x, use_reentrant=False))
    chosen = [indices(model, uneven(step)) for step in range(5)]
    assert len({str(one) for one in chosen}) > 1
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
