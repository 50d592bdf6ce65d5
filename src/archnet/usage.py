"""What `train.py --help` and `--version` print; loads no torch."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import archnet
from archnet.compose import TORCHVISION_MODELS, TORCHVISION_SEGMENTERS

WIDTH = 100
_GROUPS = {
    "task": "what the network is for, and the data",
    "teacher": "the network to convert",
    "quant": "widths and quantizers",
    "hardware": "the target: its operators, widths and limits",
    "distill": "how the student is trained",
    "trainer": "where the work runs",
    "logger": "where losses and figures are logged",
    "hydra/sweeper": "how a sweep (-m) chooses values (default: every combination)",
    "wandb": "for W&B's own agent, not for this command: wandb sweep conf/wandb/sweep.yaml",
    "experiment": "published results; groups and keys on the command line override them",
}
_COMMANDS = (
    ("python train.py", "digits to an 8-bit student, in a minute or two"),
    ("python train.py experiment=demo", "digits at W2A4"),
    ("python train.py task=images task.data.root=photos teacher=resnet18 quant.bits=4", "yours"),
    ("python train.py -m experiment=demo quant.bits=2,4,8", "a sweep: three runs"),
    ("python train.py -m hydra/sweeper=pareto quant.bits=2,4,8", "accuracy and cost, by search"),
    ("python train.py resume=<run folder>", "continue a run that was stopped"),
    ("python train.py ... --cfg job", "print what a command composes to, and run nothing"),
    ("archnet train ...", "the same as python train.py ..., from any folder once installed"),
    (
        "archnet train --config-dir own task=mine",
        "with groups of your own, as in own/task/mine.yaml",
    ),
    ("python train.py ... trainer=debug", "every step of a run, with next to no work in it"),
    ("archnet --help", "what comes after training: evaluate, compare, export, verify, ..."),
)
_FLAGS = (
    ("-m", "run every combination of comma-separated values"),
    ("--cfg job", "print the config; --resolve fills in references to other keys"),
    ("--help, --version", "this text; the version"),
    ("--hydra-help", "flags of Hydra, which composes the config"),
)


def version_line() -> str:
    """Name and version."""
    return f"archnet {archnet.__version__}"


def usage(conf: Path) -> str:
    """The help of `train.py`: commands, groups with all their options, flags, precedence.

    Args:
        conf: the folder with the groups.
    """
    lines = [
        "python train.py [group=option ...] [key=value ...]",
        "",
        "Turns a trained network into a student of few operators and few bits, in a run folder.",
        "Exit codes: 0, or 2 for an error, which is told in one line.",
        "",
        "Commands",
        *_table(_COMMANDS),
        "",
        "Groups and their options, a file each in conf/; hardware's are in src/archnet/hardware/",
    ]
    for group, meaning in _GROUPS.items():
        lines += ["", f"{group}: {meaning}", *_table(_options(conf, group).items())]
        if group == "teacher":
            lines += ["  or a classifier of torchvision:", *_wrapped(TORCHVISION_MODELS)]
            lines += ["  or a segmenter:", *_wrapped(TORCHVISION_SEGMENTERS)]
    lines += [
        "",
        "Keys, such as quant.bits=4, are described in docs/configuration.md; --cfg job prints them",
        "with their values. The command line overrides an experiment:",
        "  defaults < experiment < group chosen on the command line < key on the command line",
        "quant.bits sets both widths, unless quant.weight_bits or quant.act_bits is given as well.",
        "",
        "Flags",
        *_table(_FLAGS),
    ]
    return "\n".join(lines)


def _options(conf: Path, group: str) -> dict[str, str]:
    """The options of a group, each with the first sentence of its file."""
    folder = conf / group
    if not folder.is_dir():
        folder = Path(__file__).parent / group  # targets come with the package
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        notes = (line[1:].strip() for line in path.read_text().splitlines() if line[:1] == "#")
        said = next((note for note in notes if not note.startswith("@")), "")
        found[path.stem] = re.sub(r"; (every key|keys) as .*", ".", said)
    return found


def _table(rows: Iterable[tuple[str, str]], column: int = 24) -> list[str]:
    """Names in one column, what they mean in the next; a long name has a line of its own."""
    lines = []
    for name, meaning in rows:
        indent = " " * column
        told = textwrap.wrap(meaning, WIDTH, initial_indent=indent, subsequent_indent=indent)
        if told and len(name) + 4 <= column:
            told[0] = f"  {name}".ljust(column) + told[0].strip()
            lines += told
        else:
            lines += [f"  {name}", *told]
    return lines


def _wrapped(names: Iterable[str]) -> list[str]:
    return textwrap.wrap("  ".join(names), WIDTH, initial_indent="    ", subsequent_indent="    ")
