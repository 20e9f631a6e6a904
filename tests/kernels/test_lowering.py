"""The lowering table: what is chosen, that ops follow it and give the same numbers, and what happens without Triton."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import Role, SamplerSpec, kernels, ops
from fx_approx.ops import Late, Rule
from fx_approx.ops.base import norm
from fx_approx.policies import Roles, Uniform
from fx_approx.sampling import Selection


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    torch.manual_seed(0)
    with kernels.preferring("reference"):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton operators that run."""
    pytest.importorskip("triton")
    operators = importlib.import_module("fx_approx.kernels.triton_ops").OPERATORS
    seen: list[str] = []

    def counted(name: str, operator: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append(name)
            return operator(*args)

        return call

    replaced = {name: counted(name, operator) for name, operator in operators.items()}
    monkeypatch.setattr("fx_approx.kernels.triton_ops.OPERATORS", replaced)
    return seen


def test_the_reference_is_the_default_everywhere() -> None:
    for row in kernels.LOWERINGS:
        for device in ("cpu", "cuda"):
            assert kernels.choose(row.kind, row.role, device, torch.bfloat16) == "reference"


@pytest.mark.parametrize(
    ("kind", "role", "dtype", "expected"),
    [
        ("linear", Role.OUTPUT, torch.float32, "gathered_k_matmul"),
        ("linear", Role.GRAD_WEIGHT, torch.bfloat16, "gathered_rows_matmul"),
        ("linear", None, torch.float16, "column_norms"),
        ("linear", Role.GRAD_INPUT, torch.float32, "reference"),
        ("linear", None, torch.float64, "reference"),
        ("conv2d", Role.OUTPUT, torch.float32, "reference"),
    ],
)
def test_what_is_chosen(kind: str, role: Role | None, dtype: torch.dtype, expected: str) -> None:
    pytest.importorskip("triton")
    with kernels.preferring("triton") as usable:
        assert usable
        assert kernels.choose(kind, role, "cuda", dtype) == expected
        assert kernels.choose(kind, role, "cpu", dtype) == expected  # by the interpreter
        assert kernels.choose(kind, role, "mps", dtype) == "reference" or expected != "reference"
    assert kernels.choose(kind, role, "cuda", dtype) == "reference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_type_that_no_kernel_takes_is_the_references_and_named_once(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    with kernels.preferring("triton"):
        with pytest.warns(fx_approx.KernelWarning, match=f"no Triton kernel takes {dtype}: the reference is used"):
            assert kernels.choose("linear", Role.OUTPUT, "cuda", dtype) == "reference"
        assert kernels.choose("linear", Role.OUTPUT, "cuda", dtype) == "reference"
        assert kernels.choose("linear", Role.GRAD_WEIGHT, "cuda", dtype) == "reference"
    assert kernels.choose("linear", Role.OUTPUT, "cuda", dtype) == "reference"


def test_the_table_is_printed() -> None:
    text = kernels.table_text()
    assert "gathered_rows_matmul" in text and "In use: reference." in text and "its speed" in text


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sampled_linear_layer_gives_the_same_with_either(scaled: bool, bias: bool, launches: list[str]) -> None:
    leaves = [torch.randn(2, 5, 12), torch.randn(7, 12), *([torch.randn(7)] if bias else [])]
    selection = Selection(torch.tensor([[9, 0, 4]]), torch.tensor([[2.0, 1.5, 4.0]]) if scaled else None)
    found = []
    for kernel in ("reference", "triton"):
        with kernels.preferring(kernel):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            result = ops.linear(*own, selection=selection)
            found.append([result, *torch.autograd.grad(result.square().sum(), own)])
    torch.testing.assert_close(*found)
    assert launches == ["gathered_k_matmul"]


@pytest.mark.parametrize("choice", ["made", "late"])
def test_a_sampled_weight_gradient_gives_the_same_with_either(choice: str, launches: list[str]) -> None:
    leaves = [torch.randn(11, 6), torch.randn(4, 6)]
    rows = torch.tensor([[7, 2, 3]])
    chosen: Any = Selection(rows, torch.tensor([[1.5, 2.0, 3.0]]))
    if choice == "late":
        chosen = Late(Rule("topk", 3), None)
    found = []
    for kernel in ("reference", "triton"):
        with kernels.preferring(kernel):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            found.append(torch.autograd.grad(ops.linear(*own, grad_weight=chosen).square().sum(), own))
    torch.testing.assert_close(*found)
    assert launches == ["gathered_rows_matmul"]


def test_second_derivatives_are_those_of_the_reference(launches: list[str]) -> None:
    leaves = [torch.randn(5, 6), torch.randn(4, 6)]
    chosen = Selection(torch.tensor([[1, 2]]), None)
    found = []
    for kernel in ("reference", "triton"):
        with kernels.preferring(kernel):
            x, w = (leaf.clone().requires_grad_() for leaf in leaves)
            first = torch.autograd.grad(ops.linear(x, w, grad_weight=chosen).square().sum(), w, create_graph=True)[0]
            assert launches == []
            found.append(torch.autograd.grad(first.square().sum(), w)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(9, 12), (3, 4, 12)])
def test_online_scores_take_the_norms_of_the_kernel(shape: tuple[int, ...], launches: list[str]) -> None:
    x = torch.randn(shape)
    found = []
    for kernel in ("reference", "triton"):
        with kernels.preferring(kernel):
            found.append(norm(x, tuple(range(len(shape) - 1))))
            norm(x.requires_grad_(), (0,))  # what is differentiated goes through the reference
            x = x.detach()
    torch.testing.assert_close(*found)
    assert launches == ["column_norms"]


@pytest.mark.parametrize(
    "policy", [Uniform("systematic", 0.5, scores="weight"), Roles(grad_weight=SamplerSpec("topk", 0.5))]
)
def test_a_model_trains_the_same_with_either(policy: Any, launches: list[str]) -> None:
    def step(kernel: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
        approx = fx_approx.transform(model, policy)
        with kernels.preferring(kernel):
            approx(torch.randn(9, 12)).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(step("triton"), step("reference"))
    assert launches


@pytest.mark.parametrize(
    ("version", "match"),
    [(None, "Triton is not installed: the reference"), ("2.1.0", r"Triton 2\.1\.0 is older than 3\.3")],
)
def test_without_a_triton_that_will_do_the_reference_goes_on(
    version: str | None, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = None
    if version is not None:
        fake = types.ModuleType("triton")
        fake.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "triton", fake)
    with pytest.warns(fx_approx.KernelWarning, match=match):
        assert not kernels.prefer("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("linear", Role.OUTPUT, "cuda", torch.float32) == "reference"
        ops.linear(torch.randn(2, 4), torch.randn(3, 4), selection=Selection(torch.tensor([[1]]), None))


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels: expected 'reference' or 'triton', got 'cutlass'"):
        kernels.prefer("cutlass")
