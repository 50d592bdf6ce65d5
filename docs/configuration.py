"""The page of all config keys, from ``src/archnet/config.py`` and ``conf/``.

    python docs/configuration.py

writes docs/configuration.md. Type, range and default are those of the dataclasses' fields; the
meaning is the comment above a field and behind it.
"""

import ast
import tokenize
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from archnet import config as module
from archnet.compose import compose
from archnet.config import LARGEST, OPERATORS, Config, keys

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(module.__file__)
PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

`python docs/configuration.py` writes this page from `src/archnet/config.py`. A key is given on the
command line as `python train.py quant.bits=4`, or in a file of `conf/`. The column *default* has
the value of the key itself, the column *as composed* the value that `python train.py` without
arguments gives it, where that is another: options of the groups that are chosen by default set it.

A group is a folder of options, and each option a YAML file that sets keys of the section.

"""
# Options of groups that are no files of conf/.
ELSEWHERE = {"hardware": ROOT / "src" / "archnet" / "hardware"}
MOST_LISTED = 12  # options of one key, and operators
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


def comments() -> dict[int, str]:
    """The comment on each line of the source."""
    with SOURCE.open("rb") as file:
        return {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        }


def meanings() -> dict[str, dict[str, str]]:
    """For every dataclass of the config, the meaning of its fields that are no groups of keys."""
    text, lines = comments(), SOURCE.read_text().splitlines()
    found: dict[str, dict[str, str]] = {}
    groups = [name for name, value in vars(module).items() if is_dataclass(value)]
    for node in ast.parse(SOURCE.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            first = item.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            said = [text[line] for line in range(first, (item.end_lineno or 0) + 1) if line in text]
            if ast.unparse(item.annotation) not in groups:
                found.setdefault(node.name, {})[item.target.id] = " ".join(said)
    return found


def kind(item: Field[Any]) -> str:
    """The type of a key, in words."""
    rule = item.metadata
    if "size" in rule:
        return "pixels, or height x width"
    declared = item.type
    parts = get_args(declared) if get_origin(declared) is UnionType else (declared,)
    shown = [_word(part) for part in parts if part is not type(None)]
    return ", ".join([*shown, *(["null"] if type(None) in parts else [])])


def _word(declared: Any) -> str:
    members = get_args(declared)
    if get_origin(declared) is list:
        return f"list of {_word(members[0])}s"
    if get_origin(declared) is dict:
        return "mapping"
    return WORDS[declared]


def span(item: Field[Any]) -> str:
    """What a key may be."""
    rule = item.metadata
    listed = rule.get("options") or rule.get("members") or ()
    if len(listed) > MOST_LISTED:
        return "operators" if OPERATORS[0] in listed else "names"
    if listed:
        return ", ".join(f"`{option}`" for option in listed)
    if "width" in rule:
        return "1 to 8, or 32"
    if "size" in rule:
        return f"{rule['size']} to {module.LARGEST_SIDE}"
    if "low" not in rule:
        return ""
    low, high = rule["low"], rule["high"]
    if high < LARGEST:
        return f"{low} to {high}"
    return "" if low <= -LARGEST else f"at least {low}" if high == LARGEST else f"{low} to {high}"


def value_shown(value: Any) -> str:
    """A value as a command line has it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, list) and len(value) > MOST_LISTED:
        return f"{len(value)} values"
    if isinstance(value, list):
        return f"`[{','.join(map(str, value))}]`"
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    return f"`{value}`"


def sections(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass of the tree with the prefix of its keys, from the root on."""
    yield prefix, node
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from sections(value, f"{prefix}{item.name}.")
        elif get_origin(item.type) is dict and is_dataclass(get_args(item.type)[1]):
            yield from sections(get_args(item.type)[1](), f"{prefix}{item.name}.<operator>.")


def presets(group: str) -> str:
    """A sentence on where the options of a group are; empty where it has none."""
    folder = ELSEWHERE.get(group, ROOT / "conf" / group)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not names:
        return ""
    place = folder.relative_to(ROOT).as_posix()
    return f"Options of `{group}=`, in `{place}/`: {', '.join(f'`{name}`' for name in names)}."


def page() -> str:
    """The whole page."""
    meaning, composed = meanings(), dict(keys(compose(ROOT / "conf", [])))
    text = INTRODUCTION
    for prefix, node in sections(Config()):
        title = prefix.rstrip(".") or "The run"
        text += f"## {title}\n\n{(type(node).__doc__ or '').strip()}\n\n".replace("``", "`")
        text += f"{options}\n\n" if prefix and (options := presets(title)) else ""
        text += "| key | type | range | default | as composed | meaning |\n"
        text += "| --- | --- | --- | --- | --- | --- |\n"
        for item in fields(node):
            default = getattr(node, item.name)
            if is_dataclass(default):
                continue
            key = f"{prefix}{item.name}"
            used = composed.get(key, default)
            about = meaning[type(node).__name__].get(item.name, "")
            cells = [
                f"`{key}`",
                kind(item),
                span(item),
                value_shown(default),
                "" if used == default else value_shown(used),
                about.replace("|", "\\|").replace("<", "\\<"),
            ]
            text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
