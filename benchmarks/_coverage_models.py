"""The models of the coverage table: torchvision's, some of timm, detectors of the YOLO kind; in their own sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from _models import torchvision_models
from _zoo_images import classifier
from _zoo_nets import Yolo
from _zoo_run import settle
from torch import Tensor, nn

LARGE = (
    *("convnext_large", "efficientnet_v2_l", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf", "vgg11", "vgg11_bn"),
    *("vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_l_16", "vit_l_32", "vit_h_14"),
    "wide_resnet101_2",
)
"""Models of more than 100 million parameters: built a quarter as wide, since several copies are in memory at once."""

TIMM = (
    *("resnet10t", "seresnext26d_32x4d", "resnest14d", "starnet_s1", "ese_vovnet19b_slim", "dla34"),
    *("hrnet_w18_small", "regnety_002", "repvgg_a0", "efficientnet_lite0", "mobilenetv4_conv_small", "nf_regnet_b0"),
    *("hgnetv2_b0", "gernet_s", "selecsls42b", "skresnet18", "res2net50_14w_8s", "ghostnet_050", "convnextv2_atto"),
    *("mobilevit_xxs", "poolformer_s12", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
    "levit_128s",
)
_SIZES = {"inception_v3": 299, "maxvit_t": 224, "levit_128s": 224, "alexnet": 95}
_YOLO = "yolov8n"


@dataclasses.dataclass(frozen=True)
class Built:
    """A model in training mode, without dropout, no parameter zero, and a batch of two.

    Attributes:
        model: The model.
        inputs: Its input.
        classes: Channels of its output, which nothing may cut.
        thin: It is a quarter as wide as its name says.
    """

    model: nn.Module
    inputs: Tensor
    classes: int
    thin: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    family: str
    make: Callable[[], Built]


def images(size: int) -> Tensor:
    """``[2, 3, size, size]``."""
    return torch.randn(2, 3, size, size)


def classification(name: str) -> Built:
    """A classification model of torchvision."""
    models, options, size = torchvision_models(), dict[str, Any](), _SIZES.get(name, 64)
    if name.startswith("vit_"):
        size = 4 * int(name.rpartition("_")[2])
        options["image_size"] = size
    if name in LARGE:
        made = classifier(name)
        return Built(made.model.float(), made.inputs[0].float(), 10, True)
    with warnings_of_old_initialisation():
        model = settle(models.get_model(name, weights=None, **options)).float()
    return Built(model, images(size), 1000)


@contextlib.contextmanager
def warnings_of_old_initialisation() -> Any:
    """GoogLeNet and Inception warn that they will be initialised otherwise one day."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def segmentation(name: str) -> Built:
    """A segmentation model of torchvision, with its auxiliary head where it has one."""
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    made = torchvision_models().get_model(name, weights=None, weights_backbone=None, **options)
    return Built(settle(made).float(), images(64), 21)


def timm_model(name: str) -> Built:
    """A model of timm."""
    torchvision_models()  # timm imports torchvision
    import timm

    size = _SIZES.get(name, 224 if name.endswith("224") else 64)
    return Built(settle(timm.create_model(name)).float(), images(size), 1000)


def yolo() -> Built:
    """A small detector of the YOLO kind, written by hand; its head gives 4 classes and 4 x 4 bins."""
    return Built(settle(Yolo()).float(), images(64), 4)


def ultralytics_yolo() -> Built:
    """YOLOv8n of ultralytics, from its configuration."""
    torchvision_models()
    from ultralytics.nn.tasks import DetectionModel

    return Built(settle(DetectionModel(f"{_YOLO}.yaml", verbose=False)).float(), images(64), 80)


def entries() -> list[Entry]:
    """All rows; that of ultralytics where it is installed."""
    models = torchvision_models()
    made: list[tuple[str, Any, Callable[[str], Built]]] = [
        ("torchvision", models.list_models(module=models), classification),
        ("segmentation", models.list_models(module=models.segmentation), segmentation),
        ("timm", TIMM, timm_model),
    ]
    found = [Entry(name, family, functools.partial(make, name)) for family, names, make in made for name in names]
    found.append(Entry("yolo", "detection", yolo))
    if importlib.util.find_spec("ultralytics") is not None:
        found.append(Entry(_YOLO, "detection", ultralytics_yolo))
    return found
