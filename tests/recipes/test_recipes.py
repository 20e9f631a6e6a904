"""Recipes: each is what the advice says, written out by hand; and what they refuse, say and keep."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx import recipes
from fx_approx.errors import UnsupportedError
from fx_approx.policies import HiddenUnits, Tokens, Uniform
from fx_approx.recipes import Recipe, calls
from fx_approx.recipes.gain import Gain
from fx_approx.schedules import ExactTail, ExactWarmup, PlanRatios, RatioScheduler
from fx_approx.subnetworks import Phases
from tests.helpers.quick import in_turn

STEPS = 80
IMAGES, LABELS = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randint(5, (8,))


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs in (3, 32, 32):
            layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.BatchNorm2d(32, momentum=0.5), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


class Vit(nn.Module):
    """Patches, blocks, the mean over patches."""

    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        self.embed, self.pooled = nn.Conv2d(3, 16, 2, 2), pooled
        layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1) if self.pooled else x)


def built(kind: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(3)
    return kind(*args).double()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(recipe.model(IMAGES), LABELS).backward()
        optimizer.step()
        recipe.step()


def same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def by_hand(kept: int) -> ExactTail:
    need = 7  # batches until a momentum of 0.5 has forgotten all but a hundredth
    return ExactTail(ExactWarmup(PlanRatios(), 10), total=STEPS, steps=kept or need)


def test_finetuning_with_an_optimizer_is_phases_of_a_narrow_network() -> None:
    model, other = built(Cnn), built(Cnn)
    optimizer = sgd(model)
    recipe = recipes.finetune(model, IMAGES, STEPS, optimizer=optimizer, check=False)
    train(recipe, optimizer, STEPS)
    assert recipe.finish() is model and not recipe.exact

    approx = fx_approx.transform(other, Uniform(0.5, min_k=16, round_to=8, scores="ema"), IMAGES)
    own = sgd(approx)
    tail = next(int(one.what.split()[0]) for one in recipe.choices if "at the end" in one.what)
    phases = Phases(approx, own, by_hand(tail), example_inputs=IMAGES)
    sizes = set()
    for _ in range(STEPS):
        own.zero_grad()
        F.cross_entropy(phases.model(IMAGES), LABELS).backward()
        own.step()
        sizes.add(sum(p.numel() for p in phases.model.parameters()))
        phases.step()
    phases.finish()
    same(model, other)
    assert len(sizes) == 2 and min(sizes) < 0.4 * max(sizes)


def test_finetuning_without_is_the_kept_selection_in_the_graph() -> None:
    model, other = built(Cnn), built(Cnn)
    recipe = recipes.finetune(model, IMAGES, STEPS, check=False)
    before = recipe.report()
    train(recipe, sgd(recipe.model), STEPS)
    assert recipe.finish() is model
    assert recipe.report().totals == before.totals and before.totals.saved > 0.5

    policy = Uniform(0.5, min_k=16, round_to=8, scores="ema")
    approx = fx_approx.transform(other, policy, IMAGES, selection_interval=10**9)
    tail = next(int(one.what.split()[0]) for one in recipe.choices if "at the end" in one.what)
    scheduler, own = RatioScheduler(approx, by_hand(tail), preserve=True), sgd(approx)
    for _ in range(STEPS):
        own.zero_grad()
        F.cross_entropy(approx(IMAGES), LABELS).backward()
        own.step()
        scheduler.step()
    same(model, other)


def test_pretraining_follows_the_weights() -> None:
    model, other = built(Cnn), built(Cnn)
    recipe = recipes.pretrain(model, IMAGES, STEPS, check=False)
    train(recipe, sgd(recipe.model), STEPS)
    recipe.finish()

    approx = fx_approx.transform(other, Uniform(0.65, min_k=16), IMAGES)
    tail = next(int(one.what.split()[0]) for one in recipe.choices if "at the end" in one.what)
    scheduler = RatioScheduler(approx, ExactTail(PlanRatios(), total=STEPS, steps=tail), preserve=True)
    own = sgd(approx)
    for _ in range(STEPS):
        own.zero_grad()
        F.cross_entropy(approx(IMAGES), LABELS).backward()
        own.step()
        scheduler.step()
    same(model, other)


def test_a_transformer_drops_tokens_and_ends_with_all() -> None:
    model, other = built(Vit), built(Vit)
    recipe = recipes.transformer(model, IMAGES, STEPS, hidden_units=0.5, check=False)
    assert "8 of 16" in str(recipe.report())
    train(recipe, sgd(recipe.model), STEPS)
    recipe.finish()

    layers = HiddenUnits(Uniform(0.5, min_k=16, round_to=8))
    approx = fx_approx.transform(other, Tokens(0.5, first=0, layers=layers), IMAGES)
    scheduler = RatioScheduler(approx, ExactTail(PlanRatios(), total=STEPS, steps=8), preserve=True)
    own = sgd(approx)
    for _ in range(STEPS):
        own.zero_grad()
        F.cross_entropy(approx(IMAGES), LABELS).backward()
        own.step()
        scheduler.step()
    same(model, other)
    with pytest.raises(UnsupportedError, match="ship: there is no narrow network"):
        recipe.ship()
    alone = recipes.transformer(built(Vit), IMAGES, STEPS, check=False)
    train(alone, sgd(alone.model), 2)
    with pytest.raises(
        UnsupportedError, match="no narrow network: tokens are left out in training, and a narrow network"
    ):
        alone.ship()


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_what_ships_is_the_part_before_the_exact_steps(with_optimizer: bool) -> None:
    model = built(Cnn)
    optimizer = sgd(model)
    given = {"optimizer": optimizer} if with_optimizer else {}
    recipe = recipes.finetune(model, IMAGES, STEPS, check=False, **given)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="nothing was sampled yet"):
        recipe.ship()
    tail = next(int(one.what.split()[0]) for one in recipe.choices if "at the end" in one.what)
    train(recipe, optimizer, STEPS - tail - 1)
    optimizer.zero_grad()
    F.cross_entropy(recipe.model(IMAGES), LABELS).backward()
    optimizer.step()
    now = recipe.ship().eval()(IMAGES)
    recipe.step()
    sampled = recipe.ship().eval()
    assert torch.equal(sampled(IMAGES), now)
    train(recipe, optimizer, tail)
    recipe.finish()
    assert torch.equal(recipe.ship().eval()(IMAGES), now)
    assert sum(p.numel() for p in sampled.parameters()) < 0.4 * sum(p.numel() for p in model.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in sampled.parameters()}
    assert not shared and not torch.allclose(model.eval()(IMAGES), now)


@pytest.mark.parametrize(("kind", "stop"), in_turn(["phases", "graph", "tokens"], [5, 40, 77]))
def test_a_run_that_stops_goes_on_bitwise(kind: str, stop: int) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Recipe]:
        model = built(Vit if kind == "tokens" else Cnn)
        optimizer = sgd(model)
        if kind == "tokens":
            return model, optimizer, recipes.transformer(model, IMAGES, STEPS, check=False)
        own = {"optimizer": optimizer} if kind == "phases" else {}
        return model, optimizer, recipes.finetune(model, IMAGES, STEPS, check=False, **own)  # type: ignore[arg-type]

    through, optimizer, recipe = begin()
    train(recipe, optimizer, stop)
    state = copy.deepcopy((recipe.state_dict(), optimizer.state_dict()))
    train(recipe, optimizer, STEPS - stop)
    recipe.finish()

    resumed, optimizer, recipe = begin()
    recipe.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(recipe, optimizer, STEPS - stop)
    recipe.finish()
    same(through, resumed)


def test_where_it_does_not_pay_it_says_so_and_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "timed", lambda *args: Gain(1.04, 1.0))
    model = built(Cnn)
    recipe = recipes.finetune(model, IMAGES, STEPS)
    assert recipe.exact and recipe.model is model and "1.04 times as fast here" in str(recipe)
    train(recipe, sgd(model), STEPS)
    assert recipe.finish() is model
    with pytest.raises(UnsupportedError, match="nothing is sampled"):
        recipe.ship()
    monkeypatch.setattr(calls, "timed", lambda *args: Gain(1.5, 1.0))
    recipe = recipes.finetune(model, IMAGES, STEPS)
    assert not recipe.exact and "1.50 times as fast here" in str(recipe)


def test_steps_are_timed_on_copies() -> None:
    model = built(Cnn)
    before, optimizer = copy.deepcopy(model.state_dict()), sgd(model)
    state = torch.get_rng_state()
    recipes.finetune(model, IMAGES, STEPS, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: recipes.finetune(built(Cnn), IMAGES, 20), "20 steps are too few"),
        (lambda: recipes.transformer(built(Cnn), IMAGES, STEPS), "no tokens can be sampled"),
        (lambda: recipes.transformer(built(Vit, False), IMAGES, STEPS), "can only skip blocks"),
        (lambda: recipes.finetune(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), STEPS, check=False), "nothing"),
    ],
)
def test_what_cannot_be_sampled_stays_exact(make: Any, says: str) -> None:
    recipe = make()
    assert recipe.exact and says in str(recipe)


def test_skipping_is_done_where_it_is_asked_for() -> None:
    recipe = recipes.transformer(built(Vit, False), IMAGES, STEPS, mode="skip", check=False)
    assert not recipe.exact and "others pass it by" in str(recipe.report())


def test_bad_arguments_are_named() -> None:
    model = built(Cnn)
    for call, message in (
        (lambda: recipes.finetune(model, IMAGES, 0), "steps"),
        (lambda: recipes.finetune(model, IMAGES, STEPS, 1.5), "ratio"),
        (lambda: recipes.finetune(model, None, STEPS), "batch"),
        (lambda: recipes.finetune(model, IMAGES, STEPS, check=1), "check"),  # type: ignore[arg-type]
        (lambda: recipes.transformer(model, IMAGES, STEPS, hidden_units=0.0), "hidden_units"),
        (lambda: recipes.transformer(model, IMAGES, STEPS, mode="jump"), "mode"),
        (lambda: recipes.finetune(model, IMAGES, STEPS, optimizer=sgd(built(Cnn)), check=False), "optimizer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_steps_are_counted() -> None:
    recipe = recipes.pretrain(built(Cnn), IMAGES, STEPS, check=False)
    with pytest.raises(ValueError, match="80 of 80 steps are left"):
        recipe.finish()
    train(recipe, sgd(recipe.model), STEPS)
    with pytest.raises(ValueError, match="all 80 steps"):
        recipe.step()
    with pytest.raises(ValueError, match="state: expected what Recipe"):
        recipe.load_state_dict({"steps": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, at a graph break
def test_a_model_that_is_not_traced_goes_by_the_backend() -> None:
    import transformers

    sizes = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(50, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    recipe = recipes.finetune(model, batch, STEPS, check=False)
    assert recipe.model is model and "torch.fx cannot trace" in str(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    zeros = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        recipe.model(**batch).loss.backward()
        optimizer.step()
        recipe.step()
        zeros.append(int((model.transformer.h[0].mlp.c_proj.weight == 0).all(1).sum()))  # its rows are inputs
    assert zeros[STEPS - 9] == 64 and not any(zeros[: STEPS - 9] + zeros[STEPS - 8 :])
    sampled = [row.name for row in recipe.report().rows if row.samples]
    assert sampled and all(name.endswith("c_proj") for name in sampled)
    narrow = recipe.ship()
    assert isinstance(narrow, transformers.GPT2LMHeadModel)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    assert recipe.finish() is model


def test_layers_are_chosen_by_glob_or_by_function() -> None:
    def sampled(layers: Any) -> list[str]:
        recipe = recipes.pretrain(built(Cnn), IMAGES, STEPS, check=False, layers=layers)
        return [row.name for row in recipe.report().rows if row.samples]

    everything = sampled(None)
    assert {"3", "6", "11"} <= set(everything)
    assert sampled("3") == ["3"]
    assert sampled(lambda name, module: isinstance(module, nn.Linear)) == ["11"]
    recipe = recipes.pretrain(built(Cnn), IMAGES, STEPS, check=False, layers="3")
    assert {row.reason for row in recipe.report().rows if row.name == "11"} == {"not among the layers asked for"}
    vit = recipes.transformer(built(Vit), IMAGES, STEPS, hidden_units=0.5, check=False, layers="blocks.layers.1.*")
    units = [row.name for row in vit.report().rows if row.samples]
    assert units and all(name.startswith("blocks.layers.1.") for name in units) and "8 of 16" in str(vit.report())
    for layers, error, message in (
        ("nowhere", ValueError, "layers: expected a rule that some layer fits, got 'nowhere'"),
        (3, TypeError, r"layers: expected a glob .* a function of \(name, module\) or None, got 3"),
        (lambda name, module: None, TypeError, "expected True or False, got None"),
    ):
        with pytest.raises(error, match=message):
            sampled(layers)
    with pytest.raises(ValueError, match="layers: says whose hidden units"):
        recipes.transformer(built(Vit), IMAGES, STEPS, check=False, layers="blocks.*")


def test_the_numbers_of_each_step() -> None:
    recipe = recipes.finetune(built(Cnn), IMAGES, STEPS, check=False)
    saved, optimizer, numbers = recipe.report().totals.saved_net, sgd(recipe.model), []
    tail = next(int(one.what.split()[0]) for one in recipe.choices if "at the end" in one.what)
    for _ in range(STEPS):
        numbers.append(recipe.scalars())
        train(recipe, optimizer, 1)
    sampled = [step for step, one in enumerate(numbers) if one == {"mean_ratio": 0.5, "saved_flops": saved}]
    assert sampled == list(range(10, STEPS - tail)) and saved > 0.5
    assert sum(one == {"mean_ratio": 1.0, "saved_flops": 0.0} for one in numbers) == 10 + tail
    exact = recipes.finetune(built(Cnn), IMAGES, 20)
    assert exact.scalars() == {"mean_ratio": 1.0, "saved_flops": 0.0}


def test_a_state_without_the_model_goes_on_and_is_json() -> None:
    through = recipes.finetune(built(Cnn), IMAGES, STEPS, check=False)
    optimizer = sgd(through.model)
    train(through, optimizer, 40)
    state = json.loads(json.dumps(through.state_dict(model=False)))
    own = copy.deepcopy((through.model.state_dict(), optimizer.state_dict()))
    train(through, optimizer, STEPS - 40)

    resumed = recipes.finetune(built(Cnn), IMAGES, STEPS, check=False)
    optimizer = sgd(resumed.model)
    resumed.model.load_state_dict(own[0])
    resumed.load_state_dict(state)
    optimizer.load_state_dict(own[1])
    train(resumed, optimizer, STEPS - 40)
    same(through.finish(), resumed.finish())
    same(through.ship(), resumed.ship())

    late = recipes.finetune(built(Cnn), IMAGES, STEPS, check=False)
    late.load_state_dict(through.state_dict())
    with pytest.raises(UnsupportedError, match="a state in which nothing was sampled, or no longer"):
        late.ship()


def test_frozen_weights_are_not_set_to_zero() -> None:
    model = built(Cnn)
    model[3].requires_grad_(False)
    before = model[3].weight.clone()
    recipe = recipes.finetune(model, IMAGES, STEPS, check=False)
    assert "frozen weights are left whole" in str(recipe)
    train(recipe, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05), STEPS)
    assert torch.equal(recipe.finish()[3].weight, before)  # type: ignore[index]


class Turned(nn.Module):
    """A layer whose weight stands as Hugging Face's Conv1D has it, ``[inputs, outputs]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Untraced(nn.Module):
    """Asks for what a graph does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Turned(), nn.ReLU(), Turned(), nn.ReLU(), Turned())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if torch.is_grad_enabled() else self.layers(x).clone()


def test_what_ships_of_a_backend_has_seen_several_shapes() -> None:
    """The graph for another shape holds what the one before it has learnt, layers of that included."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model, rows = Untraced(), torch.randn(12, 64)
    recipe = recipes.finetune(model, rows[:8], STEPS, check=False)
    assert "by a backend" in str(recipe)
    for step in range(20):
        recipe.model(rows if step % 2 else rows[:8]).square().mean().backward()
        recipe.step()
    assert len(recipe._handle.pieces) > 1  # type: ignore[union-attr]
    shipped = recipe.ship()
    assert sum(p.numel() for p in shipped.parameters()) < sum(p.numel() for p in model.parameters())
