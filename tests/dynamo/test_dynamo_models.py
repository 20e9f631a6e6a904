"""Models of the libraries that people use, through the Dynamo frontend; built from a configuration, without weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform

# Dynamo looks at it on the tensors that it resumes with.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

VALUE = Uniform(0.5)
Made = tuple[nn.Module, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


_SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}


def tokens() -> Tensor:
    return torch.randint(2, 100, (4, 16))


def bert() -> Made:
    library = transformers()
    model = library.BertForSequenceClassification(library.BertConfig(vocab_size=100, **_SIZES))
    mask = torch.ones(4, 16, dtype=torch.long)
    return model, {"input_ids": tokens(), "attention_mask": mask, "labels": torch.randint(0, 2, (4,))}


def gpt2() -> Made:
    library = transformers()
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    inputs = tokens()
    return library.GPT2LMHeadModel(library.GPT2Config(vocab_size=100, **sizes)), {"input_ids": inputs, "labels": inputs}


def llama() -> Made:
    library = transformers()
    config = library.LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **_SIZES)
    inputs = tokens()
    return library.LlamaForCausalLM(config), {"input_ids": inputs, "labels": inputs}


def vit() -> Made:
    library = transformers()
    model = library.ViTForImageClassification(library.ViTConfig(image_size=32, patch_size=8, **_SIZES))
    return model, {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 2, (4,))}


def timm_resnet() -> Made:
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet10t", num_classes=10), {"x": torch.randn(4, 3, 64, 64)}


def timm_vit() -> Made:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=2)
    return model, {"x": torch.randn(4, 3, 64, 64)}


# A layer that must be sampled, with how many rows of its weight its readers leave out: whole heads, hidden units.
CASES: list[tuple[Callable[[], Made], str, str | None]] = [
    (bert, "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.attention.self.query"),
    (gpt2, "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"),
    (llama, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.k_proj"),
    (vit, "vit.layers.0.mlp.fc2", "vit.layers.0.mlp.fc1"),
    (timm_resnet, "layer2.0.conv2", "layer2.0.conv1"),
    (timm_vit, "blocks.0.attn.proj", "blocks.0.attn.qkv"),
]


def quick(cases: list[Any], *makers: Callable[[], Made]) -> list[Any]:
    """The cases by name, those of other makers with ``-m slow``."""
    marks = [() if case[0] in makers else pytest.mark.slow for case in cases]
    return [pytest.param(*case, id=case[0].__name__, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def without_dropout(model: nn.Module) -> nn.Module:
    """Masks of hoisted graphs have another shape; and configuration objects hold some rates."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradients of all parameters."""
    model.zero_grad()
    result = call(**inputs)
    loss: Tensor = result.loss if hasattr(result, "loss") else result.square().mean()
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("make", "sampled", "narrowed"), quick(CASES, llama))
def test_training_samples_by_module_path_and_hoisting_changes_no_number(
    make: Callable[[], Made], sampled: str, narrowed: str | None
) -> None:
    model, inputs = make()
    without_dropout(model.double().train())
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    state = copy.deepcopy(model.state_dict())
    found = []
    for demand in (True, False):
        torch._dynamo.reset()
        model.load_state_dict(state)
        backend = fx_approx.backend(VALUE, inner="eager", prune_unread=demand)
        compiled = torch.compile(model, backend=backend)
        found.append([step(model, compiled, inputs) for _ in range(2)])
        report = backend.report()
        assert report[sampled].samples
        if narrowed is not None:
            assert (report[narrowed].demanded > 0) == demand
    for (loss, ours), (other, theirs) in zip(*found, strict=True):
        assert torch.isfinite(loss)
        torch.testing.assert_close(loss, other)
        # Llama's normalisation, and the loss of language models, compute in float32 whatever the model's type.
        rounding = 1e-10 if loss.dtype == torch.float64 else 1e-6
        largest = max(float(g.abs().max()) for g in theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * largest)


@pytest.mark.parametrize("make", quick([(make,) for make, _, _ in CASES]))
def test_ratio_one_is_bitwise_the_inner_backend_and_evaluation_is_exact(make: Callable[[], Made]) -> None:
    model, inputs = make()
    twin = copy.deepcopy(model)
    ours = torch.compile(model, backend=fx_approx.backend(Uniform(1.0, scope="layer"), inner="aot_eager"))
    theirs = torch.compile(twin, backend="aot_eager")
    found = []
    for one, call in ((model, ours), (twin, theirs)):
        torch.manual_seed(1)  # dropout
        found.append(step(one, call, inputs))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))
    torch._dynamo.reset()
    sampling = torch.compile(model.eval(), backend=fx_approx.backend(VALUE, inner="aot_eager"))
    with torch.no_grad():
        outputs = sampling(**inputs), torch.compile(twin.eval(), backend="aot_eager")(**inputs)
    values = [result.logits if hasattr(result, "logits") else result for result in outputs]
    assert torch.equal(*values)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make for make, _, _ in CASES])
def test_training_with_inductor_gives_finite_gradients(make: Callable[[], Made]) -> None:
    model, inputs = make()
    backend = fx_approx.backend(VALUE)
    compiled = torch.compile(model.train(), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            loss, gradients = step(model, compiled, inputs)
            assert torch.isfinite(loss)
            assert all(torch.isfinite(g).all() for g in gradients)
    assert backend.report().totals.saved > 0.4


def adapted() -> Made:
    """The names of Dynamo go through ``__dict__`` here, since the wrapper has a ``__getattr__``."""
    peft = pytest.importorskip("peft")
    model, inputs = llama()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return peft.get_peft_model(model, settings), inputs


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers by its old name
def test_a_model_with_adapters_is_sampled() -> None:
    model, inputs = adapted()
    backend = fx_approx.backend(VALUE, inner="eager")
    step(model.train(), torch.compile(model, backend=backend), inputs)
    report = backend.report()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {row.name for row in report.rows if row.samples} == set(linears)
    assert report["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"].samples


def _checkpointing(model: Any) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "make", [timm_vit, *(pytest.param(one, marks=pytest.mark.slow) for one in (llama, bert, gpt2, vit, timm_resnet))]
)
def test_checkpointing_of_the_library_changes_no_gradient(make: Callable[[], Made]) -> None:
    model, inputs = make()
    without_dropout(model.train())
    state = copy.deepcopy(model.state_dict())
    found, sampled = [], []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model.load_state_dict(state)
        if checkpointed:
            _checkpointing(model)
        backend = fx_approx.backend(VALUE, inner="eager")
        found.append(step(model, torch.compile(model, backend=backend), inputs))
        sampled.append(sum(1 for row in backend.report().rows if row.samples))
    assert sampled[0] == sampled[1] > 4
    torch.testing.assert_close(found[1], found[0])
