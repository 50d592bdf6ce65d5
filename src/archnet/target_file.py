"""Targets from files, one's own too; nothing here loads torch, for configs are composed of them."""

import os
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from archnet.config import HardwareConfig, nearest, validate_hardware
from archnet.errors import ConfigError


def is_file(name: str) -> bool:
    """Whether what names a target is the path of its file."""
    return name.endswith((".yaml", ".yml"))


def from_file(path: str | os.PathLike[str]) -> HardwareConfig:
    """The target that anybody's file describes; without ``name`` it is called as the file is.

    Raises:
        ConfigError: names the file, and the key that cannot be.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"hardware={path} cannot be read: {reason}") from error
    found = described(text, f"hardware={path}", path.stem)
    try:
        validate_hardware(found)
    except ConfigError as error:
        raise ConfigError(f"hardware={path}: {error}") from error
    return found


def described(text: str, what: str, name: str) -> HardwareConfig:
    """A target's YAML; what it leaves out has the default of the schema.

    Args:
        text: of the file.
        what: it is, for errors.
        name: of a target whose file gives none.

    Raises:
        ConfigError: broken YAML, or a key that no target has.
    """
    try:
        tree = OmegaConf.create(text)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{what}: the file holds no keys of a target")
        known = [item.name for item in fields(HardwareConfig)]
        for key in tree:
            if key not in known:
                raise ConfigError(
                    f"{what}: {key!s} is no key of a target; nearest valid: "
                    f"{nearest(str(key), known)}"
                )
        base = OmegaConf.merge(OmegaConf.structured(HardwareConfig), {"name": name})
        found = OmegaConf.to_object(OmegaConf.merge(base, tree))
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{what}: {line}") from error
    assert isinstance(found, HardwareConfig)
    return found
