"""From a command line and ``conf/`` to a `Config`; what cannot be is one line, before any work."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from archnet.config import Config, nearest, validate
from archnet.errors import ConfigError
from archnet.jobs.registry import require_kind
from archnet.overrides import arrange, parse, sample, settings
from archnet.target_file import from_file, is_file

# fmt: off
TORCHVISION_MODELS = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0",
    "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2",
    "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf",
    "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18",
    "resnet34", "resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s",
    "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
    "wide_resnet101_2", "wide_resnet50_2",
)
TORCHVISION_SEGMENTERS = (
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet101", "deeplabv3_resnet50", "fcn_resnet101",
    "fcn_resnet50", "lraspp_mobilenet_v3_large",
)
# fmt: on

SCHEMA = Config()


@cache
def register() -> None:
    """Tell Hydra the schema and the torchvision names, so that `teacher=<name>` composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in (*TORCHVISION_MODELS, *TORCHVISION_SEGMENTERS):
        node = {"name": name, "source": "torchvision", "weights": "published"}
        store.store(group="teacher", name=name, node=node)


def placed(word: str) -> str:
    """A word of the command line whose targets of files, ``hardware=path/to/mychip.yaml``, are
    named as Hydra finds them.

    Raises:
        ConfigError: a file is missing, or describes no target.
    """
    key, _, values = word.partition("=")
    if key != "hardware" or not any(map(is_file, values.split(","))):
        return word
    names = []
    for value in values.split(","):
        if not is_file(value):
            names.append(value)
            continue
        found = from_file(value)
        name = f"{found.name}_{sha256(value.encode()).hexdigest()[:8]}"
        ConfigStore.instance().store(group="hardware", name=name, node=found)
        names.append(name)
    return f"{key}={','.join(names)}"


def compose(conf: Path, overrides: Sequence[str], config_name: str = "config") -> Config:
    """The checked config of ``conf/`` under ``overrides`` such as ``quant.bits=4``.

    What wins where several say something: see `archnet.overrides`.

    Raises:
        ConfigError: an unknown key, group option or impossible value, in one line.
    """
    register()
    overrides = [placed(word) for word in overrides]
    _check_keys(overrides)
    GlobalHydra.instance().clear()
    try:
        root, arranged = arrange(conf, overrides, config_name)
        with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            tree = hydra.compose(root, overrides=arranged)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"conf/ holds broken YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError("a value is nested too deeply, or refers to itself") from error
    except Exception as error:  # Hydra also asserts, of what a user may well have written
        raise _explain(error, overrides) from error
    return to_config(tree)


def to_config(tree: DictConfig) -> Config:
    """The composed tree as dataclasses, checked.

    Raises:
        ConfigError: names the key and the nearest valid one.
    """
    _check_tree(OmegaConf.to_container(tree, resolve=False), SCHEMA, "")
    try:
        config = OmegaConf.to_object(tree)
    except RecursionError as error:
        raise ConfigError("a value is nested too deeply, or refers to itself") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise _explain(error, []) from error
    assert isinstance(config, Config)
    require_kind(config.task.kind)
    validate(config)
    return config


def check(conf: Path, arguments: Sequence[str]) -> list[str]:
    """Compose every job that a command line asks for, sweeps included, and discard the results.

    Args:
        conf: the folder with ``config.yaml``.
        arguments: the command line without the program's name.

    Returns:
        The command line that lets Hydra keep to our order of precedence.

    Raises:
        ConfigError: from the first job that cannot be.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage
    arguments = [placed(word) for word in arguments]
    options = parser.parse_args(arguments)
    if options.hydra_help or options.info or options.shell_completion:
        return list(arguments)
    if options.experimental_rerun:
        raise ConfigError("--experimental-rerun is not for archnet: resume=<run folder>")
    overrides = list(options.overrides)
    if options.config_dir:
        own = Path(options.config_dir)
        if not own.is_dir():
            raise ConfigError(f"--config-dir={own}: there is no such folder")
        # In place of what conf/config.yaml says: targets are files of the package.
        overrides.append(f"hydra.searchpath=[pkg://archnet,file://{own.resolve()}]")
    if options.config_path:
        conf = Path(options.config_path)
    name = options.config_name or "config"
    for job in sample(overrides) if options.multirun else [overrides]:
        compose(conf, job, name)
    root, arranged = arrange(conf, options.overrides, name)
    words = list(arguments)
    if options.overrides:
        # Hydra wants its overrides side by side.
        end = max(i for i, word in enumerate(words) if word == options.overrides[-1]) + 1
        words[end:end] = arranged[len(options.overrides) :]
    return [*words, f"--config-name={root}"]


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; train.py --help lists what there is")


def _check_keys(overrides: Sequence[str]) -> None:
    """Refuse keys that the schema does not have, and what is no truth value for those that are."""
    for override in parse(overrides):
        key = override.key_or_group
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} has several values, for a sweep: add -m; "
                f"a list is written {key}=[<a>,<b>]"
            )
        if key.split(".")[0] in ("hydra", "experiment") or key.startswith("hydra/"):
            continue
        chosen = override.value()
        group = is_dataclass(_find(key)) and not override.is_delete()
        if group and not isinstance(chosen, str | dict):
            raise ConfigError(f"{override.input_line}: {key} takes one option, or single keys")
        for name, value in settings(override):
            if type(value) in (int, float) and isinstance(_find(name), bool):
                raise ConfigError(f"{name}={value} is not true or false")


def _check_tree(tree: Any, schema: Any, prefix: str) -> None:
    """Find keys beyond the schema, which Hydra lets files and `+key=value` add."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')}={tree} is no group of keys")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        _find(key)
        if is_dataclass(getattr(schema, name)):
            _check_tree(value, getattr(schema, name), f"{key}.")


def _find(key: str) -> Any:
    """The default of a key; ConfigError where the schema has no such key."""
    node: Any = SCHEMA
    prefix = ""
    if not key:
        raise ConfigError("an override without a key: write key=value")
    for name in key.split("."):
        if isinstance(node, dict):
            return None
        names = list(vars(node)) if is_dataclass(node) else []
        if name not in names:
            best = nearest(name, names) if names else ""
            raise ConfigError(
                f"{key} is not a config key; nearest valid: {f'{prefix}{best}'.rstrip('.')}"
            )
        node = getattr(node, name)
        prefix += f"{name}."
    return node


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One line for what Hydra and OmegaConf say in many."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = error.options or []
        if not group:
            return ConfigError(f"--config-name={name}: there is no such file")
        if not options:
            return ConfigError(f"{group}={name}: conf/{group} has no such option")
        return ConfigError(
            f"{group}={name} is not an option of {group}; nearest valid: "
            f"{group}={nearest(name, options)}"
        )
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    said = str(getattr(cause, "msg", None) or cause)
    line = said.splitlines()[0] if said.strip() else "this cannot be composed"
    if key and key.startswith("teacher.kwargs."):
        return ConfigError(f"{key} is a new argument: add it with +{key}=<value>")
    keys = [text.lstrip("+~").partition("=")[0] for text in overrides]
    if key is None and keys and not any(name in line for name in keys):
        return ConfigError(f"{' '.join(overrides)}: {line}")
    given = [text for text in overrides if key and text.lstrip("+").startswith(f"{key}=")]
    return ConfigError(f"{given[0] if given else key}: {line}" if key else line)
