"""A recipe in Lightning: what a loop by hand does, and resumed, bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from fx_approx.recipes import Recipe
from tests.helpers.torchvision_compat import define_missing_schemas
from tests.integrations.nets import BATCHES, STEPS, assert_same, loop, loss_of, mlp, recipe_of

pytest.importorskip("lightning")
define_missing_schemas()  # Lightning imports torchvision
import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402

from fx_approx.integrations.lightning import RecipeCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    # Lightning's own, the first from the newest torch on.
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning",
    "ignore:The '.*dataloader' does not have many workers:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:The number of training batches .* is smaller than the logging interval:UserWarning",
)


class Learner(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return loss_of(self.network, batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        assert not self.network.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.numbers.setdefault(step, {}).update(metrics)


def trainer(*callbacks: Any, **options: Any) -> lightning.Trainer:
    own = {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return lightning.Trainer(**{**own, **quiet, **options}, callbacks=list(callbacks))


def loader(count: int) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(BATCHES[:count], batch_size=None)


def keep(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1, enable_version_counter=False)


def fit(folder: Path, recipe: Recipe, count: int = 7, resume: Path | None = None, **options: Any) -> Recorder:
    """Epochs of ``count`` batches, and a checkpoint after every seventh step of the optimiser."""
    recorder = Recorder()
    made = trainer(RecipeCallback(recipe), keep(folder), logger=recorder, **options)
    made.fit(Learner(recipe.model), loader(count), loader(2), ckpt_path=resume, weights_only=True)
    return recorder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_does_what_a_loop_does_and_logs(accumulate: int, tmp_path: Path) -> None:
    found, wanted = recipe_of(), recipe_of()
    recorder = fit(tmp_path, found, 2 * STEPS, accumulate_grad_batches=accumulate, val_check_interval=9)
    loop(wanted, accumulate)
    assert found.taken == STEPS and found.unserved == ()
    torch.testing.assert_close(found.finish().state_dict(), wanted.finish().state_dict(), rtol=1e-5, atol=1e-7)
    saved = found.report().totals.saved_net
    ratios = [recorder.numbers[step]["fx_approx/mean_ratio"] for step in range(STEPS)]
    assert ratios == [1.0] * 10 + [0.5] * 17 + [1.0] * 3
    logged = [recorder.numbers[step]["fx_approx/saved_flops"] for step in (9, 10, 26, 27)]
    assert logged == pytest.approx([0, saved, saved, 0]) and saved > 0.2


@pytest.mark.parametrize("stop", [7, 14, 28])
def test_a_run_goes_on_from_its_checkpoint_bitwise(stop: int, tmp_path: Path) -> None:
    whole, resumed = recipe_of(), recipe_of()
    fit(tmp_path, whole)
    fit(tmp_path, resumed, resume=tmp_path / f"step={stop}.ckpt")
    assert resumed.taken == STEPS
    assert_same(whole.finish(), resumed.finish())


def test_what_is_wrong_is_named_before_the_first_step(tmp_path: Path) -> None:
    recipe = recipe_of()
    with pytest.raises(ValueError, match="it has 30 steps, and Lightning takes 20; make it with steps=20"):
        fit(tmp_path, recipe, max_steps=20)
    with pytest.raises(ValueError, match=r"Lightning trains another model; give it recipe\.model"):
        other = trainer(RecipeCallback(recipe), enable_checkpointing=False)
        other.fit(Learner(recipe_of().model), loader(7), loader(2))
    without = trainer(keep(tmp_path), max_steps=7)
    without.fit(Learner(recipe_of().model), loader(7), loader(2))
    with pytest.raises(ValueError, match="0 of its steps were taken, and 7 of Lightning"):
        fit(tmp_path, recipe, resume=tmp_path / "step=7.ckpt")
    with pytest.raises(TypeError, match=r"recipe: expected what a function of fx_approx\.recipes returns, got None"):
        RecipeCallback(None)  # type: ignore[arg-type]


def test_the_backend_serves_beside_lightning_which_copies_what_torch_compile_is_given() -> None:
    torch._dynamo.reset()
    sampling = fx_approx.backend(Uniform(0.5), inner="aot_eager")
    model = mlp()
    compiled = torch.compile(model, backend=sampling)
    assert compiled._compile_kwargs["backend"] is sampling, "what Lightning compiles again is reported, too"
    assert not torch.equal(compiled(BATCHES[0][0]), model.eval()(BATCHES[0][0]))
    assert sampling.report().totals.saved > 0.4
