"""Models of Hugging Face transformers from small configurations, without pretrained weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _models import torchvision_models
from _zoo_run import Entry, Made, settle
from torch import Tensor, nn

_VOCABULARY = 96
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER = {**_SIZES, "vocab_size": _VOCABULARY, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}


def _library() -> Any:
    torchvision_models()  # transformers imports torchvision where it is installed
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(3, _VOCABULARY, (2, length))


def _images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def _made(model: nn.Module, **keywords: Any) -> Made:
    return Made(settle(model), keywords=keywords)


def bert() -> Made:
    """BERT for classification."""
    library = _library()
    model = library.BertForSequenceClassification(library.BertConfig(vocab_size=_VOCABULARY, **_SIZES))
    mask = torch.ones(2, 12, dtype=torch.long)
    return _made(model, input_ids=_tokens(), attention_mask=mask, labels=torch.tensor([0, 1]))


def bert_checkpointed() -> Made:
    """The same with gradient checkpointing, which the oracle does without."""
    made = bert()
    plain = copy.deepcopy(made.model)
    model: Any = made.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Made(model, keywords=made.keywords, plain=plain)


def gpt2() -> Made:
    """GPT-2 as a language model."""
    library = _library()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    config = library.GPT2Config(vocab_size=_VOCABULARY, use_cache=False, **sizes)
    tokens = _tokens()
    return _made(library.GPT2LMHeadModel(config), input_ids=tokens, labels=tokens)


def _decoder(name: str, **options: Any) -> nn.Module:
    library = _library()
    config = getattr(library, f"{name}Config")(**{**_DECODER, **options})
    made: nn.Module = getattr(library, f"{name}ForCausalLM")(config)
    return made


def _language_model(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        tokens = _tokens()
        return _made(_decoder(name, **options), input_ids=tokens, labels=tokens)

    return make


def llama_lora() -> Made:
    """Llama with LoRA adapters of PEFT on its projections."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    tokens = _tokens()
    return _made(peft.get_peft_model(_decoder("Llama"), config), input_ids=tokens, labels=tokens)


def vit() -> Made:
    """ViT for classification."""
    library = _library()
    model = library.ViTForImageClassification(library.ViTConfig(image_size=32, patch_size=8, **_SIZES))
    return _made(model, pixel_values=_images(), labels=torch.tensor([0, 1]))


def t5() -> Made:
    """T5, encoder and decoder."""
    library = _library()
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    config = library.T5Config(vocab_size=_VOCABULARY, use_cache=False, **sizes)
    return _made(library.T5ForConditionalGeneration(config), input_ids=_tokens(), labels=_tokens(8))


def clip() -> Made:
    """CLIP, both towers and its loss."""
    library = _library()
    text = {**_SIZES, "vocab_size": _VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**_SIZES, "image_size": 32, "patch_size": 8}
    config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    tokens = _tokens()
    tokens[:, -1] = 2
    return _made(library.CLIPModel(config), input_ids=tokens, pixel_values=_images(), return_loss=True)


def wav2vec2() -> Made:
    """Wav2Vec2 for classification of sounds."""
    library = _library()
    config = library.Wav2Vec2Config(
        **_SIZES,
        conv_dim=(32, 32, 32),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        layerdrop=0.0,
        classifier_proj_size=32,
    )
    model = library.Wav2Vec2ForSequenceClassification(config)
    return _made(model, input_values=torch.randn(2, 640, dtype=torch.float64), labels=torch.tensor([0, 1]))


def swin() -> Made:
    """Swin for classification."""
    library = _library()
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    config = library.SwinConfig(window_size=4, **sizes)
    return _made(library.SwinForImageClassification(config), pixel_values=_images(), labels=torch.tensor([0, 1]))


def convnext() -> Made:
    """ConvNeXt for classification."""
    library = _library()
    config = library.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
    model = library.ConvNextForImageClassification(config)
    return _made(model, pixel_values=_images(64), labels=torch.tensor([0, 1]))


def segformer() -> Made:
    """SegFormer for segmentation."""
    library = _library()
    config = library.SegformerConfig(
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=32
    )
    model = library.SegformerForSemanticSegmentation(config)
    return _made(model, pixel_values=_images(64), labels=torch.randint(0, 2, (2, 64, 64)))


def deberta() -> Made:
    """DeBERTa for classification, with its relative positions."""
    library = _library()
    config = library.DebertaV2Config(
        **_SIZES,
        vocab_size=_VOCABULARY,
        relative_attention=True,
        max_relative_positions=8,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=32,
    )
    model = library.DebertaV2ForSequenceClassification(config)
    return _made(model, input_ids=_tokens(), labels=torch.tensor([0, 1]))


def _mixtral(how: str) -> Callable[[], Made]:
    def make() -> Made:
        tokens = _tokens()
        model: Any = _decoder("Mixtral", **_EXPERTS)
        model.set_experts_implementation(how)  # the default is one grouped product, which torch has not in float64
        return _made(model, input_ids=tokens, labels=tokens)

    return make


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MODELS: dict[str, Callable[[], Made]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama_gqa": _language_model("Llama"),
    "vit": vit,
    "t5": t5,
    "mixtral": _mixtral("eager"),
    "mixtral_batched": _mixtral("batched_mm"),
    "clip": clip,
    "wav2vec2": wav2vec2,
    "swin": swin,
    "convnext": convnext,
    "segformer": segformer,
    "deberta": deberta,
    "qwen2": _language_model("Qwen2"),
    "mistral": _language_model("Mistral", sliding_window=8),
    "bert_checkpointed": bert_checkpointed,
    "llama_lora": llama_lora,
}


def transformer_entries() -> list[Entry]:
    """All models of this module."""
    return [Entry(f"{name}-hf", "transformers", make, compiled=True) for name, make in _MODELS.items()]
