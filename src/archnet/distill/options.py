"""The options of a distillation by name, for callers who have no config."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from archnet.config import DistillConfig, OptimizerConfig, nearest, validate_distill
from archnet.errors import ConfigError

# Where conf/distill differs from the defaults of `DistillConfig`.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "joint": {},
    "progressive": {},
    "local": {"attention": False, "adaptation": False, "inputs": "student"},
}


def options_of(given: Mapping[str, Any]) -> DistillConfig:
    """The options of a schedule, as its file in conf/distill has them, with some changed.

    Args:
        given: keys of `distill`; those of `distill.optimizer` stand among them (``lr``,
            ``grid_lr``, ``weight_decay``), and ``optimizer`` is its name.

    Raises:
        ConfigError: a key is unknown, or a value cannot be.
    """
    own = {field.name for field in fields(DistillConfig)}
    nested = {field.name for field in fields(OptimizerConfig)} - {"name"}
    for name in given:
        if name not in own | nested:
            best = nearest(name, sorted(own | nested))
            raise ConfigError(f"{name} is not an option of distillation; nearest valid: {best}")
    optimizer = {name: value for name, value in given.items() if name in nested}
    if isinstance(given.get("optimizer"), str):
        optimizer["name"] = given["optimizer"]
    found = {name: value for name, value in given.items() if name in own - {"optimizer"}}
    preset = SCHEDULES.get(str(given.get("schedule", "joint")), {})
    values: dict[Any, Any] = {**preset, **found, "optimizer": optimizer}
    try:
        tree = OmegaConf.merge(OmegaConf.structured(DistillConfig), values)
        options = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        line = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'distill'}: {line}") from error
    assert isinstance(options, DistillConfig)
    validate_distill(options)
    if options.on_policy:
        raise ConfigError("on_policy is for runs of task.kind=translation alone: leave it out")
    return options
