"""Published classifier families as they are built without their weights: what conversion meets."""

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from archnet.teachers.load import TeacherError, load_teacher


@dataclass(frozen=True)
class Member:
    """A network of a family; ``size`` is the side of its square images in pixels.

    ``source`` and ``kwargs`` are those of `archnet.config.TeacherConfig`; there are no weights.
    """

    family: str
    name: str
    size: int = 224
    source: str = "torchvision"
    kwargs: dict[str, Any] = field(default_factory=dict)
    factory: str | None = None
    weights: str | None = None


# The heads that are there for training only would be further results.
_ONE_HEAD = {"aux_logits": False, "init_weights": True}

MEMBERS = (
    Member("ResNet", "resnet18"),
    Member("ResNet", "resnet50"),
    Member("VGG", "vgg11_bn"),
    Member("DenseNet", "densenet121"),
    Member("SqueezeNet", "squeezenet1_1"),
    Member("GoogLeNet", "googlenet", kwargs=_ONE_HEAD),
    Member("Inception", "inception_v3", 299, kwargs=_ONE_HEAD),
    Member("MobileNetV2", "mobilenet_v2"),
    Member("MobileNetV3", "mobilenet_v3_small"),
    Member("MNASNet", "mnasnet1_0"),
    Member("ShuffleNet", "shufflenet_v2_x1_0"),
    Member("RegNet", "regnet_x_400mf"),
    Member("RegNet", "regnet_y_400mf"),
    Member("EfficientNet", "efficientnet_b0"),
    Member("ConvNeXt", "convnext_tiny"),
    Member("ViT", "vit_b_16"),
    Member("Swin", "swin_t"),
    Member("Swin", "swin_v2_t"),
    Member("MaxViT", "maxvit_t"),
    Member("CIFAR ResNet", "cifar_resnet20", 32, "archnet"),
    Member("DeiT", "deit_tiny_patch16_224", 224, "timm"),
    Member("MobileNetV4", "mobilenetv4_conv_small", 224, "timm"),
    Member("EfficientFormer", "efficientformer_l1", 224, "timm"),
)


def member(name: str) -> Member:
    """The network of that name in `MEMBERS`.

    Raises:
        TeacherError: there is none.
    """
    known = {item.name: item for item in MEMBERS}
    if name not in known:
        (near,) = difflib.get_close_matches(name, known, 1, 0.0)
        raise TeacherError(f"{name} is not among {', '.join(known)}; nearest: {near}")
    return known[name]


def random_network(of: Member, *, num_classes: int = 1000, seed: int = 0) -> nn.Module:
    """A network with random weights and random batch-norm statistics, in eval mode and frozen.

    As they are built, statistics are zeros and ones and some last layers are all zeros: a fault in
    what folds them, or a network that ignores its images, would not be seen.

    Raises:
        TeacherError: there is no such network, or the extra that it needs is missing.
    """
    torch.manual_seed(seed)
    network = load_teacher(of, num_classes=num_classes, in_channels=3, image_size=of.size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            module.reset_parameters()
    return network
