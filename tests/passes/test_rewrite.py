"""The rewritten model: the same parameters under the same names, exact where promised, sampled where planned."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.sampling import SAMPLERS
from tests.helpers.models import (
    ZOO,
    AuxiliaryHead,
    CalledTwice,
    Checkpointed,
    Cnn,
    Tied,
    loss_of,
    mlp,
    same,
    tensors,
    train_step,
)
from tests.helpers.quick import thinned

TOPK, RANDOM = Uniform(0.5, scores="online"), Uniform(0.5, "systematic", scores="online")


def transformed(model: nn.Module, policy: Any = TOPK, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model, policy, **options)


@pytest.mark.parametrize("place, name", thinned(enumerate(ZOO)))
def test_parameters_are_those_of_the_model_and_evaluation_and_ratio_one_are_exact(place: int, name: str) -> None:
    """Bitwise, with one of the samplers for each model, and all of them for one model."""
    build, inputs = ZOO[name]
    model, x = build(), inputs()
    for sampler in SAMPLERS if place == 0 else [sorted(SAMPLERS)[place % len(SAMPLERS)]]:
        whole = transformed(build(), Uniform(1.0, sampler, scores="online"))
        exact = build()
        exact.load_state_dict(whole.state_dict())
        assert same(train_step(whole, x), train_step(exact, x))
    approx = transformed(model, RANDOM)
    assert list(approx.state_dict()) == list(model.state_dict())
    assert [(n, id(p)) for n, p in approx.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in approx.named_buffers()] == [(n, id(b)) for n, b in model.named_buffers()]
    assert [n for n, _ in approx.named_modules()] == [n for n, _ in model.named_modules()]
    assert isinstance(approx, type(model))
    for path, module in model.named_modules():
        assert isinstance(approx.get_submodule(path), type(module))
        assert approx.get_submodule(path).training == module.training
    model.eval(), approx.eval()
    assert same(train_step(approx, x), train_step(model, x))
    assert fx_approx.sampler_state_dict(approx)["step"] == 0


def chosen(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices.sort().values


def topk_linear(x: Tensor, layer: nn.Linear, ratio: float) -> Tensor:
    with torch.no_grad():
        index = chosen(x.flatten(0, -2).norm(dim=0) * layer.weight.norm(dim=0), round(ratio * x.shape[-1]))
    return x[..., index] @ layer.weight[:, index].T + layer.bias


def topk_conv(x: Tensor, layer: nn.Conv2d, ratio: float) -> Tensor:
    groups, outputs = [], layer.out_channels // layer.groups
    for group, part in enumerate(x.chunk(layer.groups, 1)):
        weight = layer.weight[group * outputs : (group + 1) * outputs]
        with torch.no_grad():
            scores = part.transpose(0, 1).flatten(1).norm(dim=1) * weight.transpose(0, 1).flatten(1).norm(dim=1)
            index = chosen(scores, max(1, round(ratio * part.shape[1])))
        groups.append(F.conv2d(part[:, index], weight[:, index], None, layer.stride, layer.padding))
    out = torch.cat(groups, 1)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def topk_cnn(model: Cnn, x: Tensor) -> Tensor:
    """``Cnn`` with every product but the depthwise one written out with a TopK sample of half its channels."""
    x = F.relu(model.bn1(topk_conv(x, model.conv1, 2 / 3)))  # floor(0.5 * 3 + 0.5) = 2 of 3
    x = x + F.relu(model.bn2(topk_conv(x, model.conv2, 0.5)))
    x = model.depthwise(F.relu(topk_conv(x, model.grouped, 0.5)))
    return topk_linear(model.drop(x.mean((2, 3))), model.fc, 0.5)


def test_gradients_equal_those_of_a_hand_written_sampled_network() -> None:
    model = Cnn().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    approx = fx_approx.transform(model, TOPK)
    outputs, grads = train_step(approx, x)
    input_grad, x.grad = x.grad, None
    model.zero_grad()
    torch.manual_seed(1)
    expected = topk_cnn(model, x)
    loss_of(expected).backward()
    torch.testing.assert_close(outputs[0], expected.detach())
    torch.testing.assert_close(input_grad, x.grad)
    for name, parameter in model.named_parameters():
        if name.startswith("unused"):
            assert grads[name] is None
        else:
            torch.testing.assert_close(grads[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_zero_outside_the_sample_and_a_layer_in_eval_is_exact() -> None:
    model, x = mlp(), torch.randn(6, 12)
    approx = fx_approx.transform(model, TOPK)
    _, grads = train_step(approx, x)
    assert int((grads["2.weight"] != 0).any(0).sum()) <= 8
    assert grads["0.weight"].shape == (16, 12) and int((grads["0.weight"] != 0).any(0).sum()) == 6
    approx[2].eval()
    expected = topk_linear(model[2](topk_linear(x, model[0], 0.5).relu()).relu(), model[4], 0.5)
    torch.testing.assert_close(approx(x), expected)


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    approx = fx_approx.transform(model, TOPK)
    assert approx.decoder.weight is approx.embedding.weight is model.embedding.weight
    assert copy.deepcopy(approx).decoder.weight is not model.decoder.weight
    twin = copy.deepcopy(approx)
    assert twin.decoder.weight is twin.embedding.weight


def test_a_module_called_twice_is_two_sites() -> None:
    model, x = CalledTwice(), torch.randn(6, 16)
    plan = fx_approx.explain(model, TOPK).plan
    assert [decision.name for decision in plan] == ["fc", "fc#2", "head"]
    second_exact = fx_approx.transform(model, Override({"fc#2": Exact(), "head": Exact()}, TOPK))
    expected = model.head(model.fc(topk_linear(x, model.fc, 0.5).relu()).relu())
    torch.testing.assert_close(second_exact(x), expected)
    both = fx_approx.transform(model, Override({"head": Exact()}, TOPK))
    expected = model.head(topk_linear(topk_linear(x, model.fc, 0.5).relu(), model.fc, 0.5).relu())
    torch.testing.assert_close(both(x), expected)


def test_two_forwards_before_one_backward() -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    one, two = torch.randn(6, 12), torch.randn(6, 12)
    first, second = train_step(approx, one)[1], train_step(approx, two)[1]
    fx_approx.load_sampler_state_dict(approx, {"step": 0, "selection_interval": 1, "seed": 0})
    approx.zero_grad()
    outputs = approx(one), approx(two)
    (loss_of(outputs[0]) + loss_of(outputs[1])).backward()
    for name, parameter in approx.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name])


@pytest.mark.parametrize("change", ["ratio", "enabled", "eval"])
def test_a_change_between_forward_and_backward_leaves_the_sample_taken(change: str) -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    x = torch.randn(6, 12)
    _, expected = train_step(approx, x)
    fx_approx.load_sampler_state_dict(approx, {"step": 0, "selection_interval": 1, "seed": 0})
    approx.zero_grad()
    output = approx(x)
    if change == "ratio":
        fx_approx.set_sampling(approx, 0.25)
    elif change == "enabled":
        fx_approx.set_sampling(approx, enabled=False)
    else:
        approx.eval()
    loss_of(output).backward()
    assert same({name: p.grad for name, p in approx.named_parameters()}, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_layers(when: str) -> None:
    model, x = mlp(), torch.randn(6, 12)
    _, full = train_step(transformed(model), x)
    if when == "before":
        model[2].requires_grad_(False)
    approx = fx_approx.transform(model, TOPK)
    model[2].requires_grad_(False)
    _, grads = train_step(approx, x)
    assert grads["2.weight"] is None and grads["2.bias"] is None
    assert all(same(grads[name], full[name]) for name in full if not name.startswith("2."))


def test_direct_calls_slices_and_replacements_of_layers() -> None:
    model, x = Cnn(), torch.randn(4, 8)
    approx = fx_approx.transform(model, TOPK)
    torch.testing.assert_close(approx.fc(x), topk_linear(x, model.fc, 0.5))
    approx.fc.eval()
    assert torch.equal(approx.fc(x), model.fc(x))
    model, x = mlp(), torch.randn(6, 12)
    approx = fx_approx.transform(model, Override({"4": Exact()}, TOPK))
    torch.testing.assert_close(approx[:2](x), topk_linear(x, model[0], 0.5).relu())
    approx[4] = nn.Linear(16, 2)  # fine-tuning replaces the head after the transform
    assert approx(x).shape == (6, 2)


def test_a_direct_call_of_a_random_sublayer_draws() -> None:
    model, x = Checkpointed(None), torch.randn(4, 16)
    with pytest.warns(fx_approx.errors.CaptureWarning, match=r"self\.calls"):
        approx = fx_approx.transform(model, RANDOM)
    assert not torch.equal(approx.block(x), approx.block(x))
    approx.eval()
    assert torch.equal(approx.block(x), model.block(x))


class Twice:
    """A forward hook that counts and doubles the output."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return 2 * output


def test_hooked_and_parametrised_layers_stay_exact_with_that_reason_and_hooks_run() -> None:
    model, hook, x = mlp(), Twice(), torch.randn(6, 12)
    model[2].register_forward_hook(hook)
    approx = fx_approx.transform(model, TOPK)
    expected = topk_linear((2 * model[2].forward(topk_linear(x, model[0], 0.5).relu())).relu(), model[4], 0.5)
    torch.testing.assert_close(approx(x), expected)
    assert hook.calls == 1
    assert "hook" in fx_approx.report(approx)["2"].reason
    # So do parametrised ones.
    build, inputs = ZOO["normed"]
    model, x = build(), inputs()
    approx = fx_approx.transform(model, TOPK)
    expected = topk_linear(model[1](topk_linear(x, model[0], 0.5)), model[2], 0.5)
    torch.testing.assert_close(approx(x), expected)
    assert "parametrised" in fx_approx.report(approx)["1"].reason


@pytest.mark.parametrize(
    "register",
    ["register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_every_kind_of_hook_runs(register: str) -> None:
    model, calls = mlp(), []
    getattr(model[2], register)(lambda *args: calls.append(len(args)))
    getattr(model, register)(lambda *args: calls.append(len(args)))
    train_step(model, torch.randn(6, 12, requires_grad=True))
    expected, calls[:] = list(calls), []
    train_step(fx_approx.transform(model, TOPK), torch.randn(6, 12, requires_grad=True))
    assert calls == expected and len(calls) == 2


def test_a_hook_on_a_container_runs_and_is_reported() -> None:
    model, hook, x = Checkpointed(None), Twice(), torch.randn(6, 12)
    model.block.register_forward_hook(hook)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="block: has hooks"):
        approx = fx_approx.transform(model, TOPK)
    hidden = topk_linear(x, model.stem, 0.5)
    inner = topk_linear(topk_linear(hidden, model.block.fc1, 0.5).relu(), model.block.fc2, 0.5)
    torch.testing.assert_close(approx(x), topk_linear((2 * (hidden + inner)).relu(), model.head, 0.5))
    assert hook.calls == 1


def test_hooks_registered_later_run_on_sampled_layers() -> None:
    approx, hook, x = fx_approx.transform(mlp(), TOPK), Twice(), torch.randn(6, 12)
    before = approx(x)
    handle = approx[4].register_forward_hook(hook)
    assert torch.equal(approx(x), 2 * before) and hook.calls == 1
    handle.remove()
    handle = approx[0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert torch.equal(approx(x)[0], approx(x)[1]), "the input is all zero"
    handle.remove()
    assert torch.equal(approx(x), before)


def test_restore_gives_the_exact_model_back() -> None:
    model, x = AuxiliaryHead(), torch.randn(6, 12)
    back = fx_approx.restore(fx_approx.transform(model, TOPK))
    assert type(back) is AuxiliaryHead and type(back.body) is nn.Linear
    assert [id(p) for p in back.parameters()] == [id(p) for p in model.parameters()]
    assert same(train_step(back, x), train_step(model, x))
    assert same(tensors(fx_approx.transform(back, TOPK).eval()(x)), tensors(model.eval()(x)))
