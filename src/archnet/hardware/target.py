"""Hardware targets: which operators a chip runs, and the widths and sizes it holds."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from archnet.config import CostsConfig, DialectConfig, LimitsConfig
from archnet.errors import ConfigError
from archnet.target_file import described, from_file, is_file

# Kinds of layer that have more than one operator, the narrowest first.
OPERATORS_OF: Mapping[str, tuple[str, ...]] = {
    "conv": ("conv3x3", "conv1x1", "depthwise_conv", "conv"),
    "maxpool": ("maxpool2x2", "maxpool"),
}
# The windows of those that take one alone, dense and undilated, at stride 1 or 2.
WINDOWS: Mapping[str, tuple[int, int]] = {
    "conv3x3": (3, 3),
    "conv1x1": (1, 1),
    "maxpool2x2": (2, 2),
}
NO_LIMITS = LimitsConfig()


@dataclass(frozen=True)
class Layer:
    """One layer, of a student or of a file, that a target is asked to judge.

    Args:
        kind: its operator, or a kind of which `OPERATORS_OF` lists several.
        kernel, stride, dilation: one number a spatial axis, in pixels; empty without a window.
        groups: of channels.
        channels: of the widest map that it reads or writes.
        padded: whether its window reaches beyond the input.
        weight_sum: the largest sum of the magnitudes of one output's integer weights; None where
            the weights are no integers, or not known.
    """

    kind: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channels: int = 1
    padded: bool = False
    weight_sum: int | None = None


@dataclass(frozen=True)
class Target:
    """What a chip runs. The built-in targets are the YAML files beside this module.

    The fields are those of `archnet.config.HardwareConfig`, which describes them.
    """

    name: str
    operators: tuple[str, ...]
    lacks: tuple[str, ...]
    complete: bool
    limits: Mapping[str, LimitsConfig]
    costs: CostsConfig
    dialect: DialectConfig
    fc_per_position: bool
    max_channels: int | None
    lanes: int
    keeps_functions: bool
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    width_pairs: tuple[str, ...]
    weight_types: tuple[str, ...]
    act_types: tuple[str, ...]
    weight_scales: tuple[str, ...]
    act_scales: str
    zero_points: bool
    requantization: str
    accumulator_bits: int | None
    memory_bytes: int | None
    source: str

    @classmethod
    def names(cls) -> list[str]:
        """The built-in targets."""
        return sorted(
            path.name.removesuffix(".yaml")
            for path in files("archnet.hardware").iterdir()
            if path.name.endswith(".yaml")
        )

    @classmethod
    def named(cls, name: str) -> "Target":
        """A built-in target, or that of anybody's file: ``path/to/mychip.yaml``.

        Raises:
            ConfigError: there is no target of that name, or its file has a key that none has, or a
                value that cannot be.
        """
        if is_file(name):
            return cls.of(from_file(name))
        known = cls.names()
        if name not in known:
            near = (difflib.get_close_matches(name, known, 1, 0.0) or known)[0]
            raise ConfigError(
                f"hardware={name} is not one of {', '.join(known)}; nearest: {near}; "
                "a target of your own is named by its file, hardware=path/to/mychip.yaml"
            )
        return _built_in(name)

    @classmethod
    def of(cls, hardware: Any) -> "Target":
        """The target meant by a name, a target, or anything with a target's fields."""
        if isinstance(hardware, cls):
            return hardware
        if isinstance(hardware, str):
            return cls.named(hardware)
        values = {item.name: getattr(hardware, item.name) for item in fields(cls)}
        for key, value in values.items():
            if not isinstance(value, str | Mapping) and hasattr(value, "__iter__"):
                values[key] = tuple(value)
        return cls(**values)

    def description(self) -> dict[str, Any]:
        """The fields as plain data, which `described` reads again."""
        rows = asdict(self)
        return {key: list(row) if isinstance(row, tuple) else row for key, row in rows.items()}

    @classmethod
    def described(cls, fields: Mapping[str, Any]) -> "Target":
        """The target of a `description`."""
        limits = {name: LimitsConfig(**row) for name, row in fields["limits"].items()}
        costs = CostsConfig(**fields["costs"])
        dialect = DialectConfig(**fields.get("dialect", {}))  # students made before have none
        parts = {"limits": limits, "costs": costs, "dialect": dialect}
        return cls.of(SimpleNamespace(**{**fields, **parts}))

    def judge(self, layer: Layer) -> tuple[str, str]:
        """The operator that a layer is here, and the first thing that speaks against it ("").

        A dense 1x1 convolution is a fully connected layer at every position, and counts as one
        where the target has that.
        """
        if self.fc_per_position and layer.kind == "conv" and not _misfit("conv1x1", layer):
            found = self._judged(layer)
            dense = replace(layer, kind="fully_connected", kernel=(), stride=(), dilation=())
            if found[0] in self.operators or dense.kind not in self.operators:
                return found
            if _exceeds(layer.channels, self.max_channels):
                return (
                    dense.kind,
                    f"{layer.channels} channels; {self.name} holds {self.max_channels}",
                )
            return self._judged(dense)
        return self._judged(layer)

    def _judged(self, layer: Layer) -> tuple[str, str]:
        operators = OPERATORS_OF.get(layer.kind, (layer.kind,))
        misfits = {name: _misfit(name, layer) for name in operators}
        for name in (name for name, misfit in misfits.items() if not misfit):
            if name in self.lacks:
                return name, f"{name} is not an operator of {self.name}"
            if name in self.operators:
                return name, next(self._beyond(name, layer), "")
        own = next((name for name in operators if WINDOWS.get(name) == layer.kernel), layer.kind)
        if not self.complete:
            return own, f"{own} is not in the description of {self.name}"
        tried = {name: misfit for name, misfit in misfits.items() if name in self.operators}
        if tried and own in (layer.kind, *tried):
            closest = own if own in tried else next(iter(tried))
            return closest, tried[closest]
        return own, f"{own} is not an operator of {self.name}"

    def states(self, layer: Layer) -> bool:
        """Whether the description says if a layer runs, be it yes or no."""
        named = (*self.operators, *self.lacks)
        operators = OPERATORS_OF.get(layer.kind, (layer.kind,))
        return self.complete or any(
            name in named and not _misfit(name, layer) for name in operators
        )

    def _beyond(self, operator: str, layer: Layer) -> Iterator[str]:
        """Every limit that a layer exceeds, in words."""
        limits = self.limits.get(operator, NO_LIMITS)
        area = 1
        for size in layer.kernel:
            area *= size
        side, step = max(layer.kernel, default=1), max(layer.stride, default=1)
        spread = max(layer.dilation, default=1)
        kernel = f"kernel {sizes(layer.kernel)}"
        if _exceeds(side, limits.kernel):
            yield f"{kernel}; {self.name} takes sides up to {limits.kernel}"
        if _exceeds(area, limits.kernel_area):
            yield f"{kernel}; {self.name} takes {limits.kernel_area} pixels"
        if layer.padded and _exceeds(side, limits.padded_kernel):
            yield f"{kernel} with padding; {self.name} takes sides up to {limits.padded_kernel}"
        if _exceeds(step, limits.stride):
            yield f"stride {sizes(layer.stride)}; {self.name} takes up to {limits.stride}"
        if (layer.padded or spread > 1) and _exceeds(step, limits.padded_stride):
            how = "with padding" if layer.padded else "with dilation"
            taken = f"{self.name} takes up to {limits.padded_stride}"
            yield f"stride {sizes(layer.stride)} {how}; {taken}"
        if _exceeds(spread, limits.dilation):
            yield f"dilation {sizes(layer.dilation)}; {self.name} takes up to {limits.dilation}"
        if _exceeds(layer.groups, limits.groups):
            yield f"{layer.groups} groups; {self.name} takes {limits.groups}"
        widest = self.max_channels if layer.kind == "conv" else None
        for most in (widest, limits.channels):
            if _exceeds(layer.channels, most):
                yield f"{layer.channels} channels; {self.name} holds {most}"
        if _exceeds(layer.weight_sum or 0, limits.weight_sum):
            taken = f"{self.name} takes {limits.weight_sum}"
            yield f"magnitudes of weights add up to {layer.weight_sum}; {taken}"


@cache
def _built_in(name: str) -> Target:
    text = files("archnet.hardware").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return Target.of(described(text, f"hardware={name}", name))


def sizes(shape: tuple[int | None, ...]) -> str:
    """Sizes as text, 3x3; an unknown one is a question mark."""
    return "x".join("?" if size is None else str(size) for size in shape)


def _exceeds(value: int, limit: int | None) -> bool:
    return limit is not None and value > limit


def _misfit(operator: str, layer: Layer) -> str:
    """Why a layer is not this operator of its kind; "" where it is."""
    if operator in WINDOWS:
        if layer.kernel != WINDOWS[operator]:
            return f"kernel {sizes(layer.kernel)}"
        if layer.groups != 1:
            return f"{layer.groups} groups"
        if set(layer.dilation) - {1}:
            return f"dilations {list(layer.dilation)}"
        if layer.stride not in ((1, 1), (2, 2)):
            return f"strides {list(layer.stride)}"
    elif operator == "depthwise_conv" and (layer.groups == 1 or layer.groups != layer.channels):
        return "not depthwise"
    return ""
