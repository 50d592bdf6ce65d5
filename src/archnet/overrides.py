"""What a command line overrides, and the one order of precedence:

    defaults < experiment < group chosen on the command line < key on the command line

Hydra merges an experiment after all groups, so that what it pins would win over a group that the
command line chooses. Here the root of the config tree is arranged for every command: groups that
the command chooses go after the experiment. `quant.bits` sets both widths, unless the command
gives the width itself.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra.errors
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ConfigDefault, GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from archnet.errors import ConfigError

# The root that `arrange` makes of conf/config.yaml.
ROOT = "command_line"
# Keys that another one sets where the command line does not: see conf/quant.
DERIVED = {"quant.bits": ("quant.weight_bits", "quant.act_bits")}
# Of more jobs in a sweep, each value is checked once before the first starts, not each job.
CHECKED_JOBS = 32
LARGEST_SWEEP = 10_000


def parse(overrides: Sequence[str]) -> list[Override]:
    """Read overrides such as ``quant.bits=4``.

    Raises:
        ConfigError: names the one that cannot be read.
    """
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except (hydra.errors.HydraException, ValueError, ArithmeticError, RecursionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if "LexerNoViableAlt" in reason:
                reason = "put a value with special characters in quotes, as in \"key='a value'\""
            raise ConfigError(f"{_short(text)} cannot be read as key=value: {reason}") from error
    return parsed


def settings(override: Override) -> Iterator[tuple[str, Any]]:
    """The keys that an override sets, and their values; `quant={bits: 4}` sets `quant.bits`."""
    if not override.is_delete():
        yield from _leaves(override.key_or_group, override.value())


def arrange(conf: Path, overrides: Sequence[str], config_name: str) -> tuple[str, list[str]]:
    """The root config and the overrides by which Hydra keeps to the order of precedence.

    Args:
        conf: the folder with the root config.
        overrides: as on the command line, sweeps included.
        config_name: the root config.

    Returns:
        The name of the arranged root, which Hydra finds in its store, and the overrides.

    Raises:
        ConfigError: an override cannot be read.
    """
    given = parse(overrides)
    named = {key for override in given for key, _ in settings(override)}
    derived = [
        f"{key}=${{{source}}}"
        for source, keys in DERIVED.items()
        for key in keys
        if source in named and key not in named
    ]
    chosen = {override.key_or_group for override in given if _chooses(override)}
    return _arrange_root(conf, config_name, chosen), [*overrides, *derived]


def sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every job that ``overrides`` sweep over, such as ``quant.bits=2,4``.

    Raises:
        ConfigError: a sweep that cannot be listed, or that has more than `LARGEST_SWEEP` jobs.
    """
    for job in itertools.product(*_choices(overrides)):
        yield list(job)


def sample(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Of the jobs of a sweep, those that are checked before the first one starts: all of a small
    sweep, and of a large one so many that each value is in one.

    Raises:
        ConfigError: as `sweep`.
    """
    choices = _choices(overrides)
    if math.prod(map(len, choices)) <= CHECKED_JOBS:
        yield from sweep(overrides)
        return
    for index in range(max(map(len, choices))):
        yield [values[min(index, len(values) - 1)] for values in choices]


def overridden() -> list[str]:
    """The keys and groups that the command line of the running Hydra job sets.

    An option whose file sets keys outside of its group, as experiments do, counts by these keys.
    """
    found = []
    for override in parse(HydraConfig.get().overrides.task):
        if _chooses(override) and isinstance(override.value(), str):
            found += _sets(override.key_or_group, str(override.value()))
        elif not override.is_hydra_override():
            found += [key for key, _ in settings(override)]
    return list(dict.fromkeys(found))


def named() -> list[str]:
    """The keys that the command line of the running Hydra job sets itself, and the groups of which
    it names an option; not what the files of these set.
    """
    found = []
    for override in parse(HydraConfig.get().overrides.task):
        if _chooses(override) and isinstance(override.value(), str):
            found.append(override.key_or_group)
        elif not override.is_hydra_override():
            found += [key for key, _ in settings(override)]
    return list(dict.fromkeys(found))


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, member in value.items():
            yield from _leaves(f"{key}.{name}", member)
    else:
        yield key, value


def _chooses(override: Override) -> bool:
    """Whether an override chooses an option of a group; of what is a group, Hydra judges."""
    return "." not in override.key_or_group and not isinstance(override.value(), dict)


def _arrange_root(conf: Path, config_name: str, chosen: set[str]) -> str:
    path = conf / f"{config_name}.yaml"
    if not path.is_file():
        return config_name  # which Hydra reports
    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig) or "defaults" not in tree:
        return config_name
    front, behind, last = [], [], []
    entries: Any = OmegaConf.to_container(tree.defaults)
    for entry in entries:
        name = next(iter(entry)) if isinstance(entry, dict) else str(entry)
        if name.startswith("override "):
            last.append(entry)  # Hydra wants them at the end
        elif name in chosen - {"experiment"}:
            behind.append(entry)
        else:
            front.append(entry)
    tree.defaults = [*front, *behind, *last]
    ConfigStore.instance().store(name=ROOT, node=tree)
    return ROOT


def _choices(overrides: Sequence[str]) -> list[list[str]]:
    """For every override what it is in one job or another."""
    given = list(zip(overrides, parse(overrides), strict=True))
    if any(override.key_or_group == "hydra/sweeper" for _, override in given):
        # Which values a search will take is not known before: its bounds stand for all.
        return [_bounds(text, override) for text, override in given]
    jobs = math.prod(_length(override) for _, override in given)
    if jobs > LARGEST_SWEEP:
        raise ConfigError(
            f"the sweep has {jobs:.3g} jobs, and at most {LARGEST_SWEEP:,} are run at once: "
            "sweep over fewer values"
        )
    choices = []
    for text, override in given:
        if override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return choices


def _bounds(text: str, override: Override) -> list[str]:
    """What is looked at of an override before a search: every choice, or the ends of a range."""
    values, key = override.value(), override.get_key_element()
    if isinstance(values, IntervalSweep):
        return [f"{key}={end}" for end in (values.start, values.end)]
    if isinstance(values, RangeSweep):
        count = _length(override)
        start, step = values.start or 0, values.step
        return [f"{key}={start}", f"{key}={start + step * (int(count) - 1)}"] if count else [text]
    if isinstance(values, ChoiceSweep):
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [text]


def _length(override: Override) -> float:
    """Of how many values a sweep is; 1 for what is no sweep."""
    if not override.is_sweep_override():
        return 1
    values, key = override.value(), override.key_or_group
    if isinstance(values, ChoiceSweep):
        return len(values.list)
    if not isinstance(values, RangeSweep):
        raise ConfigError(
            f"{override.input_line}: a sweep lists its values: {key}=<a>,<b> or "
            f"{key}=range(<first>,<end>)"
        )
    start, stop, step = (float(x or 0) for x in (values.start, values.stop, values.step))
    if not all(map(math.isfinite, (start, stop, step))) or step == 0:
        raise ConfigError(f"{override.input_line}: a range needs finite ends and a step above zero")
    return max(0.0, math.ceil((stop - start) / step))


def _sets(group: str, option: str) -> list[str]:
    """What an option sets: its group, or key by key what a file sets that is for the whole tree."""
    loader: Any = GlobalHydra.instance().config_loader()
    loaded = loader.repository.load_config(f"{group}/{option}")
    if loaded is None or loaded.header["package"] != "_global_":
        return [group]
    keys = [key for key, _ in _leaves("", OmegaConf.to_container(loaded.config))]
    found = [key.removeprefix(".") for key in keys if key]
    for default in loaded.defaults_list:
        if isinstance(default, ConfigDefault) and not default.is_self():
            found += _sets(group, str(default.path))
        elif isinstance(default, GroupDefault) and isinstance(default.value, str):
            found += _sets(str(default.group).removeprefix("/"), default.value)
    return found
