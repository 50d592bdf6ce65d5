"""Every form of a student against its golden model, and the first step where one departs."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from archnet.deploy.export import form_named, write
from archnet.deploy.integer import IntegerModel, Integers, Kind, execute, to_integers
from archnet.deploy.runtime import (
    compile_openvino,
    load_session,
    missing_extra,
    require_shapes,
    run_qonnx,
    run_session,
)
from archnet.deploy.writer import ExportError, Grid, Transpose, Value
from archnet.lower import deployed, lower
from archnet.ops import Activation, Concat, LayoutMove, MaxPool, Step, Student
from archnet.ops.scores import changed
from archnet.quant import Quantizer

BATCH = 64  # inputs a run
EXPLAINED = 16  # inputs on which every step is compared, of those whose result differs

# name -> (B, ...) of the result and of further tensors.
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Divergence:
    """The first step whose integers are others than the golden model's.

    ``values`` of ``total`` differ, by ``steps`` of their grid at most, on the inputs looked at.
    ``origin`` is the teacher's module path that the step comes from, "" for the input.
    """

    step: str
    origin: str
    values: int
    total: int
    steps: float

    def __str__(self) -> str:
        return (
            f"{self.step} ({self.origin or 'the input'}): {self.values:,} of {self.total:,} "
            f"values differ, by {self.steps:g} steps at most"
        )


@dataclass(frozen=True)
class Check:
    """One form, run by one runtime, against the golden model.

    Attributes:
        name: what was run.
        runtime: what ran it, with its version.
        inputs: how many were run.
        max_steps: largest difference of an output, in units of an output accumulator (or steps
            of the output's grid); inf where an output is no number.
        bit_equal: share of the outputs without any difference, 0 to 1.
        changed: decisions that changed, of ``decisions`` (samples, pixels or tokens; 0 of a result
            without classes); a tie between equal scores may go either way.
        first: where they part, if they do; None as well where they do not when every step is read.
        hint: what a known cause of a difference is, and what avoids it; "" without a difference.
        skipped: why nothing was run; "" where it was.
        sentences_changed: of a translator, how many translations are others than the golden
            model's; None of other students.
    """

    name: str
    runtime: str
    inputs: int = 0
    max_steps: float = 0.0
    bit_equal: float = 1.0
    changed: int = 0
    decisions: int = 0
    first: Divergence | None = None
    hint: str = ""
    skipped: str = ""
    sentences_changed: int | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data (JSON); what is no number is None."""
        if self.skipped:
            return {"skipped": self.skipped}
        values = asdict(self)
        del values["name"], values["hint"], values["skipped"]
        if self.sentences_changed is None:
            del values["sentences_changed"]
        for part in (values, values["first"] or {}):
            for key in ("max_steps", "steps"):
                if key in part and not math.isfinite(part[key]):
                    part[key] = None
        return values


@dataclass(frozen=True)
class _Runtime:
    """How the files of a form are run: ``execute(model, images, tensors)``.

    ``limit`` is the most inputs that it is given; ``hint`` explains differences of a student with
    8-bit weights.
    """

    form: str
    package: str
    execute: Callable[[onnx.ModelProto, NDArray[np.float32], Sequence[str]], Tensors]
    limit: float = math.inf
    hint: str = ""


def verify(
    student: Student,
    images: NDArray[Any],
    forms: Sequence[str] | None = None,
    files: Mapping[str, Path] | None = None,
    requantization: Kind = "multiplier",
) -> list[Check]:
    """Run a student in PyTorch and in its exported forms; compare each with the golden model.

    Args:
        student: quantized, trained; it stays as it is.
        images: (N, C, H, W).
        forms: of `archnet.deploy.FORMS`, those in `RUNNABLE`; None: all of these.
        files: name -> an ONNX file that was exported from the student, also to be run in ONNX
            Runtime; its steps are found by the names that this student's export gives them.
        requantization: of the golden model, as the target has it; see `to_integers`.

    Returns:
        A check for PyTorch in float32, one for PyTorch in float64 (where products are exact, and
        the input is quantized in float32 as everywhere), and one for each file and form.

    Raises:
        ExportError: an unknown form, a student that is no integer model, or a file that cannot
            be run.
    """
    forms = RUNNABLE if forms is None else forms
    for form in forms:
        _check_runnable(form)
    student = copy.deepcopy(student).cpu().eval()
    images = np.ascontiguousarray(images, np.float32)
    golden = _Golden(student, images, requantization)
    checks = [
        golden.check("pytorch float32", "torch", _PyTorch(student, golden.model, torch.float32)),
        golden.check("pytorch float64", "torch", _PyTorch(student, golden.model, torch.float64)),
    ]
    for name, path in (files or {}).items():
        file = _File(student, "qdq", RUNTIMES["qdq"].execute, _load(path))
        checks.append(golden.check(name, "onnxruntime", file))
    for name, runtime in RUNTIMES.items():
        if runtime.form not in forms:
            continue
        missing = missing_extra(runtime.package)
        if missing:
            checks.append(Check(name, runtime.package, skipped=missing))
        else:
            file = _File(student, runtime.form, runtime.execute)
            check = golden.check(name, runtime.package, file, runtime.limit)
            widest = max(step.weight_bits for step in golden.model.steps)
            if check.bit_equal < 1 and widest == 8:
                check = replace(check, hint=runtime.hint)
            checks.append(check)
    return checks


class _Golden:
    """The golden model's results, and what is compared with them."""

    def __init__(self, student: Student, images: NDArray[np.float32], requantization: Kind) -> None:
        self.student, self.images = student, images
        self.lowered = lower(student)
        self.model = to_integers(student, requantization)
        self.integers = self.model.results(images, BATCH)
        self.places = _places(self.lowered.student, self.model)
        # Those of the student itself: values that are rounded in both.
        self.whole_places = {
            name: self.places[value]
            for name, value in self.lowered.values.items()
            if value in self.places
        }

    def check(
        self, name: str, package: str, subject: "_PyTorch | _File", limit: float = math.inf
    ) -> Check:
        """Run ``subject`` on the first ``limit`` images."""
        count = int(min(limit, len(self.images)))
        images, golden = self.images[:count], [integers[:count] for integers in self.integers]
        values = subject.run(images, [])
        results = [values[name] for name in subject.outputs]
        require_shapes(name, results, golden)
        wrong, differences = [], []
        for place, (found, integers) in enumerate(zip(results, golden, strict=True)):
            expected, unit = integers, self.model.unit(self.model.outputs[place])
            wrong.append(changed(expected * unit, found, self.student.graph.classes[place]))
            if (grid := subject.grids[place]) is not None:
                expected, unit = _on_grid(expected * unit, grid), np.array(grid.scale)
            differences.append(steps_off(found / unit, expected).reshape(count, -1))
        difference = np.concatenate(differences, 1)
        differing = np.flatnonzero((difference > 0).any(1))
        return Check(
            name,
            f"{package} {version(package)}",
            count,
            float(difference.max()),
            float((difference == 0).mean()),
            sum(int(decisions.sum()) for decisions in wrong),
            sum(decisions.numel() for decisions in wrong),
            self._explain(subject, images[differing[:EXPLAINED]]) if differing.size else None,
        )

    def _explain(
        self, subject: "_PyTorch | _File", images: NDArray[np.float32]
    ) -> Divergence | None:
        """The first step that differs on some images."""
        is_whole = isinstance(subject, _PyTorch)
        places = self.whole_places if is_whole else self.places
        student = self.student if is_whole else self.lowered.student
        expected = self.model.run(images, list(places.values()))
        found = subject.run(images, list(places))
        for step in student.graph.steps:
            if step.name not in found:
                continue
            results = [i for i, name in enumerate(subject.outputs) if name == step.name]
            place = self.model.outputs[results[0]] if results else places[step.name]
            unit: Any = self.model.unit(place) if results else self.model.grids[place].scale
            wanted = expected[place]
            if results and (grid := subject.grids[results[0]]) is not None:
                wanted, unit = _on_grid(wanted * unit, grid), grid.scale
            difference = steps_off(found[step.name] / unit, wanted)
            if difference.any():
                return Divergence(
                    step.name,
                    _origin(student, step),
                    int((difference > 0).sum()),
                    difference.size,
                    float(difference.max()),
                )
        return None


def _origin(student: Student, step: Step) -> str:
    """The teacher's module path: its own, or that of the nearest step before that has one."""
    steps = {item.name: item for item in student.graph.steps}
    while not step.origin and step.inputs[0] in steps:
        step = steps[step.inputs[0]]
    return step.origin


def _on_grid(values: NDArray[Any], grid: Grid) -> Integers:
    """The integers that a file rounds the golden model's result to."""
    return np.clip(np.rint(values / grid.scale), grid.low, grid.high).astype(np.int32)


def steps_off(found: NDArray[Any], expected: Integers) -> NDArray[np.float64]:
    """Distances from the integers expected; what is no number is infinitely far."""
    difference = np.abs(np.rint(found.astype(np.float64)) - expected)
    return np.where(np.isnan(difference), np.inf, difference)


def _places(student: Student, model: IntegerModel) -> dict[str, str]:
    """For every step of the student whose values are rounded, their name in the golden model."""
    rounded: dict[str, str] = {}

    def is_rounded(step: Step) -> bool:
        module = student.operator(step.name)
        if isinstance(module, Activation) and isinstance(module.quantizer, Quantizer):
            return True
        moves = isinstance(module, LayoutMove | MaxPool | Concat | Activation)
        return moves and all(name in rounded for name in step.inputs)

    for step in student.graph.steps:
        if is_rounded(step):
            rounded[step.name] = model.aliases.get(step.name, step.name)
    return rounded


class _PyTorch:
    """The student itself."""

    def __init__(self, student: Student, model: IntegerModel, dtype: torch.dtype) -> None:
        self.student, self.model, self.dtype = copy.deepcopy(student).to(dtype), model, dtype
        self.outputs = student.graph.outputs
        self.grids: list[Grid | None] = [None for _ in self.outputs]

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> Tensors:
        """The results and the values ``names``, (N, ...)."""
        wanted = list(dict.fromkeys([*names, *self.outputs]))
        parts = []
        with torch.inference_mode():
            for first in range(0, len(images), BATCH):
                values = self._sources(images[first : first + BATCH])
                found = self.student.run(values, [name for name in wanted if name not in values])
                computed = dict(zip([n for n in wanted if n not in values], found, strict=True))
                parts.append([{**values, **computed}[name].numpy() for name in wanted])
        return {
            name: np.concatenate(p)
            for name, p in zip(wanted, zip(*parts, strict=True), strict=True)
        }

    def _sources(self, images: NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """What the student starts from: the input; in float64, the input once it is quantized."""
        if self.dtype == torch.float32:
            return {self.model.input: torch.from_numpy(images)}
        sources = {}
        for step in self.model.steps:
            module = step.operator
            if step.inputs == (self.model.input,) and isinstance(module, Activation):
                integers = execute(step, [images], self.model)
                quantizer = self.student.operator(step.name).get_submodule("quantizer")
                assert isinstance(quantizer, Quantizer)
                sources[step.name] = torch.from_numpy(integers).to(self.dtype) * quantizer.scale
        return sources


class _File:
    """An exported file in a runtime.

    Args:
        student: it was exported from.
        form: of the file; where its values stand in it follows from it.
        execute: see `_Runtime`.
        model: what a file holds; None: it is exported now.
    """

    def __init__(
        self,
        student: Student,
        form: str,
        execute: Callable[..., Tensors],
        model: onnx.ModelProto | None = None,
    ) -> None:
        written, self.values = write(student, form)
        self.model, self.execute = model or written, execute
        self.outputs = deployed(student).graph.outputs
        # Those of the dialect, where the golden model has none.
        self.grids = [self.values[name].grid for name in self.outputs]

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> Tensors:
        """The results and those of the values ``names`` that the file holds, (N, ...)."""
        graph = self.model.graph
        held = {output for node in graph.node for output in node.output}
        values = {name: self.values[name] for name in names if self.values[name].tensor in held}
        found = self.execute(self.model, images, [value.tensor for value in values.values()])
        tensors = {name: _moved(found[value.tensor], value) for name, value in values.items()}
        results = [found[item.name] for item in graph.output]
        return {**tensors, **dict(zip(self.outputs, results, strict=False))}


def _moved(tensor: NDArray[Any], value: Value) -> NDArray[Any]:
    """What a value's tensor stands for: its moves made, its integers multiplied by their scale."""
    if value.grid is not None:
        tensor = (tensor.astype(np.float64) - value.grid.zero) * value.grid.scale
    for move in value.moves:
        if isinstance(move, Transpose):
            tensor = tensor.transpose(move.order)
        else:
            tensor = tensor.reshape(move.shape)
    return tensor


def _in_onnxruntime(
    model: onnx.ModelProto, images: NDArray[np.float32], tensors: Sequence[str]
) -> Tensors:
    model = _with_outputs(model, tensors)
    session = load_session(model.SerializeToString())
    names = [item.name for item in session.get_outputs()]
    parts = [
        run_session(session, images[first : first + BATCH], "the model")
        for first in range(0, len(images), BATCH)
    ]
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _in_openvino(
    model: onnx.ModelProto,
    images: NDArray[np.float32],
    tensors: Sequence[str],
    exact: bool = False,
) -> Tensors:
    model = _with_outputs(model, tensors)
    compiled = compile_openvino(model.SerializeToString(), exact)
    names = [item.name for item in model.graph.output]
    parts = []
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or BATCH
    for first in range(0, len(images), size):
        results = compiled([images[first : first + size]])
        parts.append([results[index].copy() for index in range(len(names))])
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


# How the forms are run that a runtime for Python exists for, by the name of the check.
RUNTIMES: Mapping[str, _Runtime] = {
    "qdq": _Runtime("qdq", "onnxruntime", _in_onnxruntime),
    "subbyte": _Runtime("subbyte", "onnxruntime", _in_onnxruntime),
    # It executes node by node, each in a session of its own.
    "qonnx": _Runtime("qonnx", "qonnx", run_qonnx, limit=100),
    "openvino": _Runtime(
        "openvino",
        "openvino",
        _in_openvino,
        hint="without VNNI its int8 kernels saturate at 8-bit weights; weights of 7 bits "
        "(quant.first_bits=7 quant.last_bits=7) run exactly",
    ),
    "openvino in floats": _Runtime("openvino", "openvino", partial(_in_openvino, exact=True)),
}
RUNNABLE = tuple(dict.fromkeys(runtime.form for runtime in RUNTIMES.values()))


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with further tensors among its outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    known = {item.name for item in result.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in known:
            result.graph.output.append(onnx.ValueInfoProto(name=name))
    return result


def _load(path: Path) -> onnx.ModelProto:
    load_session(path)  # Whose errors name the file.
    return onnx.load(path)


def _check_runnable(form: str) -> None:
    form_named(form)
    if form not in RUNNABLE:
        raise ExportError(f"form={form} is not run here; these are: {', '.join(RUNNABLE)}")
