"""Bad input: a clear error that names the argument, before anything is changed, or the documented pass-through."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.policies import Exact, Override, Paper, Uniform
from fx_approx.sampling import SAMPLERS
from tests.helpers.models import Cnn, Optional, mlp, same, train_step

HALF = Uniform(0.5, scores="online")
X = torch.zeros(6, 12)


def refused(error: Any, message: str, model: Any, *args: Any, **kwargs: Any) -> None:
    """``transform`` and ``explain`` refuse, and the model is as before."""
    before = copy.copy(vars(model)) if isinstance(model, nn.Module) else None
    for verb in (fx_approx.transform,) if kwargs else (fx_approx.transform, fx_approx.explain):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error, match=message):
                verb(model, *args, **kwargs)
    if before is not None:
        assert vars(model) == before


WRONG = (TypeError, ValueError)
BAD_RATIOS = [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf"), "0.5", None, True, 0.5j, [0.5], torch.tensor([0.5])]
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(({"ratio": ratio}, r"ratio: expected a number in \(0, 1\]") for ratio in BAD_RATIOS),
    *(({"min_k": k}, "min_k: expected an integer >= 1") for k in (0, -1, 1.5, "2", None, True)),
    ({"scores": "norm"}, "unknown scores 'norm'; known: ema, gradient, input, online, "),
]


@pytest.mark.parametrize("make", [Uniform, Paper, SamplerConfig])
def test_fields_are_checked_at_construction(make: Any) -> None:
    for field, message in BAD_FIELDS:
        with pytest.raises(WRONG, match=message):
            make(**field)
    known = ", ".join(sorted(SAMPLERS))
    sampler = "name" if make is SamplerConfig else "sampler"
    if make is Uniform:
        with pytest.raises(TypeError, match=r"sampler: expected a name .* behind the ratio, got 0.5"):
            Uniform("topk", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"unknown sampler 'top-k'; known: {known}"):
        make(**{sampler: "top-k"})
    with pytest.raises(WRONG, match=r"name|sampler"):
        make(**{sampler: 3})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *(((ratio,), WRONG, "ratio: expected") for ratio in BAD_RATIOS if ratio is not None and ratio is not True),
        *((({"0": 0.25, "2": ratio},), WRONG, "ratio: expected") for ratio in (0, "0.5", None)),
        (({"0": 0.25, "fc*": 0.25},), ValueError, r"no sampled layer matches 'fc\*'; there are: 0, 2, 4"),
        ({"enabled": {"0": False, "fc*": False}}, ValueError, r"no sampled layer matches 'fc\*'; there are: 0, 2, 4"),
        *(({"enabled": enabled}, TypeError, "enabled") for enabled in (1, "on", {"0": 0})),
        (({3: 0.5},), TypeError, "ratio: expected globs .* got the key 3"),
        ({"ratio": 0.5, "role": "weight"}, ValueError, "role: expected one of 'output', .* got 'weight'"),
        ((), WRONG, "ratio|enabled"),
    ],
)
def test_setting_checks_before_it_changes_anything(given: Any, error: Any, message: str) -> None:
    approx = fx_approx.transform(mlp(), HALF)
    before = fx_approx.report(approx)
    with pytest.raises(error, match=message):
        fx_approx.set_sampling(
            approx, *(given if isinstance(given, tuple) else ()), **(given if isinstance(given, dict) else {})
        )
    assert fx_approx.report(approx) == before


def test_a_model_without_candidates_warns() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(12))
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="no matrix product or convolution") as seen:
        approx = fx_approx.transform(model, HALF)
    assert seen[0].filename == __file__
    assert torch.equal(approx(X), model(X))


def changed(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = mlp()
    change(model)
    return model


def wide() -> nn.Module:
    model = Cnn()
    model.fc = nn.Linear(9, 4)
    return model


class Locked(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("one only")


CAPTURE = fx_approx.errors.CaptureError
AGAIN = fx_approx.errors.AlreadyTransformedError
BAD_CALLS: dict[str, tuple[Any, str, Callable[[], tuple[Any, ...]]]] = {
    **{
        f"model {given}": (TypeError, "model: expected a torch.nn.Module", lambda given=given: (given,))
        for given in (None, 3, "resnet18", nn.Linear, abs, [nn.ReLU()])
    },
    **{
        f"policy {given}": (TypeError, "policy: expected a policy", lambda given=given: (mlp(), given))
        for given in (0.5, "topk", Uniform, {"0": HALF})
    },
    "glob": (
        ValueError,
        r"rules: no candidate matches 'fc\*'; there are: 0, 2, 4",
        lambda: (mlp(), Override({"fc*": HALF}, HALF)),
    ),
    "too many inputs": (ValueError, "example_inputs: .*too many positional", lambda: (mlp(), HALF, (X, X))),
    "no inputs": (ValueError, "example_inputs: .*missing a required argument", lambda: (mlp(), HALF, ())),
    "other name": (ValueError, "example_inputs: ", lambda: (mlp(), HALF, {"y": X})),
    "width": (
        ValueError,
        "example_inputs: the model does not run on them: at 0: ",
        lambda: (mlp(), HALF, torch.zeros(6, 13)),
    ),
    "axes": (
        ValueError,
        "example_inputs: the model does not run on them: at 0: ",
        lambda: (mlp(), HALF, torch.zeros(12, 6)),
    ),
    "meta input": (
        ValueError,
        "example_inputs: a tensor is on meta, the model on cpu",
        lambda: (mlp(), HALF, torch.zeros(6, 12, device="meta")),
    ),
    "number": (ValueError, "example_inputs: ", lambda: (mlp(), HALF, (3,))),
    "no tensor": (TypeError, "example_inputs: expected a tensor", lambda: (mlp(), HALF, 12)),
    "a set": (TypeError, "example_inputs: expected a tensor", lambda: (mlp(), HALF, {X})),
    "deep": (ValueError, "does not run on them: at fc: ", lambda: (wide(), HALF, torch.zeros(2, 3, 8, 8))),
    "keyword only": (ValueError, "example_inputs: .*too many positional", lambda: (Optional(), HALF, (X, X, X))),
    "another model's plan": (
        fx_approx.errors.PlanMismatchError,
        "plan: made for another model: .*conv1",
        lambda: (Cnn(), fx_approx.explain(mlp(), HALF).plan),
    ),
    "meta": (CAPTURE, "model: 0.weight is on the meta device", lambda: (mlp().to("meta"), HALF)),
    "partly meta": (
        CAPTURE,
        "model: 4.weight is on the meta device",
        lambda: (changed(lambda m: m[4].to("meta")), HALF),
    ),
    "lazy": (
        CAPTURE,
        r"\(at 1\) is a lazy module not yet materialised",
        lambda: (nn.Sequential(nn.Linear(12, 16), nn.LazyLinear(4)), HALF),
    ),
    "transformed": (AGAIN, "model: .*already transformed", lambda: (fx_approx.transform(mlp(), HALF), HALF)),
    "around": (AGAIN, "model: .*already transformed", lambda: (nn.Sequential(fx_approx.transform(mlp(), HALF)), HALF)),
    "part": (AGAIN, "model: .*already transformed", lambda: (nn.Sequential(fx_approx.transform(mlp(), HALF)[0]), HALF)),
    "compiled": (CAPTURE, "model: .*is compiled; transform first", lambda: (torch.compile(mlp()), HALF)),
    "compiled part": (CAPTURE, r"\(at 0\) is compiled", lambda: (nn.Sequential(torch.compile(nn.Linear(2, 2))), HALF)),
    "compiled in place": (CAPTURE, "compiled", lambda: (changed(lambda model: model.compile()), HALF)),
    "scripted": (CAPTURE, "model: .*is scripted", lambda: (torch.jit.script(mlp()), HALF)),
    "traced": (CAPTURE, "model: .*is scripted", lambda: (torch.jit.trace(mlp(), X), HALF)),
    "parallel": (CAPTURE, "wrapped for parallel training", lambda: (nn.DataParallel(mlp()), HALF)),
    "forward": (
        CAPTURE,
        "the forward of this Sequential instance was replaced",
        lambda: (changed(lambda model: setattr(model, "forward", lambda x: x)), HALF),
    ),
    "not copied": (
        CAPTURE,
        r"model: Sequential cannot be copied: .*one only.*test_bad_input.py",
        lambda: (nn.Sequential(Locked(2, 2)), HALF),
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated; a FutureWarning from torch 2.14 on
@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_cannot_be_transformed_is_named(name: str) -> None:
    error, message, given = BAD_CALLS[name]
    refused(error, message, *given())


def test_options_are_checked() -> None:
    for seed in (1.5, "1", None, True, 2**63, -(2**63) - 1):
        refused(WRONG, "seed: expected an integer", mlp(), HALF, seed=seed)
    for every in (0, -1, 1.5, None, True):
        refused(WRONG, "selection_interval: expected an integer", mlp(), HALF, selection_interval=every)


def test_what_was_refused_may_be_mended() -> None:
    fx_approx.transform(Optional(), HALF, {"x": X, "gain": torch.ones(16)})
    model = nn.Sequential(nn.Linear(12, 16), nn.LazyLinear(4))
    model(X)
    fx_approx.transform(model, HALF, X)


def test_a_model_method_other_than_forward() -> None:
    """Methods keep working: their layers are sampled in training, exact in evaluation."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

        def encode(self, x: Tensor) -> Tensor:
            return self.fc1(x).relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.encode(x))

    model, x = Encoder(), torch.randn(6, 12)
    approx = fx_approx.transform(model, HALF)
    assert not torch.equal(approx.encode(x), model.encode(x))
    assert torch.equal(fx_approx.transform(model, Override({"fc2": Exact()}, HALF))(x), model.fc2(approx.encode(x)))
    assert torch.equal(approx.eval().encode(x), model.encode(x))


def test_layers_with_requires_grad_false() -> None:
    model = mlp().requires_grad_(False)
    approx = fx_approx.transform(model, HALF, X)
    x = torch.randn(6, 12, requires_grad=True)
    approx(x).sum().backward()
    assert x.grad is not None and int((x.grad != 0).any(0).sum()) == 6
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_put_in_eval_before_the_transform() -> None:
    model, x = mlp(), torch.randn(6, 12)
    model[0].eval(), model[4].eval()
    approx = fx_approx.transform(model, HALF)
    assert [module.training for module in approx] == [False, True, True, True, False]
    only = fx_approx.transform(model, Override({"0": Exact(), "4": Exact()}, HALF))
    assert torch.equal(approx(x), only(x)) and not torch.equal(approx(x), model(x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layers_stay_exact(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 16, dtype=dtype), nn.Linear(16, 4, dtype=dtype))
    x = torch.randn(6, 12, dtype=dtype)
    for example in (None, x):
        with pytest.warns(fx_approx.errors.NoEffectWarning):
            approx = fx_approx.transform(model, HALF, example)
        assert f"{dtype}" in fx_approx.report(approx)["0"].reason
        assert torch.equal(approx(x), model(x))


class Products(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool])
def test_products_of_other_dtypes_stay_exact(dtype: torch.dtype) -> None:
    x, y = torch.randint(2, (4, 8)).to(dtype), torch.randint(2, (8, 4)).to(dtype)
    if dtype == torch.bool:
        x, y = x.int(), y.int()
    model = Products()
    assert torch.equal(fx_approx.transform(model, HALF)(x, y), model(x, y))
    with pytest.warns(fx_approx.errors.NoEffectWarning):
        approx = fx_approx.transform(model, HALF, (x, y))
    assert "only real floating-point" in fx_approx.report(approx)["matmul"].reason
    assert torch.equal(approx(x, y), model(x, y))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_weights_stay_exact(layout: str) -> None:
    model = mlp()
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(weight.to_sparse() if layout == "coo" else weight.to_sparse_csr())
    approx = fx_approx.transform(model, HALF)
    assert "sparse" in fx_approx.report(approx)["2"].reason
    if layout == "csr":  # torch itself has no linear layer with a COO weight
        x = torch.randn(6, 12)
        assert torch.equal(approx.eval()(x), model.eval()(x))


@pytest.mark.parametrize("scores", ["online", "weight", "uniform"])
def test_sparse_operands_stay_exact(scores: str) -> None:
    x, y = torch.randn(4, 8).to_sparse(), torch.randn(8, 4)
    model = Products()
    approx = fx_approx.transform(model, Uniform(0.5, scores=scores, scope="layer"))
    assert torch.equal(approx(x, y), model(x, y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_stay_exact() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised kernels in this torch")
    model = torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear}, torch.qint8)
    approx = fx_approx.transform(model, HALF)
    assert torch.equal(approx(X), model(X))


def test_a_submodule_with_a_forward_of_its_own_is_respected() -> None:
    model, x = mlp(), torch.randn(6, 12)
    layer = model[2]
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    approx = fx_approx.transform(model, HALF)
    assert "forward was replaced" in fx_approx.report(approx)["2"].reason
    assert not torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, enabled=False)
    assert same(train_step(approx, x), train_step(model, x))


@pytest.mark.parametrize(
    "verb",
    [
        fx_approx.report,
        fx_approx.restore,
        fx_approx.sampler_state_dict,
        lambda model: fx_approx.set_sampling(model, 0.5),
        lambda model: fx_approx.set_sampling(model, enabled=False),
        lambda model: fx_approx.load_sampler_state_dict(model, {}),
        lambda model: fx_approx.reuse_selection(model).__enter__(),
    ],
)
def test_verbs_that_need_a_transformed_model_say_so(verb: Any) -> None:
    with pytest.raises(ValueError, match="model: Sequential is not a transformed model"):
        verb(mlp())
    with pytest.raises(ValueError, match="or the backend that compiles it"):
        verb(torch.compile(mlp(), backend="eager"))
    two = nn.Sequential(fx_approx.transform(mlp(), HALF), fx_approx.transform(nn.Linear(4, 4), HALF))
    with pytest.raises(ValueError, match="model: Sequential holds 2 transformed models"):
        verb(two)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"step": 1},
        {"step": 1, "selection_interval": 0, "seed": 0},
        {"step": 1.5, "selection_interval": 1, "seed": 0},
        {"step": -1, "selection_interval": 1, "seed": 0},
        {"step": 1, "selection_interval": 1, "seed": 0, "running": 3},
        {"step": 1, "selection_interval": 1, "seed": 0, "resample": 3},
        3,
    ],
)
def test_sampler_states_are_checked(values: Any) -> None:
    approx = fx_approx.transform(mlp(), Uniform(sampler="systematic", scores="online"), seed=5)
    with pytest.raises((TypeError, ValueError), match=r"^(values|selection_interval|step|running|resample): expected"):
        fx_approx.load_sampler_state_dict(approx, values)
    assert fx_approx.sampler_state_dict(approx) == {"step": 0, "selection_interval": 1, "seed": 5}


def test_statistics_need_a_module_and_batches() -> None:
    with pytest.raises(TypeError, match="model: expected a module or a backend, got 3"):
        fx_approx.recalibrate_batchnorm(3, [X])  # type: ignore[arg-type]
    for batches in (3, X):
        with pytest.raises(TypeError, match="batches: expected an iterable of batches"):
            fx_approx.recalibrate_batchnorm(mlp(), batches)  # type: ignore[arg-type]
