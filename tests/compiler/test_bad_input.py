"""Bad input: a clear error that names the argument, before anything is changed, or the documented pass-through."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.policies import Exact, Override, Paper, Uniform
from tests.helpers.models import Cnn, Optional, mlp, same, train_step

HALF = Uniform(0.5, scores="online")
X = torch.zeros(6, 12)


def refused(error: type[Exception], message: str, model: Any, *args: Any, **kwargs: Any) -> None:
    """``transform`` and ``explain`` refuse, and the model is as before."""
    before = copy.copy(vars(model)) if isinstance(model, nn.Module) else None
    for verb in (fx_approx.transform, fx_approx.explain):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = {} if verb is fx_approx.explain else kwargs
            if kwargs and not given:
                continue
            with pytest.raises(error, match=message):
                verb(model, *args, **given)
    if before is not None:
        assert vars(model) == before


BAD_RATIOS = [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf"), "0.5", None, True, 0.5j, [0.5], torch.tensor([0.5])]
every_maker = pytest.mark.parametrize("make", [lambda **kw: Uniform(**kw), Paper, SamplerConfig])


@pytest.mark.parametrize("ratio", BAD_RATIOS, ids=repr)
@every_maker
def test_ratios_are_checked_at_construction(make: Any, ratio: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"ratio: expected a number in \(0, 1\]"):
        make(ratio=ratio)


@pytest.mark.parametrize("ratio", BAD_RATIOS, ids=repr)
def test_set_ratio_checks_before_it_changes_anything(ratio: Any) -> None:
    approx = fx_approx.transform(mlp(), HALF)
    for given in (ratio, {"0": 0.25, "2": ratio}):
        with pytest.raises((TypeError, ValueError), match="ratio: expected"):
            fx_approx.set_sampling(approx, given)
    assert {row.sample().ratio for row in fx_approx.report(approx).rows} == {0.5}


@pytest.mark.parametrize("min_k", [0, -1, 1.5, "2", None, True])
@every_maker
def test_minimal_k(make: Any, min_k: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="min_k: expected an integer >= 1"):
        make(min_k=min_k)


@pytest.mark.parametrize(
    "make", [lambda n: Uniform(sampler=n, scores="online"), lambda n: Paper(sampler=n), lambda n: SamplerConfig(n)]
)
def test_an_unknown_sampler_lists_the_known_ones(make: Any) -> None:
    known = "bernoulli, crs, systematic, topk, wta, wta_unique"
    with pytest.raises(ValueError, match=f"unknown sampler 'top-k'; known: {known}"):
        make("top-k")
    with pytest.raises((TypeError, ValueError), match=r"name|sampler"):
        make(3)


@pytest.mark.parametrize("make", [Uniform, Paper, SamplerConfig])
def test_unknown_scores_list_the_known_ones(make: Any) -> None:
    with pytest.raises(ValueError, match="unknown scores 'norm'; known: ema, gradient, input, online, "):
        make(scores="norm")


@pytest.mark.parametrize("verb", [fx_approx.set_sampling, fx_approx.set_sampling])
def test_a_glob_without_match_changes_nothing(verb: Any) -> None:
    approx = fx_approx.transform(mlp(), HALF)
    value = 0.25 if verb is fx_approx.set_sampling else False
    before = fx_approx.report(approx)
    with pytest.raises(ValueError, match=r"no sampled layer matches 'fc\*'; there are: 0, 2, 4"):
        verb(approx, {"0": value, "fc*": value})
    assert fx_approx.report(approx) == before


def test_a_glob_without_match_in_a_policy() -> None:
    refused(ValueError, r"rules: no candidate matches 'fc\*'; there are: 0, 2, 4", mlp(), Override({"fc*": HALF}, HALF))


@pytest.mark.parametrize("enabled", [1, "on", None, {"0": 0}])
def test_set_enabled_takes_a_bool(enabled: Any) -> None:
    with pytest.raises(TypeError, match="enabled"):
        fx_approx.set_sampling(fx_approx.transform(mlp(), HALF), enabled=enabled)


def test_a_model_without_candidates_warns() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(12))
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="no matrix product or convolution") as seen:
        approx = fx_approx.transform(model, HALF)
    assert seen[0].filename == __file__
    assert torch.equal(approx(X), model(X))


@pytest.mark.parametrize("model", [None, 3, "resnet18", nn.Linear, abs, [nn.ReLU()]], ids=str)
def test_no_model(model: Any) -> None:
    refused(TypeError, "model: expected a torch.nn.Module", model)


@pytest.mark.parametrize("policy", [0.5, "topk", Uniform, {"0": HALF}], ids=repr)
def test_no_policy(policy: Any) -> None:
    refused(TypeError, "policy: expected a policy", mlp(), policy)


@pytest.mark.parametrize(
    "example, message",
    [
        ((X, X), "example_inputs: .*too many positional"),
        ((), "example_inputs: .*missing a required argument"),
        ({"y": X}, "example_inputs: "),
        (torch.zeros(6, 13), "example_inputs: the model does not run on them: at 0: "),
        (torch.zeros(12, 6), "example_inputs: the model does not run on them: at 0: "),
        (torch.zeros(6, 12, device="meta"), "example_inputs: a tensor is on meta, the model on cpu"),
        ((3,), "example_inputs: "),
    ],
)
def test_example_inputs_that_do_not_fit(example: Any, message: str) -> None:
    refused(ValueError, message, mlp(), HALF, example)


def test_example_inputs_of_a_wrong_type() -> None:
    refused(TypeError, "example_inputs: expected a tensor", mlp(), HALF, 12)
    refused(TypeError, "example_inputs: expected a tensor", mlp(), HALF, {X})


def test_example_inputs_deep_in_the_model_name_the_place() -> None:
    model = Cnn()
    model.fc = nn.Linear(9, 4)
    refused(ValueError, "does not run on them: at fc: ", model, HALF, torch.zeros(2, 3, 8, 8))


def test_example_inputs_for_keyword_only_arguments() -> None:
    refused(ValueError, "example_inputs: .*too many positional", Optional(), HALF, (X, X, X))
    fx_approx.transform(Optional(), HALF, {"x": X, "gain": torch.ones(16)})


def test_a_plan_for_another_model() -> None:
    plan = fx_approx.explain(mlp(), HALF).plan
    refused(fx_approx.errors.PlanMismatchError, "plan: made for another model: .*conv1", Cnn(), plan)


@pytest.mark.parametrize("seed", [1.5, "1", None, True, 2**63, -(2**63) - 1], ids=repr)
def test_seeds(seed: Any) -> None:
    refused((TypeError, ValueError), "seed: expected an integer", mlp(), HALF, seed=seed)


@pytest.mark.parametrize("every", [0, -1, 1.5, None, True], ids=repr)
def test_periods(every: Any) -> None:
    refused((TypeError, ValueError), "selection_interval: expected an integer", mlp(), HALF, selection_interval=every)


def test_a_model_on_meta() -> None:
    refused(fx_approx.errors.CaptureError, "model: 0.weight is on the meta device", mlp().to("meta"), HALF)
    partly = mlp()
    partly[4].to("meta")
    refused(fx_approx.errors.CaptureError, "model: 4.weight is on the meta device", partly, HALF)


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


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.LazyLinear(4))
    refused(fx_approx.errors.CaptureError, r"\(at 1\) is a lazy module not yet materialised", model, HALF)
    model(X)
    fx_approx.transform(model, HALF, X)


def test_an_already_transformed_model() -> None:
    approx = fx_approx.transform(mlp(), HALF)
    for model in (approx, nn.Sequential(approx), nn.Sequential(approx[0])):
        refused(fx_approx.errors.AlreadyTransformedError, "model: .*already transformed", model, HALF)


def test_a_compiled_model() -> None:
    refused(fx_approx.errors.CaptureError, "model: .*is compiled; transform first", torch.compile(mlp()), HALF)
    refused(fx_approx.errors.CaptureError, r"\(at 0\) is compiled", nn.Sequential(torch.compile(nn.Linear(2, 2))), HALF)


def test_a_model_compiled_in_place() -> None:
    model = mlp()
    model.compile()
    refused(fx_approx.errors.CaptureError, "compiled", model, HALF)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated; a FutureWarning from torch 2.14 on
def test_a_scripted_model() -> None:
    refused(fx_approx.errors.CaptureError, "model: .*is scripted", torch.jit.script(mlp()), HALF)
    refused(fx_approx.errors.CaptureError, "model: .*is scripted", torch.jit.trace(mlp(), X), HALF)


def test_wrapped_for_parallel_training() -> None:
    refused(fx_approx.errors.CaptureError, "wrapped for parallel training", nn.DataParallel(mlp()), HALF)


def test_an_instance_with_a_forward_of_its_own() -> None:
    model = mlp()
    model.forward = lambda x: x  # type: ignore[method-assign]
    refused(fx_approx.errors.CaptureError, "the forward of this Sequential instance was replaced", model, HALF)


def test_a_submodule_with_a_forward_of_its_own_is_respected() -> None:
    model, x = mlp(), torch.randn(6, 12)
    layer = model[2]
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    approx = fx_approx.transform(model, HALF)
    assert "forward was replaced" in fx_approx.report(approx)["2"].reason
    assert not torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, enabled=False)
    assert same(train_step(approx, x), train_step(model, x))


def test_a_model_that_cannot_be_copied() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("one only")

    refused(
        fx_approx.errors.CaptureError,
        r"model: Sequential cannot be copied: .*one only.*test_bad_input.py",
        nn.Sequential(Locked(2, 2)),
    )


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
    ],
)
def test_sampler_states_are_checked(values: Any) -> None:
    approx = fx_approx.transform(mlp(), Uniform(sampler="systematic", scores="online"), seed=5)
    with pytest.raises((TypeError, ValueError), match=r"values|selection_interval|step"):
        fx_approx.load_sampler_state_dict(approx, values)
    assert fx_approx.sampler_state_dict(approx) == {"step": 0, "selection_interval": 1, "seed": 5}
