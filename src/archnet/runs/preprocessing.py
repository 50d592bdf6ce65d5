"""How a run's images become its teacher's input: as given, as the weights state, or assumed."""

import logging
from dataclasses import replace
from typing import Any

from archnet.config import Config, DataConfig, sides, validate
from archnet.tasks import sources
from archnet.tasks.images import common_size
from archnet.teachers.preprocessing import Preprocessing, preprocessing_of

_log = logging.getLogger(__name__)

# What most classifiers of photographs were trained with.
_USUAL = Preprocessing(
    224, 256, "bilinear", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "as for ImageNet", False
)
_KEYS = ("image_size", "resize", "interpolation", "mean", "std")
# Images that all have one size up to this one are taken as the network's input.
_LARGEST_COMMON = 512


def with_preprocessing(config: Config) -> Config:
    """The config with a value for each key of `task.data` that says what the teacher is shown.

    A key that is given stays. The others come from the teacher's weights; what those do not state
    is assumed, and a warning says so.

    Raises:
        ArchnetError: the teacher cannot be found, or its values contradict those that are given.
    """
    data = config.task.data
    absent = [name for name in _KEYS if getattr(data, name) is None]
    needed = [name for name in absent if name in ("image_size", "mean", "std")]
    # Somebody's factory is not called for what has a meaning without it.
    ask = needed if config.teacher.source == "custom" else absent
    stated = preprocessing_of(config.teacher) if ask else None
    if not needed and not (stated and stated.stated):
        return config
    source = stated or _assumed(config)
    filled: dict[str, Any] = {name: getattr(source, name) for name in absent}
    if "resize" in filled:
        filled["resize"] = _resize(source, filled.get("image_size") or data.image_size)
    known = replace(config, task=replace(config.task, data=replace(data, **filled)))
    validate(known)
    values = ", ".join(f"task.data.{name}={_text(value)}" for name, value in filled.items())
    if source.stated:
        _log.info("%s, as %s states", values, source.origin)
    else:
        _log.warning(
            "%s are assumed, %s, because the weights of teacher %s do not state how images were "
            "prepared; set what they were trained with, or the teacher's accuracy will be wrong",
            values,
            source.origin,
            config.teacher.name,
        )
    return known


def stated(data: DataConfig) -> dict[str, Any]:
    """How an image becomes a network's input, with every key filled in: plain data."""
    height, width = sides("task.data.image_size", data.image_size or 0, low=0)
    return {
        "height": height,
        "width": width,
        "channels": data.channels,
        "resize": data.resize,
        "interpolation": data.interpolation or "bilinear",
        "order": "resized, its centre cut, divided by 255, mean subtracted, divided by std",
        "mean": data.mean,
        "std": data.std,
    }


def as_recorded(config: Config, stored: Config) -> Config:
    """A config given for a run that exists, with that run's values where it leaves them open."""
    given, earlier = config.task.data, stored.task.data
    absent = {key: getattr(earlier, key) for key in _KEYS if getattr(given, key) is None}
    return replace(config, task=replace(config.task, data=replace(given, **absent)))


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(f'{number:g}' for number in value)}]"
    return "null" if value is None else str(value)


def _resize(source: Preprocessing, size: Any) -> int | str | None:
    """The scaling that goes with a size: that of the weights, in proportion where it is another."""
    if size == source.image_size:
        return source.resize
    if not source.stated or isinstance(source.resize, str):
        return None
    stated = min(sides("image_size", source.image_size))
    return source.resize * min(sides("image_size", size)) // stated


def _assumed(config: Config) -> Preprocessing:
    """What is usual, at the size of the images where they all have the same."""
    data, usual = config.task.data, _USUAL
    if data.channels == 1:
        usual = replace(usual, mean=[0.449], std=[0.226])
    if data.image_size is None:
        images = next(iter(sources.read(data, config.task.name).parts.values())).images
        height, width = common_size(images) or (0, 0)
        if 0 < max(height, width) <= _LARGEST_COMMON:
            size = height if height == width else f"{height}x{width}"
            origin = "the size as the images have it"
            usual = replace(usual, image_size=size, resize=size, origin=origin)
    return usual
