"""What of a network converts, by which rules, at what cost: a row of ``docs/coverage.md``."""

import ctypes
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from archnet.capture import capture, place
from archnet.convert import Approximation, convert, missing_rules
from archnet.deploy import audit
from archnet.errors import ArchnetError
from archnet.hardware import teacher_cost
from archnet.lower import deployed_cost
from archnet.ops import Student
from archnet.quant import Recipe, quantize

_PACKAGES = ("archnet", "torch", "torchvision", "timm", "onnx")
# The widths of the comparison of bit operations.
TEACHER_BITS, WEIGHT_BITS, ACT_BITS = 8, 2, 4


@dataclass
class Coverage:
    """What became of one network. What was not reached is None.

    ``exact`` and ``approximate`` count the teacher's nodes by the rule that converted them;
    ``approximations`` counts them by "operator (rule)"; ``missing`` has the module path of every
    node of an operator without a rule; ``stopped`` is the error that ended the work. Ratios are
    the student's figure over the teacher's; bit operations those of a W2A4 student (8 bits in its
    first and last layer) over a W8A8 teacher. ``seconds`` and ``cpu_seconds`` are of capture and
    conversion, ``peak_mb`` is what they added to the process at most, the student included;
    ``relative_error`` is that of the float student's output before any training.
    """

    family: str
    name: str
    inputs: tuple[tuple[int, ...], ...]
    nodes: int | None = None
    exact: int | None = None
    approximate: int | None = None
    approximations: dict[str, int] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    stopped: str = ""
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mb: float | None = None
    teacher_mb: float | None = None
    macs_ratio: float | None = None
    parameters_ratio: float | None = None
    bops_ratio: float | None = None
    violations: int | None = None
    relative_error: float | None = None

    @property
    def converts(self) -> str:
        """Exactly, approximately, or no."""
        if self.exact is None:
            return "no"
        return "approximately" if self.approximate else "exactly"


def measure(
    network: nn.Module,
    inputs: Sequence[tuple[int, ...]],
    hardware: str,
    family: str = "",
    name: str = "",
) -> Coverage:
    """Convert a network and find out what it costs.

    Args:
        network: it is left untouched.
        inputs: the shapes of its inputs for one sample, (C, H, W) for an image; their values are
            drawn here.
        hardware: the target's name.
        family, name: of the row.

    Returns:
        The row. An error of archnet ends the work and is recorded in the row; others are raised.
    """
    row = Coverage(family, name, tuple(inputs))
    generator = torch.Generator().manual_seed(0)
    examples = tuple(torch.randn(2, *shape, generator=generator) for shape in inputs)
    row.teacher_mb = sum(t.nbytes for t in (*network.parameters(), *network.buffers())) / 2**20
    try:
        load_everything(hardware)
        student = _convert(network, examples, hardware, row)
        teacher = teacher_cost(network, examples, TEACHER_BITS, TEACHER_BITS)
        cost = deployed_cost(student)
        row.macs_ratio = _ratio(cost.macs, teacher.macs)
        row.parameters_ratio = _ratio(cost.parameters, teacher.parameters)
        row.violations = len(audit(student, hardware).violations)
        recipe = Recipe(weight_bits=WEIGHT_BITS, act_bits=ACT_BITS, equalize=False)
        quantize(student, recipe, calibration=[tuple(x[:1] for x in examples)])
        row.bops_ratio = _ratio(deployed_cost(student).bops, teacher.bops)
    except ArchnetError as error:
        row.stopped = str(error)
    return row


def load_everything(hardware: str) -> None:
    """Convert a network of no size, so that no row pays for what loads at first use."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    convert(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8), hardware)


def _convert(
    network: nn.Module, examples: tuple[Tensor, ...], hardware: str, row: Coverage
) -> Student:
    with Spent() as spent:
        graph = capture(network, examples)
        row.nodes = len(graph.nodes)
        row.missing = {
            operator: [node.path for node in nodes]
            for operator, nodes in missing_rules(graph).items()
        }
        # Gates of random weights hardly vary; those of trained ones do.
        form = Approximation(min_gain=0)
        student = convert(graph, hardware=hardware, calibration=examples, approximation=form)
    row.seconds, row.cpu_seconds, row.peak_mb = spent.seconds, spent.cpu_seconds, spent.peak_mb
    row.relative_error = student.graph.error
    row.exact = sum(entry.exact for entry in student.report)
    row.approximate = len(student.report) - row.exact
    row.approximations = dict(
        Counter(f"`{node.operator}` ({node.rule})" for node in student.report if not node.exact)
    )
    return student


def _ratio(after: int, before: int) -> float | None:
    return after / before if before else None


# Time and memory ----------------------------------------------------------------------------


class Spent:
    """What the block of a ``with`` took.

    ``seconds`` pass on the clock and ``cpu_seconds`` in this process; ``peak_mb`` is the most
    memory that it held above what it held before, None where the system does not tell (it is
    read from Linux's ``/proc``).
    """

    seconds = cpu_seconds = 0.0
    peak_mb: float | None = None

    def __enter__(self) -> Self:
        self._held: float | None = None
        # Freed memory that the allocator keeps would hide what the block takes, or count as taken:
        # blocks of a megabyte and more are from here on given back when they are freed.
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
            libc.malloc_trim(0)
        with suppress(OSError):
            # The peak that Linux keeps starts again from what is held now.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._held = _status("VmRSS")
        self._began, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu_seconds = time.process_time() - self._cpu
        if self._held is not None:
            self.peak_mb = _status("VmHWM") - self._held


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def _status(key: str) -> float:
    """A figure of this process in Linux's ``/proc``, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {key} in /proc/self/status")


# The page -----------------------------------------------------------------------------------

COLUMNS: Mapping[str, str] = {
    "family": "",
    "network": "",
    "input": "",
    "converts": "",
    "nodes": "of the captured graph",
    "exact": "nodes that a rule without error converts",
    "approximate": "nodes whose rule keeps the function only nearly; distillation does the rest",
    "MACs": "student over teacher",
    "parameters": "student over teacher",
    "BOPs": f"MACs times weight bits times activation bits: student at W{WEIGHT_BITS}A{ACT_BITS}, "
    f"8 bits in its first and last layer, over teacher at W{TEACHER_BITS}A{TEACHER_BITS}. "
    "At equal widths it is the ratio of MACs",
    "seconds (CPU)": "capture and conversion, on the clock and of one core",
    "memory, MB (teacher)": "what they add to the process at most, the student included; "
    "in brackets the bytes of the teacher",
    "pure": "the audit of the exported float file finds nothing outside the target",
    "error": "relative error of the float student's output, before any training",
}


def cells(row: Coverage) -> list[str]:
    """A row of the table, in the order of `COLUMNS`."""
    return [
        row.family,
        row.name,
        ", ".join("x".join(map(str, shape)) for shape in row.inputs),
        row.converts,
        _cell(row.nodes, "d"),
        _cell(row.exact, "d"),
        _cell(row.approximate, "d"),
        _cell(row.macs_ratio, ".2f"),
        _cell(row.parameters_ratio, ".2f"),
        _cell(row.bops_ratio, ".3f"),
        "" if row.seconds is None else f"{row.seconds:.1f} ({row.cpu_seconds:.1f})",
        "" if row.peak_mb is None else f"{row.peak_mb:.0f} ({row.teacher_mb:.0f})",
        "" if row.violations is None else f"no, {row.violations}" if row.violations else "yes",
        _cell(row.relative_error, ".1e"),
    ]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def gaps(row: Coverage) -> list[str]:
    """What of a network is approximate and what has no rule, a line each."""
    lines = [f"{what}: {_nodes(count)}" for what, count in row.approximations.items()]
    for operator, paths in row.missing.items():
        lines.append(f"`{operator}`: {_nodes(len(paths))} without a rule, first {place(paths[0])}")
    return lines


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"


def page(
    rows: Sequence[Coverage], hardware: str, measured: str, left_out: Sequence[str] = ()
) -> str:
    """``docs/coverage.md``.

    Args:
        rows: of all networks.
        hardware: the target's name.
        measured: how long it took and on what.
        left_out: what was not measured and why, a line each.
    """
    kinds = Counter(row.converts for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES if _installed(name))
    approximate = [row for row in rows if row.approximations and not row.stopped]
    stopped = [row for row in rows if row.stopped]
    text = [
        "# What converts",
        "",
        f"Of {len(rows)} published networks {kinds['exactly']} convert exactly, "
        f"{kinds['approximately']} with approximations and {kinds['no']} not, for the target "
        f"`{hardware}`. Weights and batch-norm statistics are random, which changes neither cost "
        "nor exactness. `archnet coverage package.module:callable input=3x224x224` says the same "
        "of your own network.",
        "",
        f"Written by `archnet coverage` on {time.strftime('%Y-%m-%d')}, {measured}; {versions}.",
        "",
        *(f"Left out: {line}." for line in left_out),
        *([""] if left_out else []),
        *_markdown([list(COLUMNS), *map(cells, rows)]),
        "",
        *(f"- *{name}*: {meaning}." for name, meaning in COLUMNS.items() if meaning),
    ]
    if approximate:
        text += ["", "## What is approximate", ""]
        text += ["Operators of the teacher, with the rule that replaces them in brackets.", ""]
        text += _listed(approximate)
    if stopped:
        text += ["", "## Where it stops", ""]
        text += _listed(stopped)
    return "\n".join(text) + "\n"


def _listed(rows: Sequence[Coverage]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"- **{row.name}**" + (f": {row.stopped}" if row.stopped else ""))
        lines += [f"  - {line}" for line in gaps(row)]
    return lines


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]
