"""Hardware targets: which operators a chip runs, and the widths and sizes it holds."""

import difflib
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from archnet.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """What a chip runs. The built-in targets are the YAML files beside this module.

    ``operators`` lists all that a student may contain beside layout moves; ``max_channels`` is
    the widest map a convolution reads or writes (None: no limit); ``lanes`` and ``merge_lanes``
    are the channels in a slice of a depthwise convolution and of a merged addition.
    """

    name: str
    operators: tuple[str, ...]
    fc_per_position: bool
    max_channels: int | None
    lanes: int
    merge_lanes: int
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    source: str

    @classmethod
    def named(cls, name: str) -> "Target":
        """A built-in target.

        Raises:
            ConfigError: there is no target of that name.
        """
        known = sorted(
            path.name.removesuffix(".yaml")
            for path in files("archnet.hardware").iterdir()
            if path.name.endswith(".yaml")
        )
        if name not in known:
            near = (difflib.get_close_matches(name, known, 1, 0.0) or known)[0]
            raise ConfigError(f"hardware={name} is not one of {', '.join(known)}; nearest: {near}")
        text = files("archnet.hardware").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        return cls.of(OmegaConf.create(text))

    @classmethod
    def of(cls, hardware: Any) -> "Target":
        """The target meant by a name, a target, or anything with a target's fields."""
        if isinstance(hardware, cls):
            return hardware
        if isinstance(hardware, str):
            return cls.named(hardware)
        values = {item.name: getattr(hardware, item.name) for item in fields(cls)}
        for key in ("operators", "weight_bits", "act_bits"):
            values[key] = tuple(values[key])
        return cls(**values)
