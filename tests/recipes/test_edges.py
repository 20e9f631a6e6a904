"""What users do beside the plain loop: other optimisers, frozen weights, foreign states, errors in the middle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fx_approx
from fx_approx import recipes
from fx_approx.errors import CaptureWarning, NoEffectWarning, UnsupportedError
from fx_approx.recipes import Recipe, calls, gain

STEPS = 40
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def train(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        recipe.model(X).square().mean().backward()
        optimizer.step()
        recipe.step()


def to_the_tail(recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
    """Up to the first exact step after those that sample."""
    while not recipe.sampling:
        train(recipe, optimizer, 1)
    while recipe.sampling:
        train(recipe, optimizer, 1)


def zeros(weight: Tensor) -> int:
    return int((weight == 0).all(0).sum())


def assert_same(one: Any, other: Any) -> None:
    """Two states, bitwise."""
    leaves, shape = tree_flatten(one)
    others, other_shape = tree_flatten(other)
    assert shape == other_shape
    for value, expected in zip(leaves, others, strict=True):
        assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected


KINDS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_of_its_kind_and_settings_is_made_for_the_timing(kind: str) -> None:
    optimizer = KINDS[kind](mlp().parameters())
    other = gain.maker(optimizer)(list(mlp().parameters()))
    assert type(other) is type(optimizer) and other.defaults == optimizer.defaults


def test_adamw_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "LEAST", 0.0)
    monkeypatch.setattr(calls, "LEAST", 0.0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer)
    train(recipe, optimizer)
    assert not recipe.exact and recipe.finish() is model


@pytest.mark.parametrize("check", [False, True])
def test_an_optimiser_that_cannot_move_is_refused_before_the_timing(check: bool) -> None:
    model = mlp()
    with pytest.raises(UnsupportedError, match="LBFGS"):
        recipes.finetune(model, X, STEPS, optimizer=torch.optim.LBFGS(model.parameters()), check=check)


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.AdamW])
def test_an_optimiser_that_is_none_is_named(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected one of torch\.optim"):
        recipes.finetune(mlp(), X, STEPS, optimizer=optimizer)


@pytest.mark.parametrize("make", [recipes.finetune, recipes.pretrain, recipes.transformer])
def test_arguments_are_checked_first(make: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=r"ratio: expected a share in \(0, 1\), got 1"):
        make(mlp(), X, STEPS, 1.0)
    with pytest.raises(TypeError, match="seed: "):
        make(mlp(), X, 3, seed="a")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        make(mlp(), X, STEPS)


def test_where_nothing_is_trained_it_is_exact_and_says_so() -> None:
    recipe = recipes.finetune(mlp().requires_grad_(False), X, STEPS)
    assert recipe.exact and "nothing is trained" in str(recipe)


# ---- weights that no one trains


@pytest.mark.parametrize("narrow", [False, True])
def test_weights_frozen_on_the_way_are_left_whole(narrow: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer if narrow else None, check=False)
    optimizer = optimizer if narrow else torch.optim.SGD(recipe.model.parameters(), 0.05)
    train(recipe, optimizer, 20)
    recipe.model.get_submodule("2").requires_grad_(False)
    with pytest.warns(NoEffectWarning, match=r"1 sampled layers are not trained, such as that of 2.*left whole"):
        to_the_tail(recipe, optimizer)
    assert zeros(model[2].weight) == 0 and zeros(model[4].weight) >= 16  # type: ignore[arg-type]


def test_weights_that_the_optimiser_does_not_have_are_left_whole() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), 0.05)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    before = model[2].weight.detach().clone()  # type: ignore[union-attr]
    with pytest.warns(NoEffectWarning, match="are not trained"):
        to_the_tail(recipe, optimizer)
    assert torch.equal(model[2].weight, before) and zeros(model[4].weight) >= 16  # type: ignore[arg-type]


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 12), requires_grad=False)
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.places)


def test_a_frozen_tensor_that_no_layer_reads_keeps_no_weight_whole() -> None:
    model = Positioned()
    recipe = recipes.finetune(model, X, STEPS, check=False)
    optimizer = torch.optim.SGD(recipe.model.parameters(), 0.0)
    train(recipe, optimizer, 35)
    sampled = recipe.model(X)
    while recipe.sampling:
        train(recipe, optimizer, 1)
    assert zeros(model.net[4].weight) >= 16  # type: ignore[arg-type]
    torch.testing.assert_close(recipe.model(X), sampled)


# ---- calls


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x)
        return out if y is None else (out - y).square().mean()


def test_other_calls_in_evaluation_are_no_fault_of_the_training() -> None:
    y = torch.zeros(8, 3)
    recipe = recipes.finetune(Scored(), (X, y), STEPS, check=False)
    for _ in range(15):
        recipe.model(X, y).backward()
        recipe.step()
    recipe.model.eval()(X)  # no warning
    with torch.no_grad():
        recipe.model.train()(X)
    assert recipe.unserved == ()
    with pytest.warns(CaptureWarning, match="cannot serve"):
        recipe.model(X).square().mean().backward()
    assert recipe.unserved


def test_an_old_name_for_the_model_is_told() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    old = recipe.model
    with pytest.warns(NoEffectWarning, match="has changed no parameter of the subnetwork") as said:
        for _ in range(20):
            optimizer.zero_grad()
            old(X).square().mean().backward()
            optimizer.step()
            recipe.step()
    assert len(said) == 1


@pytest.mark.parametrize("narrow", [False, True])
def test_layers_that_are_in_evaluation_by_themselves_stay_so(narrow: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(4, 3, 8, 8)
    recipe = recipes.finetune(model, images, 80, optimizer=optimizer if narrow else None, check=False)
    assert not recipe.exact
    before = model[1].running_mean.clone()
    for _ in range(80):
        recipe.model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        recipe.step()
    done = recipe.finish()
    assert done.training and not done[1].training and torch.equal(done[1].running_mean, before)  # type: ignore[index]


# ---- states and errors in the middle


@pytest.mark.parametrize(
    "other",
    [
        lambda: recipes.finetune(mlp(), X, STEPS, 0.75, check=False),
        lambda: recipes.pretrain(mlp(), X, STEPS, 0.5, check=False),
        lambda: recipes.finetune(mlp(), X, STEPS + 10, 0.5, check=False),
        lambda: (lambda m: recipes.finetune(m, X, STEPS, optimizer=torch.optim.SGD(m.parameters(), 1.0), check=False))(
            mlp()
        ),
    ],
)
def test_a_state_of_another_recipe_is_refused_and_changes_nothing(other: Callable[[], Recipe]) -> None:
    own, foreign = recipes.finetune(mlp(), X, STEPS, check=False), other()
    train(foreign, torch.optim.SGD(foreign.model.parameters(), 0.05), 4)
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match="state: expected that of a recipe"):
        own.load_state_dict(foreign.state_dict())
    assert_same(own.state_dict(), before)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    own = recipes.finetune(mlp(), X, STEPS, check=False)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    state = recipes.finetune(model, X, STEPS, check=False).state_dict()
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=r"of another model: 4\.weight"):
        own.load_state_dict(state)
    assert_same(own.state_dict(), before)


def test_a_step_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.finetune(mlp(), X, STEPS, check=False)
    optimizer = torch.optim.SGD(recipe.model.parameters(), 0.05)
    train(recipe, optimizer, 35)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._driver, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipe.step()
    assert recipe.taken == 35
    train(recipe, optimizer, 5)
    assert recipe.finish() is recipe._full


# ---- behind a backend


class Untraced(nn.Module):
    """Asks for what a graph does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out if torch.is_grad_enabled() else out.clone()


def test_behind_a_backend_gradients_that_wait_are_as_before() -> None:
    torch._dynamo.reset()
    model = Untraced()
    model(X).square().mean().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    recipes.finetune(model, X, STEPS)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, grad)


def test_a_model_in_evaluation_is_sampled_behind_a_backend_and_stays_in_it() -> None:
    torch._dynamo.reset()
    model = Untraced().eval()
    recipe = recipes.finetune(model, X, STEPS, check=False)
    assert not recipe.exact and not model.training


def test_after_the_end_a_model_behind_a_backend_is_plain_again() -> None:
    torch._dynamo.reset()
    model = Untraced()
    recipe = recipes.finetune(model, X, STEPS, check=False)
    train(recipe, torch.optim.SGD(model.parameters(), 0.05))
    assert recipe.finish() is model and recipe.finish() is model
    assert recipe.report().totals.saved > 0
    assert not recipes.finetune(model, X, STEPS, check=False).exact


def test_an_error_while_graphs_are_made_leaves_the_model_plain() -> None:
    torch._dynamo.reset()
    model = Untraced()

    def no_bool(name: str, module: nn.Module) -> Any:
        return name

    with pytest.raises(Exception, match="expected True or False"):
        recipes.finetune(model, X, STEPS, check=False, layers=no_bool)
    assert not recipes.finetune(model, X, STEPS, check=False).exact


def test_an_error_of_a_rule_names_rule_and_layer() -> None:
    policy = fx_approx.policies.Override(
        {lambda name, module: module.in_features > 5: fx_approx.policies.Uniform(0.5)},  # type: ignore[operator]
        base=fx_approx.policies.Exact(),
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"<lambda>\('0', Conv2d\) failed: AttributeError"):
        fx_approx.transform(model, policy, torch.randn(2, 3, 8, 8))


def test_another_optimizer_than_the_one_that_was_given_is_told() -> None:
    model = mlp()
    recipe = recipes.finetune(model, X, STEPS, optimizer=torch.optim.SGD(model.parameters(), 0.01), check=False)
    other = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.warns(NoEffectWarning, match="the optimiser that was given has not stepped in the last 5 steps"):
        train(recipe, other, 5)


def test_a_step_that_a_scaler_leaves_out_is_not_told() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        recipe.model(X).square().mean().backward()
        if step % 5:
            optimizer.step()
        recipe.step()
    recipe.finish()


@pytest.mark.parametrize("given", [True, False])
def test_evaluation_mode_in_training_is_told_once(given: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer if given else None, check=False)
    train(recipe, optimizer, 2)
    recipe.model.eval()
    with pytest.warns(NoEffectWarning, match=r"recipe\.model is in evaluation mode") as told:
        train(recipe, optimizer, 3)
    assert len(told) == 1


def test_a_model_that_is_called_in_place_of_the_recipes_is_named() -> None:
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    with (
        pytest.warns(NoEffectWarning, match="evaluation mode"),
        pytest.raises(ValueError, match=r"or recipe\.model, was called in training mode"),
    ):
        train(recipe, optimizer)


def test_a_recipe_whose_model_is_never_used_says_so() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.pretrain(model, X, STEPS, check=False)
    model(X).square().mean().backward()
    optimizer.step()
    with pytest.warns(NoEffectWarning, match=r"recipe\.model was never used; call it in the place of the model"):
        recipe.step()
    train(recipe, optimizer, STEPS - 1)
    recipe.finish()


def test_a_validation_with_weights_from_before_the_phase_says_so() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    model.eval()(X)  # the exact steps train this one
    while not recipe.sampling:
        train(recipe, optimizer, 1)
    torch.compile(model, backend="eager", fullgraph=True)(X)  # is not told, and not broken
    with pytest.warns(NoEffectWarning, match="Sequential: called with the weights from before this phase") as told:
        model(X)
        model(X)
    assert len(told) == 1
    copy.deepcopy(model)(X)  # such as an average of the weights
    train(recipe, optimizer, STEPS - recipe.taken)
    assert recipe.finish() is model and not model._forward_pre_hooks


def test_the_spread_of_what_was_timed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gain.timed(mlp(), fx_approx.policies.Uniform(0.5), X, False, False, None)
    assert found.quartiles and found.quartiles[0] <= found.speedup <= found.quartiles[1]
    monkeypatch.setattr(calls, "timed", lambda *_: gain.Gain(2.0, 0.5, (1.875, 2.25)))
    text = str(recipes.finetune(mlp(), X, STEPS))
    assert "a sampled step is 2.00 times as fast here: 5 steps in turn, quartiles 1.88 and 2.25" in text


def test_a_wrong_optimizer_is_named_by_its_type() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"made of the model's parameters, got a list$"):
        recipes.finetune(model, X, STEPS, optimizer=list(model.parameters()))  # type: ignore[arg-type]


def test_an_exact_recipe_has_a_report_with_the_reason() -> None:
    recipe = recipes.finetune(mlp(), X, 5, check=False)
    assert recipe.exact and len(recipe.choices) == 1
    report = recipe.report()
    assert report.totals.saved == 0 and not any(row.samples for row in report.rows)
    assert "exact: 5 steps are too few" in str(report)
    assert repr(recipe) == "<finetune: 0 of 5 steps, exact>"


def test_what_the_whole_training_gains_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "timed", lambda *_: gain.Gain(2.0, 0.5))
    recipe = recipes.finetune(mlp(), X, STEPS)
    exact = sum(int(one.what.split()[0]) for one in recipe.choices if "exact steps" in one.what)
    share = (exact + (STEPS - exact) / 2) / STEPS
    assert f"the whole training takes {share:.2f} of the time: {exact} of {STEPS} steps are exact" in str(recipe)


def test_a_batch_with_labels_is_told_what_the_model_takes() -> None:
    with pytest.raises(
        ValueError, match=r"Sequential\.forward\(input\) is called with, without labels.*got \(Tensor, Tensor\)"
    ):
        recipes.finetune(mlp(), (X, X), STEPS)


def test_what_is_as_large_as_the_model_is_not_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    recipe = recipes.finetune(model, X, STEPS, check=False)
    monkeypatch.setattr("fx_approx.recipes.recipe.extract", lambda *_, **__: copy.deepcopy(model))
    to_the_tail(recipe, torch.optim.SGD(recipe.model.parameters(), 0.01))
    with pytest.raises(UnsupportedError, match="ship: there is no narrow network: no layer of it is narrower"):
        recipe.ship()


def test_a_state_of_a_sampled_recipe_says_what_an_exact_one_lacks_and_the_reverse() -> None:
    """What is measured may come out otherwise when a script is resumed."""
    sampled, exact = (recipes.finetune(mlp(), X, steps, check=False) for steps in (STEPS, 2))
    assert exact.exact and not sampled.exact  # two steps are too few
    exact.steps = STEPS
    with pytest.raises(ValueError, match=r"that samples, and this one does not .*too few.*; make it with check=False"):
        exact.load_state_dict(sampled.state_dict())
    with pytest.raises(ValueError, match="that was exact, and this one samples; train the model itself"):
        sampled.load_state_dict(exact.state_dict())
    with pytest.raises(ValueError, match=f"expected that of a recipe of {STEPS} steps, got one of 2"):
        sampled.load_state_dict({**sampled.state_dict(), "steps": (0, 2)})


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 64), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_where_torch_gives_up_on_a_model_the_rest_of_the_training_is_exact() -> None:
    """A hook that stores something is another guard in each step, until torch compiles no more."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    seen: list[Any] = []
    model = type("Both", (nn.Module,), {"forward": lambda self, x: self.two(self.one(x))})()
    model.one, model.two = Half(), Half()
    model.one.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = recipes.finetune(model, X, STEPS, optimizer=optimizer, check=False)
    assert not recipe.exact
    with (
        torch._dynamo.config.patch(recompile_limit=8),  # another package may have raised it
        pytest.warns(NoEffectWarning, match="the recipe goes on exactly .*no graph makes a selection ahead"),
    ):
        train(recipe, optimizer)
    assert recipe.exact and recipe.choices[0].what.startswith("exact from here on")
    assert recipe.finish() is model and len(seen) >= STEPS
    with pytest.raises(UnsupportedError, match="no graph makes a selection ahead"):
        recipe.ship()
