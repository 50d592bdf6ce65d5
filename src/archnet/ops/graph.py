"""A student without its weights: its steps, its taps, and what became of the teacher's nodes."""

from dataclasses import dataclass, field
from typing import Any

from archnet.ops.scores import Axis


@dataclass(frozen=True)
class Step:
    """One operator at work: reads ``inputs``, writes the value ``name``.

    ``origin`` is the module path in the teacher that the step came from.
    """

    name: str
    inputs: tuple[str, ...]
    origin: str = ""


@dataclass(frozen=True)
class Tap:
    """A pair of points whose features are compared: ``path`` in the teacher, ``value`` here.

    ``node`` is the teacher's graph node that carries the feature. An ``inner`` one is at the
    output of an approximation inside a block: the block neither begins nor ends there.
    """

    path: str
    node: str
    value: str
    inner: bool = False


@dataclass
class NodeReport:
    """What became of one node of the teacher.

    ``error`` of an approximation is |student - teacher| / |teacher| at its output, on the inputs
    it was fitted to, before any training; the student's own input has the errors before it.
    ``cycles`` are the student's, by its target's own costs (`archnet.hardware.estimate`).
    ``written`` says how what the target does not run as it is is written there, and why.
    """

    path: str
    operator: str
    rule: str
    exact: bool
    macs_before: int
    macs_after: int
    error: float | None = None
    cycles: float = 0.0
    written: str = ""


@dataclass
class Refinement:
    """A node of the teacher that has a compact and a faithful form; together they are the curve of
    error over cost, in the order in which a budget takes them.

    ``compact`` and ``faithful`` are the errors |student - teacher| / |teacher| at the node's
    output; ``cost`` is what the faithful form adds, with the layers that it alone needs, and
    ``total`` the student's cost with this one and all before it, both as multiples of the
    teacher's: cycles under `convert.max_cost`, else multiply-accumulates; ``taken`` says whether
    the student has the faithful form.
    """

    path: str
    operator: str
    compact: float
    faithful: float
    cost: float
    total: float
    taken: bool


@dataclass
class StudentGraph:
    """The student without its weights: plain data.

    ``outputs`` are the values that it returns, each with a name of its own in ``output_names``,
    which files have as well. ``classes`` says for each along which axis its classes lie, the batch
    being axis 0; None: it has none (`archnet.ops.scores`).
    ``indices`` are the inputs that hold token numbers or marks instead of features;
    ``refinements`` are there where a budget has chosen between forms (`convert.max_cost`);
    ``error`` is |student - teacher| / |teacher| at the output when the student was made, in floats
    and before any training; None where they were not compared. ``target`` describes the hardware
    that it was made for (`archnet.hardware.Target.description`); empty: arch5. ``output_ranges``
    are the least and the largest number of each result on calibration inputs; []: not quantized.
    ``preprocessing`` says how a sample becomes the input, as whoever made the student states it;
    files carry it on.
    """

    inputs: list[str]
    outputs: list[str]
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)
    report: list[NodeReport] = field(default_factory=list)
    indices: list[str] = field(default_factory=list)
    refinements: list[Refinement] = field(default_factory=list)
    error: float | None = None
    target: dict[str, Any] = field(default_factory=dict)
    output_ranges: list[tuple[float, float]] = field(default_factory=list)
    classes: list[Axis] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        several = len(self.outputs) > 1
        self.classes = self.classes or [None for _ in self.outputs]
        self.output_names = self.output_names or [
            f"output_{index}" if several else "output" for index in range(len(self.outputs))
        ]
