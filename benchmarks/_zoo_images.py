"""Models of timm and torchvision on small images, without pretrained weights."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from _models import torchvision_models
from _zoo_run import Entry, Made, settle
from _zoo_thin import thin
from torch import Tensor, nn

_TIMM: dict[str, dict[str, Any]] = {
    # ---- convolutions, a quarter as wide
    "resnet10t": {"thin": True},
    "seresnext26d_32x4d": {"thin": True},
    "resnest14d": {"thin": True},
    "densenet121": {"thin": True, "block_config": (2, 2, 2, 2)},
    "ese_vovnet19b_slim": {"thin": True},
    "dla34": {"thin": True},
    "hrnet_w18_small": {"thin": True},
    "regnety_002": {"thin": True},
    "repvgg_a0": {"thin": True},
    "efficientnet_lite0": {"thin": True},
    "mobilenetv4_conv_small": {"thin": True},
    "nf_regnet_b0": {"thin": True},
    "starnet_s1": {"thin": True},
    "hgnetv2_b0": {"thin": True},
    "gernet_s": {"thin": True},
    "selecsls42b": {"thin": True},
    # ---- convolutions, by their own options
    "skresnet18": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64)},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "ghostnet_050": {},
    "convnext_atto": {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1)},
    "convnextv2_atto": {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1)},
    "mambaout_femto": {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
    # ---- attention, mixing
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 4},
    "swin_tiny_patch4_window7_224": {"thin": True, "img_size": 56, "depths": (1, 1, 2, 1)},
    "cait_xxs24_224": {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2, "embed_dim": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "poolformer_s12": {},
    "levit_128s": {"depth": (1, 1, 1)},
    "mobilevit_xxs": {},
    "edgenext_xx_small": {},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
}
"""Options by name: those of timm, but ``thin`` (:mod:`_zoo_thin`), ``size`` of the image and ``batch``."""

_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "alexnet": {"size": 63},
    "inception_v3": {"size": 96, "init_weights": False, "aux_logits": False},
    "googlenet": {"init_weights": False},
    "shufflenet_v2_x1_0": {"thin": False},  # half of what a stage has is no multiple of four
    "shufflenet_v2_x2_0": {"thin": False},
}

_FIRST = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn"),
    *("vgg11", "vit_b_16", "wide_resnet50_2"),
)
"""Classification models of which the others are larger forms; they are tried first."""

_SEGMENTATION = (
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
_FLOW = ("raft_small", "raft_large")
_DETECTION = {"ssdlite320_mobilenet_v3_large": 96, "retinanet_resnet50_fpn": 64}


def images(size: int = 64, batch: int = 2) -> Tensor:
    """``[batch, 3, size, size]``."""
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def timm_model(name: str) -> Made:
    """A model of timm."""
    torchvision_models()  # timm imports torchvision
    import timm

    options = dict(_TIMM[name])
    batch, narrow = options.pop("batch", 2), options.pop("thin", False)
    size = options.pop("size", options.get("img_size", 224 if name.startswith("levit") else 64))
    with thin() if narrow else contextlib.nullcontext():
        model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return Made(settle(model), (images(size, batch),))


def classifier(name: str) -> Made:
    """A classification model of torchvision, a quarter as wide; the transformers among them have two blocks a stage."""
    models = torchvision_models()
    options = dict(_CLASSIFIERS.get(name, {}))
    size, narrow = options.pop("size", 64), options.pop("thin", True)
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        size = 4 * patch
        made: nn.Module = models.VisionTransformer(size, patch, 2, 4, 64, 128, num_classes=10)
    elif name.startswith("swin_"):
        version = {"block": models.swin_transformer.SwinTransformerBlockV2} if "v2" in name else {}
        if version:
            version["downsample_layer"] = models.swin_transformer.PatchMergingV2
        window = [8, 8] if version else [7, 7]
        made = models.SwinTransformer([4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], window, num_classes=10, **version)
    elif name.startswith("convnext_"):
        kind = models.convnext.CNBlockConfig
        widths = (16, 32, 48, 64)
        setting = [kind(one, after, 2) for one, after in zip(widths, (*widths[1:], None), strict=True)]
        made = models.ConvNeXt(setting, num_classes=10)
    elif name == "maxvit_t":
        made = models.MaxVit((64, 64), 16, 2, [16, 32, 48, 64], [1, 1, 1, 1], 16, 0.0, num_classes=10)
    else:
        with thin() if narrow else contextlib.nullcontext():
            made = models.get_model(name, weights=None, num_classes=10, **options)
    return Made(settle(made), (images(size),))


def segmenter(name: str) -> Made:
    """A segmentation model of torchvision, with its auxiliary head where it has one."""
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    models = torchvision_models()
    with thin():
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    return Made(settle(model), (images(64),))


def video_model(name: str) -> Made:
    """A model of torchvision for clips of four frames."""
    models = torchvision_models()
    with thin():
        model = models.get_model(name, weights=None, num_classes=10)
    return Made(settle(model), (torch.randn(2, 3, 4, 32, 32, dtype=torch.float64),))


def _coordinates(batch_size: int, h: int, w: int, device: str = "cpu") -> Tensor:
    """``[batch_size, 2, h, w]``: column and row of each position, as torchvision's own in float32."""
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack((columns, rows)).double()[None].repeat(batch_size, 1, 1, 1)


def flow_model(name: str) -> Made:
    """RAFT on a pair of images, two updates; the coordinates that it makes are float64 as all else."""
    models = torchvision_models()
    for module in (importlib.import_module(f"{models.__name__}.optical_flow.{part}") for part in ("raft", "_utils")):
        vars(module)["make_coords_grid"] = _coordinates
    model = models.get_model(name, weights=None)
    return Made(settle(model), (images(128, 1), images(128, 1)), {"num_flow_updates": 2})


def detector(name: str) -> Made:
    """A detection model of torchvision with two images and their boxes; its outputs are the losses."""
    size = _DETECTION[name]
    options: dict[str, Any] = {} if name.startswith("ssdlite") else {"min_size": size, "max_size": size}
    models = torchvision_models()
    # SSDLite asks its backbone how wide it is; the distances of RetinaNet are four for each of nine anchors.
    with contextlib.nullcontext() if name.startswith("ssdlite") else thin(36):
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [10.0, 12.0, 30.0, 50.0]], dtype=torch.float64)
    targets = [{"boxes": boxes + shift, "labels": torch.tensor([1, 3])} for shift in (0.0, 2.0)]
    return Made(settle(model), (list(images(size)), targets))


def _classifiers() -> list[str]:
    models = torchvision_models()
    names: list[str] = models.list_models(module=models)
    return sorted(names, key=lambda name: (name not in _FIRST, name))


def image_entries() -> list[Entry]:
    """All models of this module."""
    made: list[tuple[str, Any, Callable[[str], Made]]] = [
        ("timm", _TIMM, timm_model),
        ("torchvision", _classifiers(), classifier),
        ("segmentation", _SEGMENTATION, segmenter),
        ("video", _VIDEO, video_model),
        ("flow", _FLOW, flow_model),
        ("detection", _DETECTION, detector),
    ]
    return [Entry(name, family, functools.partial(make, name)) for family, names, make in made for name in names]
