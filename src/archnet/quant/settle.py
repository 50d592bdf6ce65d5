"""Settling: a trained student is put on its grids, at scales that leave no rounding in doubt.

A runtime multiplies an accumulator by a scale in float32 and rounds; another divides, a third
sums a convolution in floats of its own order. Where an accumulator falls next to the border
between two integers, they disagree, and the files of one student do not give the same bits.
Accumulators are integers, though, and up to 4 bits the borders are few: the 15 numbers
(k + 1/2) / scale of every channel. Moving a channel's scale by at most one part in four thousand
puts them all so far from every integer that float32 arithmetic of any order ends on the same side.
At 8 bits there are too many borders for all of them; the widest margin that exists is taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from archnet.ops import (
    AFFINE,
    Activation,
    AddConstant,
    BatchNorm,
    Segments,
    Step,
    Student,
    Summing,
    WeightedOperator,
)
from archnet.ops.operators import split
from archnet.quant.attach import input_quantizers
from archnet.quant.quantizers import ActivationLSQ, BiasQuantizer, Quantizer, WeightDoReFa
from archnet.quant.units import rounded_by

REACH = 2.0**-12  # largest relative change of a scale, and largest shift of a batch norm in steps
CANDIDATES = 513  # scales tried per channel, evenly spaced within the reach
# Roundings of float32 (2^-24, relative) that a border should be away from every integer: of the
# threshold itself, which a multiplication or division rounds, and of the sum behind it.
ENOUGH = 16.0
EPSILON = 2.0**-24
TOGETHER = 2**12  # numbers of a shift that are settled at a time: memory is that of their levels
AT_ONCE = 2**18  # borders that are looked at together
SAFEST = 1e6  # roundings beyond which nothing more is told


@dataclass(frozen=True)
class Margin:
    """How safe the roundings of a layer are, after settling.

    ``roundings`` is the smallest distance of a border from an integer accumulator, in units of
    what float32 can err by there; above 1 every order of summation rounds alike.
    """

    step: str
    bits: int
    roundings: float


def settle(student: Student) -> list[Margin]:
    """Put weights and biases on their grids and choose scales with safe roundings, in place.

    The integers of the weights stay as they are; what they stand for changes by one part in four
    thousand at most. The student computes the same before and after, but for that.

    Args:
        student: quantized, trained.

    Returns:
        The margin of every layer whose result is rounded, in order.
    """
    consumers = student.consumers()
    sources = input_quantizers(student)
    with torch.no_grad():
        margins = _settle_activations(student, consumers, sources)
        for step in student.graph.steps:
            module = student.operator(step.name)
            target = rounded_by(student, consumers, step)
            margin: Margin | None
            if isinstance(module, WeightedOperator):
                margin = _settle_weights(step, module, target)
            elif isinstance(module, AFFINE) and target is not None:
                margin = _settle_shift(sources[step.name], step, module, target)
            else:
                continue
            margins += [margin] if margin is not None else []
    return margins


@dataclass(frozen=True)
class _Reading:
    """Integers from ``low`` to ``high``, worth ``unit`` steps of ``source`` each, that a target
    rounds; each is a sum of ``terms`` values.
    """

    step: Step
    source: Quantizer
    low: int
    high: int
    unit: float = 1.0
    terms: int = 1


def _readings(
    student: Student,
    consumers: Mapping[str, list[Step]],
    sources: Mapping[str, ActivationLSQ | None],
) -> dict[Quantizer, list[_Reading]]:
    """What is rounded without a weight of its own, by the quantizer that rounds it: integers of
    another grid, and sums of them.
    """
    found: dict[Quantizer, list[_Reading]] = {}
    shapes = student.graph.shapes
    for step in student.graph.steps:
        module, source = student.operator(step.name), sources[step.name]
        if source is None:
            continue
        reading, target = _Reading(step, source, source.low, source.high), None
        if isinstance(module, Activation):
            target = module.quantizer
        elif isinstance(module, Summing):
            target = rounded_by(student, consumers, step)
            terms = module.terms([shapes[name] for name in step.inputs])
            number, unit, _ = split(module.factor)
            ends = (number * terms * source.low, number * terms * source.high)
            reading = _Reading(step, source, *ends, unit, terms)
        if isinstance(target, Quantizer) and target is not source:
            found.setdefault(target, []).append(reading)
    return found


def _settle_activations(
    student: Student,
    consumers: Mapping[str, list[Step]],
    sources: Mapping[str, ActivationLSQ | None],
) -> list[Margin]:
    """Integers that are rounded to another grid: its scale moves off their borders.

    They are the first to settle, because the biases behind them follow their scales.
    """
    margins = []
    for target, readings in _readings(student, consumers, sources).items():
        if target.power_of_two and all(reading.source.power_of_two for reading in readings):
            continue
        logs = _candidates(target.log_scale)  # (J, 1)
        safety = torch.full(logs.shape, torch.inf, dtype=torch.float64, device=logs.device)
        borders = torch.arange(target.low, target.high, device=logs.device).double() + 0.5
        for reading in readings:
            unit = reading.source.scale.double() * reading.unit
            threshold = borders * logs.double().exp() / unit  # (J, K)
            distance = (threshold - threshold.round()).abs()
            # The errors of a sum in floats grow like a random walk over its terms.
            largest = max(-reading.source.low, reading.source.high)
            spread = math.sqrt(reading.terms) * largest if reading.terms > 1 else 0.0
            doubt = EPSILON * (4 * (1 + threshold.abs()) + spread)
            reached = (threshold > reading.low - 1) & (threshold < reading.high + 1)
            least = (distance / doubt).where(reached, torch.inf).amin(1, keepdim=True)
            safety = torch.minimum(safety, least)
        best = _first_enough(safety)
        target.log_scale.copy_(logs.gather(0, best[None])[0])
        least_safe = _least(safety, best)
        margins += [Margin(reading.step.name, target.bits, least_safe) for reading in readings]
    return margins


def _safety(result: Tensor, largest: Tensor, target: Quantizer) -> Tensor:
    """How far results are from a border between two integers, in roundings of float32.

    Args:
        result: in steps of the target.
        largest: magnitude of what was computed on the way.
        target: whose bounds tell which borders count.
    """
    distance = ((result - result.floor()) - 0.5).abs()
    inside = (result > target.low - 1) & (result < target.high + 1)
    return (distance / (EPSILON * 4 * (1 + largest))).where(inside, torch.inf)


def _settle_weights(
    step: Step, module: WeightedOperator, target: Quantizer | None
) -> Margin | None:
    weights, biases = module.weight_quantizer, module.bias_quantizer
    if not isinstance(weights, Quantizer):
        return None
    integers = weights.integers(module.weight)
    margin = None
    if target is not None and isinstance(biases, BiasQuantizer):
        margin = _choose_scales(step, module, integers, weights, biases, target)
    if not isinstance(weights, WeightDoReFa):  # whose integers do not depend on the scale
        scale = weights.scale.reshape(-1, *[1] * (integers.dim() - 1))
        module.weight.copy_(integers * scale)
    if isinstance(biases, BiasQuantizer):
        module.bias.copy_(biases.integers(module.bias) * biases.step())
    return margin


def _choose_scales(
    step: Step,
    module: WeightedOperator,
    integers: Tensor,
    weights: Quantizer,
    biases: BiasQuantizer,
    target: Quantizer,
) -> Margin:
    """The scale of each channel that is safe enough and nearest, else the safest."""
    source = biases.source
    if all(quantizer.power_of_two for quantizer in (weights, source, target)):
        # Float32 scales by powers of two without rounding: nothing is in doubt, ties included.
        return Margin(step.name, target.bits, SAFEST)
    logs = _candidates(weights.log_scale)
    ratio = logs.exp().double() * source.scale.double() / target.scale.double()  # (J, C)
    rows = integers.reshape(len(integers), -1).double()
    bias = biases.integers(module.bias).double()
    ends = torch.stack([rows * source.low, rows * source.high])
    lowest, highest = ends.amin(0).sum(1) + bias, ends.amax(0).sum(1) + bias
    # The errors of a sum in floats grow like a random walk over its terms.
    spread = rows.square().sum(1).sqrt() * source.high + bias.abs()
    borders = torch.arange(target.low, target.high, device=rows.device).double() + 0.5
    ratio = ratio.expand(-1, len(rows))
    safety = torch.zeros_like(ratio)  # (J, O)
    unsafe, first = torch.arange(len(rows), device=rows.device), 0
    while len(unsafe) and first < len(ratio):
        last = first + max(1, AT_ONCE // (len(unsafe) * len(borders)))
        threshold = borders / ratio[first:last, unsafe, None]  # (J, O, K)
        distance = (threshold - threshold.round()).abs()
        doubt = EPSILON * (4 * threshold.abs() + spread[unsafe, None])
        reached = (threshold > lowest[unsafe, None] - 1) & (threshold < highest[unsafe, None] + 1)
        found = (distance / doubt).where(reached, torch.inf).amin(2)
        safety[first:last, unsafe] = found
        enough = found >= ENOUGH
        if weights.channels == 1:  # One scale has to be enough for all.
            enough = enough.all(1, keepdim=True).expand_as(enough)
        unsafe, first = unsafe[~enough.any(0)], last
    if weights.channels == 1:
        safety = safety.amin(1, keepdim=True)
    best = _first_enough(safety)
    weights.log_scale.copy_(logs.expand(-1, safety.shape[1]).gather(0, best[None])[0])
    return Margin(step.name, target.bits, _least(safety, best))


def _settle_shift(
    source: Quantizer | None,
    step: Step,
    module: AddConstant | BatchNorm | Segments,
    target: Quantizer,
) -> Margin:
    """Few integers meet a batch norm's shift, or an added constant: it moves until none of them
    lands on a border.
    """
    if source is None:
        return Margin(step.name, target.bits, 0.0)
    levels = torch.arange(source.low, source.high + 1, device=module.bias.device).double()
    levels, unit = levels * source.scale.double(), target.scale.double()
    bias = module.bias.flatten()
    mean, slope = torch.zeros_like(bias).double(), torch.ones_like(bias).double()
    if isinstance(module, Segments):
        slope = module.weight.double().flatten()
    if isinstance(module, BatchNorm):
        mean = module.running_mean.double()
        slope = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
    offsets = _offsets(bias.device)[:, None] * unit
    least = SAFEST
    for first in range(0, len(bias), TOGETHER):
        some = slice(first, first + TOGETHER)
        result = (levels[:, None] - mean[some]) * slope[some]  # (K, C)
        shifts = offsets + bias[some].double()  # (J, C)
        safety = torch.zeros_like(shifts)
        unsafe = torch.arange(shifts.shape[1], device=bias.device)
        for index, shift in enumerate(shifts):
            moved = (result[:, unsafe] + shift[unsafe]) / unit
            largest = (result[:, unsafe] / unit).abs() + (shift[unsafe] / unit).abs()
            safety[index, unsafe] = _safety(moved, largest, target).amin(0)
            unsafe = unsafe[safety[index, unsafe] < ENOUGH]
            if not len(unsafe):
                break
        best = _first_enough(safety)
        bias[some] = shifts.gather(0, best[None])[0].to(bias.dtype)
        least = min(least, _least(safety, best))
    return Margin(step.name, target.bits, least)


def _offsets(device: torch.device) -> Tensor:
    """Relative changes to try, the smallest first."""
    offsets = torch.linspace(-REACH, REACH, CANDIDATES, dtype=torch.float64, device=device)
    return offsets[offsets.abs().argsort()]


def _candidates(log_scale: Tensor) -> Tensor:
    """(J, C) logarithms of scales to try, in the precision that the student stores."""
    changes = torch.log1p(_offsets(log_scale.device))[:, None]
    return (log_scale.double()[None] + changes).to(log_scale.dtype)


def _first_enough(safety: Tensor) -> Tensor:
    """(C,) the first candidate that is safe enough, or the safest where none is."""
    enough = safety >= ENOUGH
    return torch.where(enough.any(0), enough.to(torch.int8).argmax(0), safety.argmax(0))


def _least(safety: Tensor, best: Tensor) -> float:
    return round(min(float(safety.gather(0, best[None]).min()), SAFEST), 2)
