"""The walk: every node of the teacher in order, one rule each."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from archnet.capture import Inputs, Ref, TeacherGraph, TeacherNode, capture, inputs_of, stem
from archnet.capture.compare import difference, is_rounding
from archnet.config import OPERATORS, CostsConfig
from archnet.convert.advice import no_rule, way_apart
from archnet.convert.budget import Budget, Built, of_cycles, of_macs, within_budget
from archnet.convert.builder import Builder, ConversionError, TargetLimits
from archnet.convert.calibration import Calibration
from archnet.convert.compare import FITTED, compare
from archnet.convert.feature import Feature, Form, Value
from archnet.convert.fit import relative_error
from archnet.convert.fuse import fuse, with_products
from archnet.convert.moves import shorten
from archnet.convert.narrow import narrow
from archnet.convert.rules import RULES
from archnet.convert.rules.base import Alternative, Approximation, Site, Values, error_at
from archnet.convert.taps import choose_taps
from archnet.errors import ArchnetError, CaptureError
from archnet.hardware import Target, student_cost
from archnet.loaders import FITTING, Loadable, calibration_batches
from archnet.lower import lower
from archnet.ops import NodeReport, Student, Tap, WeightedOperator
from archnet.ops.scores import Axis, axis_of

_log = logging.getLogger(__name__)
Classes = Literal["auto"] | Axis | Mapping[str, Axis]  # where those of each result lie
PEELED = "peeled"  # the rule of a head behind the scores, in a student's report


def convert(
    teacher: nn.Module | TeacherGraph,
    example_inputs: Inputs | None = None,
    hardware: str | TargetLimits = "arch5",
    *,
    start: str = "exact",
    taps: Sequence[str] | None = None,
    inner_taps: bool = False,
    seed: int = 0,
    calibration: Loadable | None = None,
    approximation: Approximation | None = None,
    classes: Classes = "auto",
) -> Student:
    """Convert a trained network into a student of the target's operators.

    Args:
        teacher: the network (it is left untouched), or its captured graph.
        example_inputs: (B, C, H, W) or a tuple of inputs; fixes every size but the batch.
        hardware: the target's name or description.
        start: "exact" keeps the teacher's function; "random" draws new weights (Kaiming normal)
            and is there for ablations.
        taps: module paths whose outputs are compared in distillation; chosen from the graph
            (block outputs) when absent.
        inner_taps: whether outputs of approximations inside the blocks are compared as well.
        seed: of the random start.
        calibration: unlabelled inputs, a few hundred samples: a batch, a list of batches, or a
            loader, of which `archnet.loaders.FITTING` samples are read. What has no exact form
            is fitted to the teacher's features on them. `example_inputs` when absent.
        approximation: the forms that are fitted; its defaults when absent.
        classes: along which axis of a result its classes lie, the batch being axis 0; None: it has
            none, as a regression or an embedding. For each of several results by its name. "auto":
            where a softmax or an argmax behind it says so; else, of a single result, along axis 1
            of (B, K) and (B, K, H, W) and the last of (B, T, K); several results have none.

    Returns:
        The student in eval mode, on the CPU, float32; ``student.report`` tells what became of
        each node of the teacher. A softmax, log-softmax, sigmoid or argmax behind the scores is
        "peeled": the student gives the scores.

    Raises:
        CaptureError: the teacher cannot be captured.
        ConversionError: an operator has no rule, a tap's path or a result's name does not exist,
            or the student differs from the teacher where it should not.
    """
    target = Target.named(hardware) if isinstance(hardware, str) else hardware
    if isinstance(teacher, TeacherGraph):
        graph = teacher
    else:
        if example_inputs is None:
            raise ConversionError("convert needs example_inputs to capture the teacher")
        graph = capture(teacher, example_inputs)
    _require_rules(graph)
    tap_nodes = choose_taps(graph, taps)
    inputs = _fitting_inputs(graph, example_inputs, calibration)

    def build(form: Approximation) -> Built:
        return _build(graph, fuse(graph), target, tap_nodes, inputs, form, inner_taps)

    if start not in ("exact", "random"):
        raise ConversionError(f"convert.start={start}: choose exact or random")
    form = approximation or Approximation()
    if form.max_macs is not None and form.max_cost is None:
        target = _counted_in_macs(target)

    def budgets(student: Student) -> list[Budget]:
        found = []
        if form.max_cost is not None:
            whole = _everything(target)
            native = _build(graph, fuse(graph), whole, tap_nodes, inputs, Approximation(), False)
            found.append(of_cycles(form.max_cost, native.student))
        if form.max_macs is not None:
            found.append(of_macs(form.max_macs, student))
        return found

    built = within_budget(build, graph, form, budgets)
    built.student.graph.classes = _classes(built.student, graph, classes)
    for node in graph.head:
        _log.info("peeled %s at '%s': the student returns the scores", node.operator, node.path)
        built.student.report.append(NodeReport(node.path, node.operator, PEELED, True, 0, 0))
    if start == "random":
        randomise(built.student, seed)
        return built.student

    def search(samples: tuple[Tensor, ...]) -> None:
        """Build once more, and look at every node on the way."""
        if not graph.fixed_batch:
            _build(graph, fuse(graph), target, tap_nodes, samples, built.form, False, check=True)

    compare(built, graph, inputs, search)
    return built.student


def _fitting_inputs(
    graph: TeacherGraph, example: Inputs | None, calibration: Loadable | None
) -> tuple[Tensor, ...] | None:
    """What approximations are fitted to, all samples together, in the order of the inputs."""
    if calibration is None:
        return None if example is None else tuple(inputs_of(example).values())
    batches = calibration_batches(calibration, graph.takes, CaptureError, FITTING)
    parts = [(x,) if isinstance(x, Tensor) else x for x in batches]
    inputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(inputs_of(inputs, "calibration").values())


def _classes(student: Student, graph: TeacherGraph, asked: Classes) -> list[Axis]:
    """Where the classes of each result lie: as asked, as the teacher's head says, or by rule."""
    names = student.graph.output_names
    shapes = [student.graph.shapes[name] for name in student.graph.outputs]
    found = list(graph.classes)
    if len(names) == 1 and found[0] is None:
        found[0] = axis_of(shapes[0])
    if isinstance(asked, Mapping):
        for name in asked:
            if name not in names:
                raise ConversionError(
                    f"classes names '{name}', and the results are {', '.join(names)}"
                )
        found = [asked.get(name, axis) for name, axis in zip(names, found, strict=True)]
    elif asked != "auto":
        found = [asked for _ in names]
    for name, axis, shape in zip(names, found, shapes, strict=True):
        if axis is not None and not (axis and -len(shape) <= axis <= len(shape)):
            sizes = ", ".join(map(str, ("B", *shape)))
            raise ConversionError(
                f"classes={axis} is no axis of the result '{name}' ({sizes}) beside its batch"
            )
    return found


def _counted_in_macs(target: TargetLimits) -> Target:
    """A target on which multiply-accumulates are what costs: under a bound of theirs, operators are
    written with the fewest. Of ways with as many, that of fewest operators and moves is taken.
    """
    costs = CostsConfig(
        mac=1, depthwise=1, pixels=1, channels=1, depth=1, byte=0, launch=1e-3, turn=1e-2
    )
    return replace(Target.of(target), costs=costs)


def _everything(target: TargetLimits) -> Target:
    """A target of the same costs that has every operator: what the teacher costs there."""
    return replace(
        Target.of(target),
        name="everything",
        operators=OPERATORS,
        lacks=(),
        complete=False,
        limits={},
        max_channels=None,
        fc_per_position=True,
        keeps_functions=True,
    )


def native_cycles(
    teacher: TeacherGraph, inputs: Tensor, hardware: str | TargetLimits
) -> float | None:
    """Cycles of the teacher for one sample by a target's costs, were all its operators run there
    as they are; None where it cannot be written so.

    Args:
        teacher: captured.
        inputs: a few samples, for what is fitted even then.
        hardware: the target or its name.
    """
    target = Target.named(hardware) if isinstance(hardware, str) else hardware
    graph = fuse(teacher)
    try:
        built = _build(teacher, graph, _everything(target), [], (inputs,), Approximation(), False)
    except ArchnetError as error:
        _log.info("the teacher's cycles on %s are not known: %s", Target.of(target).name, error)
        return None
    return sum(row.cycles for row in built.student.report)


def _build(
    written: TeacherGraph,
    graph: TeacherGraph,
    target: TargetLimits,
    tap_nodes: Sequence[tuple[str, TeacherNode]],
    inputs: tuple[Tensor, ...] | None,
    form: Approximation,
    inner_taps: bool,
    *,
    check: bool = False,
) -> Built:
    """Every node by its rule, the approximate ones in the forms that ``form`` says.

    ``graph`` has one node for each attention, ``written`` is as the teacher has it. With ``check``
    a node that should be exact and is not ends the walk.

    A faithful form that saves less than ``form.min_gain`` is taken out where it stands, before what
    follows is fitted, and so is what only it reads.
    """
    live = _needed(graph, form, tap_nodes)
    builder = Builder(target)
    fitting = None if inputs is None else Calibration(graph, inputs, builder)
    builder.paths = {node.name: node.path for node in graph.nodes}
    values: dict[str, Values] = {
        name: builder.input(name, shape) for name, shape in graph.inputs.items()
    }
    batches, rows = graph.batches(), dict[str, NodeReport]()
    alternatives: dict[str, Alternative] = {}
    fitted: dict[str, Feature] = {}
    taps: dict[str, str] = {}
    unspoilt = set(graph.inputs)
    before, operators = _macs(written), {node.name: node.operator for node in written.nodes}
    uses = _uses(graph, live)
    built_once: set[str] = set()
    tapped = {node.name for _, node in tap_nodes}
    last_reader = {name: reader for reader, names in live.items() for name in names}
    last_reader.update(dict.fromkeys(graph.outputs, ""))
    for node in graph.nodes:
        if node.name not in live:
            continue
        builder.owner = node.name
        site = Site(node, values, builder, batches, fitting, form)
        value = RULES[node.operator].applied(site)
        if site.alternative is not None and site.alternative.saves_less_than(form.min_gain):
            form = replace(form, compact={**form.compact, node.name: site.alternative.reads})
            site = Site(node, values, builder, batches, fitting, form)
            value = RULES[node.operator].applied(site)
        if isinstance(value, Form):
            value.owner = value.owner or node.name
        if isinstance(value, Form) and (uses[node.name] > 1 or node.name in tapped):
            # Read once, a form folds into its reader; read twice, it would be computed twice.
            value = builder.build(value)
            built_once.update({node.name} - tapped)
        if isinstance(value, Feature) and node.name in tapped:
            # All that follows reads the tap itself, so that a block can start from it.
            value = Feature(value.shape, first=builder.first(value), axis=value.axis)
            taps[node.name] = builder.first(value)
            builder.kept.add(taps[node.name])
        if not isinstance(value, list) and value.shape != node.shape:
            raise ConversionError(
                f"{node.operator} {node.place} gives {node.shape} in the teacher, {value.shape} in "
                f"the student: {RULES[node.operator].file} has a fault; please report it with this "
                "operator's code"
            )
        values[node.name] = value
        if site.exact and unspoilt.issuperset(live[node.name]):
            unspoilt.add(node.name)
            if check and fitting is not None:
                _check(node, value, graph, fitting)
        error = None
        if not site.exact and not isinstance(value, list):
            error = relative_error(site.given(value), site.wanted())
        if error is not None and isinstance(value, Feature) and node.name not in tapped:
            fitted[node.name] = value
        if site.alternative is not None:
            alternatives[node.name] = site.alternative
        rows[node.name] = NodeReport(
            node.path,
            operators[node.name],
            RULES[node.operator].name,
            site.exact,
            before[node.name],
            0,
            error,
        )
        # Forms hold weights in float64: one that nobody reads again is let go.
        for name in set(live[node.name]):
            if last_reader[name] == node.name:
                values.pop(name, None)
        if fitting is not None:
            fitting.keep([v for found in values.values() for v in _each(found)])
    form = replace(form, min_gain=0.0)  # all are judged
    live = _needed(graph, form, tap_nodes)
    now = _uses(graph, live)
    if any(now[name] == 1 for name in built_once):
        # Its reader would be one layer with it, had the other one not been taken out since.
        return _build(written, graph, target, tap_nodes, inputs, form, inner_taps, check=check)
    for output, name in zip(graph.outputs, graph.names, strict=True):
        builder.owner = output
        if not batches[output].plain:
            said = f" '{name}'" if len(graph.outputs) > 1 else ""
            raise ConversionError(
                f"the teacher's result{said} does not have its samples along its first axis, or "
                "moves values between the samples of a batch: return it with the batch first "
                "(permute)"
            )
        (result,) = _each(values[output])
        builder.graph.outputs.append(builder.first(builder.build(result)))
    builder.graph.output_names = list(graph.names)
    builder.graph.taps = [
        Tap(path or node.name, node.name, taps[node.name]) for path, node in tap_nodes
    ]
    fitted = {name: fitted[name] for name in fitted if name in live}
    alternatives = {name: alternatives[name] for name in alternatives if name in live}
    if inner_taps:
        builder.graph.taps += _inner_taps(graph, fitted, {path for path, _ in tap_nodes})
    builder.graph.target = Target.of(target).description()
    student = Student(builder.graph, builder.modules).eval()
    student.drop_unread()  # slices of a split whose results nobody wants
    narrow(student)
    shorten(student)
    lowered = lower(student, target, weights=False)
    if Target.of(target).complete:
        by_name = {node.name: node for node in graph.nodes}
        for name, reason in lowered.misfits.items():
            raise error_at(
                by_name[builder.owners[name]],
                f"needs an operator that {Target.of(target).name} does not run ({reason}), and no "
                "way of writing it with what runs there is known: change its window, or take "
                "another target",
            )
    owners = dict(builder.owners)
    for step in student.graph.steps:  # moves that were made of others belong to what is moved
        owners.setdefault(step.name, owners.get(step.inputs[0], graph.outputs[-1]))
    ways: dict[str, dict[str, None]] = {}
    for name, way in lowered.ways.items():
        ways.setdefault(owners[name], {})[f"{way} ({lowered.reasons[name]})"] = None
    macs: Counter[str] = Counter()
    cycles: dict[str, float] = {}
    for cost in student_cost(lowered.student).steps:
        owner = owners[lowered.whole[cost.name]]
        macs[owner] += cost.macs
        cycles[owner] = cycles.get(owner, 0.0) + lowered.cycles[cost.name]
    read = {node.name for node in _live(written, TeacherNode.refs)}
    report = []
    for node in graph.nodes:
        if node.name in live:
            row = replace(
                rows[node.name],
                macs_after=macs[node.name],
                cycles=round(cycles.get(node.name, 0.0), 1),
                written="; ".join(ways.get(node.name, ())),
            )
        else:
            exact = node.name not in read
            rule = "unread" if exact else "left out"
            row = NodeReport(node.path, operators[node.name], rule, exact, before[node.name], 0)
        report.append(row)
    student.graph.report = _with_fused(report, written)
    scores = {}
    if fitting is not None and fitting.has_run and fitting.count <= FITTED:
        found = [node for node in graph.nodes if node.name in graph.outputs]
        scores = {node.name: fitting.target(node) for node in found}
    return Built(student, form, alternatives, unspoilt, scores)


def _with_fused(report: Sequence[NodeReport], written: TeacherGraph) -> list[NodeReport]:
    """The rows of all nodes; one that was left out is exact where all that read it are: they were
    read as one (scores and softmax of an attention that stays).
    """
    readers: dict[str, list[str]] = {}
    for node in written.nodes:
        for name in node.refs():
            readers.setdefault(name, []).append(node.name)
    rows = dict(zip((node.name for node in written.nodes), report, strict=True))
    for name, row in reversed(rows.items()):
        found = [rows[reader] for reader in readers.get(name, []) if rows[reader].rule != "unread"]
        if row.rule == "left out" and all(reader.exact for reader in found):
            rows[name] = replace(row, rule="fused", exact=True)
    return list(rows.values())


def _needed(
    graph: TeacherGraph, form: Approximation, tap_nodes: Sequence[tuple[str, TeacherNode]]
) -> dict[str, list[str]]:
    """The nodes that the student has, in forward order, each with the values that it reads.

    Raises:
        ConversionError: a tap stands at one that it does without.
    """
    live = {node.name: _reads(node, form) for node in _live(graph, lambda n: _reads(n, form))}
    for path, node in tap_nodes:
        if node.name not in live:
            raise ConversionError(
                f"convert.taps names '{path}', whose value the student does without: it stands in "
                "front of an attention, or nobody reads it"
            )
    return live


def _uses(graph: TeacherGraph, live: Mapping[str, Sequence[str]]) -> Counter[str]:
    """How often each value is read; a result of the network counts as a reader."""
    uses = Counter(name for names in live.values() for name in names)
    uses.update(graph.outputs)
    return uses


def _check(node: TeacherNode, value: Values, graph: TeacherGraph, fitting: Calibration) -> None:
    """Raise where a node that depends on no approximation differs from the teacher."""
    if isinstance(value, list) or node.batch.axis < 0 or not node.floating:
        return
    error = difference(fitting.value(value), fitting.target(node))
    peeled = {head.name for head in graph.head}
    if not is_rounding(error, graph.program, fitting.inputs, node.name, peeled):
        raise ConversionError(
            f"the student differs from the teacher from {node.operator} {node.place} on: relative "
            f"error {error:.1e}, although its rule ({RULES[node.operator].name}) is exact. This is "
            "a bug in the rule; please report it with the network"
        )


def _inner_taps(
    graph: TeacherGraph, fitted: Mapping[str, Feature], taken: Collection[str]
) -> list[Tap]:
    """Taps at outputs of approximations, where these are values of the student as they stand.

    What folded into a layer behind it, or is read in another order of axes alone, has no value of
    its own to compare.
    """
    nodes = [node for node in graph.nodes if node.name in fitted and node.batch.plain]
    # Losses go by path: where a module computes several of these, each has its node's name.
    found = Counter([node.path for node in nodes] + list(taken) + [""])
    return [
        Tap(
            node.path if found[node.path] == 1 else node.name,
            node.name,
            first,
            inner=True,
        )
        for node in nodes
        if (first := fitted[node.name].first) is not None and node.name not in graph.outputs
    ]


def _each(found: Values) -> list[Value]:
    return found if isinstance(found, list) else [found]


def _reads(node: TeacherNode, form: Approximation) -> list[str]:
    """The values that the student needs where the teacher has this node."""
    if node.name in form.compact:
        return list(form.compact[node.name])
    rule = RULES.get(node.operator)
    return node.refs() if rule is None or rule.reads is None else rule.reads(node, form)


def _live(graph: TeacherGraph, reads: Callable[[TeacherNode], list[str]]) -> list[TeacherNode]:
    """The nodes that a result depends on, in forward order.

    In the student what an approximation does without (queries, keys and masks of an attention) is
    not among them.
    """
    wanted, found = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if node.name in wanted:
            wanted.update(reads(node))
            found.append(node)
    return found[::-1]


def missing_rules(graph: TeacherGraph) -> dict[str, list[TeacherNode]]:
    """The operators that no rule converts, with their nodes, in forward order."""
    missing: dict[str, list[TeacherNode]] = {}
    for node in _wanted(graph):
        if node.operator not in RULES:
            missing.setdefault(node.operator, []).append(node)
    return missing


def _wanted(graph: TeacherGraph) -> list[TeacherNode]:
    """The nodes that a student needs in its richest form."""
    return _live(with_products(graph), lambda node: _reads(node, Approximation()))


def _require_rules(graph: TeacherGraph) -> None:
    by_name = {node.name: node for node in graph.nodes}
    for node in (by_name[wanted.name] for wanted in _wanted(graph)):
        if node.batch.axis < 0:
            raise error_at(
                node,
                "works along the batch, or moves values between the samples of a batch, which a "
                f"student never sees together: {way_apart(node.operator)}",
            )
        if 0 in node.shape:
            raise error_at(node, f"gives no value ({node.shape} of a sample): leave it out")
    if missing := missing_rules(graph):
        raise ConversionError(no_rule(missing))


def _macs(graph: TeacherGraph) -> dict[str, int]:
    """Multiply-accumulates of every node of the teacher for one sample: convolutions, linear
    layers and matrix products, those of attention included.
    """
    shapes = graph.inputs | {node.name: node.shape for node in graph.nodes}

    def sizes_of(item: Ref | Tensor) -> tuple[int, ...]:
        return shapes[item.name] if isinstance(item, Ref) else tuple(item.shape)

    found = {}
    for node in graph.nodes:
        given, depth = node.arguments, 0
        kind = stem(node.operator)
        if kind in ("conv2d", "linear") and isinstance(given.get("weight"), Tensor):
            depth = math.prod(given["weight"].shape[1:])
        elif kind == "matmul":
            depth = sizes_of(given["self"])[-1]
        found[node.name] = math.prod(node.shape) * depth
        if kind == "conv_transpose2d":
            weight, source = given["weight"], sizes_of(given["input"])
            found[node.name] = math.prod(source) * math.prod(sizes_of(weight)[1:])
        if kind == "scaled_dot_product_attention":
            # For every query the products with all keys, and the sum of all values.
            query, key, value = (sizes_of(given[name]) for name in ("query", "key", "value"))
            # Of one axis they are along the batch, which the rule refuses.
            keys = math.prod(key[-2:-1])
            found[node.name] = math.prod(query[:-1]) * keys * sum((*query[-1:], *value[-1:]))
    return found


def randomise(student: Student, seed: int) -> None:
    """Draw new weights for everything that is trained; constants of the conversion stay."""
    generator = torch.Generator().manual_seed(seed)
    for module in student.modules():
        if isinstance(module, WeightedOperator) and module.trainable:
            fan_in = module.weight[0].numel()
            with torch.no_grad():
                module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
                module.bias.zero_()
