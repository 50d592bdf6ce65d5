"""What a teacher's weights state of the images and the classes they were trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from archnet.teachers.load import TeacherError, TeacherSource, from_factory, import_timm


@dataclass(frozen=True)
class Preprocessing:
    """The keys of `task.data` that turn an image into a teacher's input.

    Attributes:
        origin: where they are stated.
        stated: whether for these weights; else for others of this network.
    """

    image_size: int | str
    resize: int | str
    interpolation: str
    mean: list[float]
    std: list[float]
    origin: str
    stated: bool


def preprocessing_of(config: TeacherSource) -> Preprocessing | None:
    """From torchvision's transforms or timm's `pretrained_cfg`; None where neither is there.

    Weights in a file are known by the name that torchvision's own files have. A factory is called:
    the network that it returns may carry a `pretrained_cfg`.

    Raises:
        TeacherError: the extra is missing, or the factory fails.
    """
    if config.source == "torchvision":
        return _of_torchvision(config)
    if config.source == "timm":
        cfg = import_timm().models.get_pretrained_cfg(config.name)
        return _of_timm(cfg, f"timm for {config.name}", config.weights == "published")
    if config.source == "custom":
        network = from_factory(config.factory or "", config.kwargs)
        cfg = getattr(network, "pretrained_cfg", None)
        return _of_timm(cfg, "the network's pretrained_cfg", config.weights is None)
    return None


def class_names_of(config: TeacherSource, network: nn.Module) -> tuple[str, ...]:
    """The names of a teacher's classes in the order of its scores; empty where nothing states them.

    torchvision states those of its own weights; a network may carry them as `config.id2label`, as
    transformers have it, or in a `pretrained_cfg` of timm.

    Args:
        config: of the teacher.
        network: the teacher.
    """
    if config.source == "torchvision":
        _, found = _torchvision_weights(config)
        return tuple(found.meta.get("categories", ())) if found is not None else ()
    by_number = getattr(getattr(network, "config", None), "id2label", None)
    if isinstance(by_number, Mapping) and set(by_number) == set(range(len(by_number))):
        return tuple(str(by_number[number]) for number in range(len(by_number)))
    cfg = getattr(network, "pretrained_cfg", None)
    names = cfg.get("label_names") if isinstance(cfg, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _torchvision_weights(config: TeacherSource) -> tuple[Any, Any]:
    """All weights that torchvision has for a network, and the teacher's, if they are among them."""
    from torchvision import models

    try:
        known = models.get_model_weights(config.name)
    except ValueError as error:
        raise TeacherError(
            f"teacher.name={config.name} is no classifier and no segmenter of torchvision.models"
        ) from error
    if config.weights == "published":
        name = str(config.kwargs.get("weights", "DEFAULT")).rpartition(".")[2]
        return known, known.__members__.get(name)
    file = Path(config.weights or "").name
    return known, next((w for w in known if Path(w.url).name == file), None)


def _of_torchvision(config: TeacherSource) -> Preprocessing | None:
    known, found = _torchvision_weights(config)
    weights = found or known.DEFAULT
    preset = weights.transforms()
    return Preprocessing(
        # Segmenters take any size, and are measured on images that are only scaled.
        image_size=_size(getattr(preset, "crop_size", preset.resize_size)),
        resize=_size(preset.resize_size),
        interpolation=preset.interpolation.value,
        mean=list(preset.mean),
        std=list(preset.std),
        origin=f"torchvision's {weights}" if found else f"as torchvision has it for {weights}",
        stated=found is not None,
    )


def _of_timm(cfg: Any, origin: str, stated: bool) -> Preprocessing | None:
    """As timm's own `create_transform` for evaluation would have it."""
    known = cfg if isinstance(cfg, Mapping) else getattr(cfg, "to_dict", dict)()
    if "input_size" not in known:
        return None
    _, height, width = known["input_size"]
    share = known.get("crop_pct") or 0.875
    scaled = [math.floor(side / share) for side in (height, width)]
    squashed = known.get("crop_mode") == "squash" or height != width
    return Preprocessing(
        image_size=_size((height, width)),
        resize=f"{scaled[0]}x{scaled[1]}" if squashed else scaled[0],
        interpolation=known.get("interpolation") or "bicubic",
        mean=list(known["mean"]),
        std=list(known["std"]),
        origin=origin,
        stated=stated,
    )


def _size(sides: Any) -> int | str:
    """One number where both sides have it."""
    if len(sides) == 1 or sides[0] == sides[1]:
        return int(sides[0])
    return f"{sides[0]}x{sides[1]}"
