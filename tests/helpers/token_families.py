"""Transformers of every family, small and random, each with the way its layers see fewer tokens by hand.

By hand means by the model's own layers: hooks hand them the chosen tokens of all that they are called with, the first
layer excepted, and with ``skips`` the last one, behind which the tokens are put back into their places. A row is one
family; what a layer reads that is no argument of it is gathered by the row's ``inner``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import timm
import timm.models
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fx_approx.policies import Tokens
from tests.helpers.torchvision_compat import import_torchvision

POLICY = Tokens(0.5, per_example=False, padding="ignore")
"""One selection for all examples, as the hooks hand it to the layers."""

BATCH, LENGTH, PATCHES, WIDTH = 2, 12, 16, 24
Layers = Callable[[Any], Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


IDS = torch.randint(3, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, 9:] = 0
TEXT = {"input_ids": IDS, "attention_mask": PADDED}
PIXELS = _random(BATCH, 3, 32, 32)


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        make: The model.
        inputs: What it is called with, by keyword.
        layers: Its layers, in order.
        length: Tokens of an example.
        skips: The tokens come back behind the layers but the last; else they stay away.
        frontends: Those that capture it: ``t`` for transform, ``b`` for the backend.
        axis: Of the tokens in what a layer is called with.
        inner: A context in which what ``layer`` reads beside its arguments is that of the tokens ``index``.
        from_end: An argument of the layers, a longer table of which they read the last positions.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    layers: Layers
    length: int
    skips: bool
    frontends: str = "tb"
    axis: int = 1
    inner: Callable[[nn.Module, Tensor], contextlib.AbstractContextManager[None]] | None = None
    from_end: str = ""


def result_of(output: Any) -> Tensor:
    """What a model computes: its loss, if there is one, beside the rest."""
    if isinstance(output, Tensor):
        return output
    found = [output[name] for name in ("loss", "logits", "last_hidden_state") if output.get(name) is not None]
    return torch.cat([one.flatten() for one in found])


def taken(value: Any, index: Tensor, length: int) -> Any:
    """The chosen tokens along every axis that is as long as the sequence."""
    if isinstance(value, (tuple, list)):
        return type(value)(taken(one, index, length) for one in value)
    if not isinstance(value, Tensor):
        return value
    for axis, size in enumerate(value.shape):
        value = value.index_select(axis, index) if size == length else value
    return value


def leave_out(family: Family, model: nn.Module, index: Tensor) -> None:
    """Has all layers but the first (and with ``skips`` the last) of ``model`` see the tokens ``index`` only."""
    layers = list(family.layers(model))
    last = len(layers) - 2 if family.skips else len(layers) - 1
    whole: list[Tensor] = []
    biases: list[Any] = []
    opened: list[Any] = []

    def before(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if number == 1:
                whole.append(states)
                states = states.index_select(family.axis, index)
            ends = {name: value[..., -family.length :] for name, value in kwargs.items() if name == family.from_end}
            rest = {name: taken(value, index, family.length) for name, value in {**kwargs, **ends}.items()}
            if not args:
                rest["hidden_states"] = states
            if family.inner is not None:
                opened.append(family.inner(module, index))
                opened[-1].__enter__()
            return (states, *taken(args[1:], index, family.length)) if args else args, rest

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    def back(module: nn.Module, args: Any, output: Any) -> Any:
        part = output[0] if isinstance(output, tuple) else output
        found = whole[-1].index_copy(family.axis, index, part)
        return (found, *biases, *output[1 + len(biases) :]) if isinstance(output, tuple) else found

    def first(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            biases.extend(one for one in output[1:2] if isinstance(one, Tensor))

    layers[0].register_forward_hook(first)
    for layer in layers[1 : last + 1]:
        layer.register_forward_pre_hook(before(layers.index(layer)), with_kwargs=True)
        if family.inner is not None:
            layer.register_forward_hook(after)
    if family.skips:
        layers[last].register_forward_hook(back)


# torch


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` on vectors."""

    def __init__(self, causal: bool = False, pooled: bool = False, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, **options)
        self.embed, self.causal, self.pooled = nn.Linear(5, WIDTH), causal, pooled
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        mask = self.mask if self.causal else None
        x = self.encoder(self.embed(x), mask=mask, src_key_padding_mask=hidden, is_causal=self.causal)
        return x.mean(1) if self.pooled else x


class AttentionStack(nn.Module):
    """``nn.MultiheadAttention`` in residual blocks; ``weights`` asks for them, so that torch writes it out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(_AttentionBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class _AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + self.attention(y, y, y, need_weights=False)[0]
        return result


# A diffusion transformer


class Diffusion(nn.Module):
    """DiT (Peebles and Xie, 2023): time steps modulate every layer, and the patches become an image again."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, WIDTH, 8, 8), nn.Parameter(torch.randn(1, PATCHES, WIDTH))
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(_Modulated() for _ in range(4))
        self.norm, self.shifts = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, 3 * 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        c = self.time(t[:, None])
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.shifts(F.silu(c)).chunk(2, dim=1)
        x = self.out(self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        side = int(x.shape[1] ** 0.5)
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], side, side, 8, 8, 3))
        return x.reshape(x.shape[0], 3, side * 8, side * 8)


class _Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = timm.layers.Attention(WIDTH, 2, qkv_bias=True), timm.layers.Mlp(WIDTH, 32)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = [part.unsqueeze(1) for part in self.modulation(F.silu(c)).chunk(6, dim=1)]
        x = x + parts[2] * self.attention(self.norms[0](x) * (1 + parts[1]) + parts[0])
        result: Tensor = x + parts[5] * self.mlp(self.norms[1](x) * (1 + parts[4]) + parts[3])
        return result


# timm


def _timm(kind: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 4, "num_heads": 2, "num_classes": 5}
    return lambda: getattr(timm.models, kind)(**{**sizes, **options})


@contextlib.contextmanager
def _own_bias(block: Any, index: Tensor) -> Iterator[None]:
    """BEiT: every attention gathers a bias from a table of its own."""
    attention, usual = block.attn, block.attn._get_rel_pos_bias
    attention._get_rel_pos_bias = lambda: usual()[..., index, :][..., index]
    yield
    del attention._get_rel_pos_bias


@contextlib.contextmanager
def _rotary_patches(block: Any, index: Tensor) -> Iterator[None]:
    """EVA-02: the table of rotations has no entry for the class token."""
    patches, usual = index[1:] - 1, block.attn.forward
    block.attn.forward = lambda x, rope=None, **rest: usual(x, rope=rope[..., patches, :], **rest)
    yield
    del block.attn.forward


def _vit() -> nn.Module:
    vit = import_torchvision().models.VisionTransformer
    made: nn.Module = vit(32, 8, num_layers=4, num_heads=2, hidden_dim=WIDTH, mlp_dim=32, num_classes=5)
    nn.init.normal_(made.heads.head.weight)  # it begins with zeros
    return made


# transformers


def _hugging(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


_BODY = {"num_hidden_layers": 4, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 32}
_BERT = {**_BODY, "vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGE = {**_BERT, "image_size": 32, "patch_size": 8}
_IMAGE.pop("vocab_size")
_LLAMA = {**_BODY, "vocab_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
_LLAMA = {**_LLAMA, "max_position_embeddings": 32, "head_dim": 6}
_GPT2 = {"n_layer": 4, "n_embd": WIDTH, "n_head": 2, "vocab_size": 50, "n_positions": 32, "use_cache": False}
_GPT2 = {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 50, "d_model": WIDTH, "d_kv": 6, "d_ff": 32, "num_layers": 4, "num_heads": 4, "dropout_rate": 0.0}
_SPEECH = {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_SPEECH = {**_SPEECH, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "apply_spec_augment": False}
_SPEECH = {**_SPEECH, **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), 0.0)}
_SPEECH = {
    **_SPEECH,
    **dict.fromkeys(("feat_proj_dropout", "final_dropout", "layerdrop"), 0.0),
    **_BODY,
    "vocab_size": 50,
}
_WHISPER = {"num_mel_bins": 8, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "dropout": 0.0}
_WHISPER = {**_WHISPER, "d_model": WIDTH, "max_source_positions": 20, "classifier_proj_size": 8, "vocab_size": 50}
_WHISPER = {**_WHISPER, **dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))}
_BLOCKS: Layers = lambda m: m.blocks  # noqa: E731
_MODEL: Layers = lambda m: m.model.layers  # noqa: E731
_ENCODER: Layers = lambda m: m.encoder.layers  # noqa: E731

FAMILIES: dict[str, Family] = {
    "encoder": Family(lambda: Encoder(batch_first=True), {"x": _random(BATCH, LENGTH, 5)}, _ENCODER, LENGTH, True),
    "encoder_positions_first": Family(
        lambda: Encoder(norm_first=True), {"x": _random(LENGTH, BATCH, 5)}, _ENCODER, LENGTH, True, axis=0
    ),
    "encoder_causal": Family(
        lambda: Encoder(True, batch_first=True), {"x": _random(BATCH, LENGTH, 5)}, _ENCODER, LENGTH, True
    ),
    "encoder_padding": Family(
        lambda: Encoder(batch_first=True, pooled=True),
        {"x": _random(BATCH, LENGTH, 5), "hidden": PADDED == 0},
        _ENCODER,
        LENGTH,
        False,
    ),
    "multi_head_attention": Family(AttentionStack, {"x": _random(BATCH, LENGTH, 5)}, _BLOCKS, LENGTH, False),
    "diffusion": Family(Diffusion, {"x": PIXELS, "t": _random(BATCH)}, _BLOCKS, PATCHES, True),
    "torchvision_vit": Family(_vit, {"x": PIXELS}, lambda m: m.encoder.layers, PATCHES + 1, False),
    "timm_vit": Family(_timm("VisionTransformer"), {"x": PIXELS}, _BLOCKS, PATCHES + 1, False),
    "timm_vit_mean": Family(
        _timm("VisionTransformer", global_pool="avg", class_token=False), {"x": PIXELS}, _BLOCKS, PATCHES, False
    ),
    "timm_deit": Family(_timm("VisionTransformerDistilled"), {"x": PIXELS}, _BLOCKS, PATCHES + 2, False),
    "timm_beit": Family(
        _timm("Beit", use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
        {"x": PIXELS},
        _BLOCKS,
        PATCHES + 1,
        False,
        inner=_own_bias,
    ),
    "timm_beit_shared": Family(
        _timm("Beit", use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1),
        {"x": PIXELS},
        _BLOCKS,
        PATCHES + 1,
        False,
    ),
    "timm_dinov2": Family(
        _timm("VisionTransformer", reg_tokens=4, init_values=0.1, no_embed_class=True),
        {"x": PIXELS},
        _BLOCKS,
        PATCHES + 5,
        False,
    ),
    "timm_eva02": Family(
        _timm("Eva", qkv_fused=False, use_rot_pos_emb=True, swiglu_mlp=True),
        {"x": PIXELS},
        _BLOCKS,
        PATCHES + 1,
        False,
        inner=_rotary_patches,
    ),
    "bert": Family(
        _hugging("BertForSequenceClassification", "BertConfig", **_BERT),
        {**TEXT, "labels": torch.tensor([0, 1])},
        lambda m: m.bert.encoder.layer,
        LENGTH,
        False,
        "b",
    ),
    "bert_written_out": Family(
        _hugging("BertForSequenceClassification", "BertConfig", **_BERT, attn_implementation="eager"),
        TEXT,
        lambda m: m.bert.encoder.layer,
        LENGTH,
        False,
        "b",
    ),
    "bert_masked_loss": Family(
        _hugging("BertForMaskedLM", "BertConfig", **_BERT),
        {**TEXT, "labels": IDS.where(PADDED > 0, -100)},
        lambda m: m.bert.encoder.layer,
        LENGTH,
        True,
        "b",
    ),
    "roberta": Family(
        _hugging("RobertaForSequenceClassification", "RobertaConfig", **_BERT),
        TEXT,
        lambda m: m.roberta.encoder.layer,
        LENGTH,
        False,
    ),
    "vit": Family(
        _hugging("ViTForImageClassification", "ViTConfig", **_IMAGE),
        {"pixel_values": PIXELS},
        lambda m: m.vit.layers,
        PATCHES + 1,
        False,
    ),
    "deit": Family(
        _hugging("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_IMAGE),
        {"pixel_values": PIXELS},
        lambda m: m.deit.layers,
        PATCHES + 2,
        False,
    ),
    "dinov2_registers": Family(
        _hugging("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **_IMAGE),
        {"pixel_values": PIXELS},
        lambda m: m.dinov2_with_registers.encoder.layer,
        PATCHES + 5,
        False,
    ),
    "gpt2": Family(
        _hugging("GPT2LMHeadModel", "GPT2Config", **_GPT2),
        {"input_ids": IDS},
        lambda m: m.transformer.h,
        LENGTH,
        True,
        "b",
    ),
    "gpt2_written_out": Family(
        _hugging("GPT2LMHeadModel", "GPT2Config", **_GPT2, attn_implementation="eager"),
        {"input_ids": IDS},
        lambda m: m.transformer.h,
        LENGTH,
        True,
        "b",
    ),
    "llama": Family(_hugging("LlamaForCausalLM", "LlamaConfig", **_LLAMA), TEXT, _MODEL, LENGTH, True, "b"),
    "llama_written_out": Family(
        _hugging("LlamaForCausalLM", "LlamaConfig", **_LLAMA, attn_implementation="eager"),
        TEXT,
        _MODEL,
        LENGTH,
        True,
        "b",
    ),
    "mistral": Family(
        _hugging("MistralForCausalLM", "MistralConfig", **_LLAMA, sliding_window=4), TEXT, _MODEL, LENGTH, True
    ),
    "qwen2": Family(_hugging("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA), TEXT, _MODEL, LENGTH, True),
    "qwen3": Family(_hugging("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA), TEXT, _MODEL, LENGTH, True),
    "mpt": Family(
        _hugging(
            "MptForCausalLM",
            "MptConfig",
            vocab_size=50,
            d_model=WIDTH,
            n_layers=4,
            n_heads=2,
            max_seq_len=32,
            use_cache=False,
        ),
        {"input_ids": IDS},
        lambda m: m.transformer.blocks,
        LENGTH,
        True,
        "b",
        from_end="position_bias",
    ),
    "t5_encoder": Family(
        _hugging("T5EncoderModel", "T5Config", **_T5), TEXT, lambda m: m.encoder.block, LENGTH, True, "b"
    ),
    "whisper": Family(
        _hugging("WhisperForAudioClassification", "WhisperConfig", **_WHISPER),
        {"input_features": _random(BATCH, 8, 40)},
        _ENCODER,
        20,
        False,
    ),
    "wav2vec2": Family(
        _hugging("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH),
        {"input_values": _random(BATCH, 60)},
        lambda m: m.wav2vec2.encoder.layers,
        13,
        True,
        "t",
    ),
}
"""By name."""


def of(frontend: str) -> list[str]:
    """Names of the families that a frontend captures."""
    return [name for name, family in FAMILIES.items() if frontend in family.frontends]


def made(name: str, seed: int = 0) -> tuple[Family, nn.Module]:
    """A family, and its model of one seed in float64, in training."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    return family, family.make().double().train()
