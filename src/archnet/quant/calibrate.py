"""Scales of least squared error, from weights and from unlabelled batches."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from archnet.ops import AFFINE, Student, WeightedOperator
from archnet.quant.attach import QuantizationError
from archnet.quant.quantizers import (
    SCALE_FLOOR,
    BiasQuantizer,
    Quantizer,
    WeightDoReFa,
    WeightLSQ,
    signed_range,
)

_log = logging.getLogger(__name__)

CANDIDATES = 64  # scales tried, evenly spaced up to the one that clips nothing
SAMPLES = 32768  # values kept per activation
CHANNEL_SAMPLES = 2**17  # values kept of a value with channels
AT_ONCE = 2**26  # numbers in the largest value that is observed at once
# In steps of an accumulator: float32, in which PyTorch adds it, tells these apart with room for the
# roundings of a sum.
LARGEST_BIAS = 2.0**20
LARGEST_SHARE = 16  # of a bias beside what weights usually add up to, which at 8 bits is more
ROUNDING = 1e-6  # of a row's largest number: what float32 leaves of numbers that are on a grid
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-126, 2.0**96  # of accumulators that float32 holds
ZERO_POINTS = 8  # lowest levels tried between 0 and half of the grid
_WORTH = 0.9  # of the squared error on a symmetric grid: an offset costs the chip something


def best_scale(values: Tensor, low: int, high: int, power_of_two: bool = False) -> Tensor:
    """The scale with the least squared rounding error, for each row.

    Args:
        values: (R, N), one row per scale.
        low, high: integer bounds of the grid.
        power_of_two: whether only powers of two are tried.

    Returns:
        (R,) positive scales; a row of zeros gets the floor.
    """
    # Squares of 1e-30 and of 1e30 are no float32: rows are brought to the size of one, exactly.
    size = _power_of_two(values.abs().amax(1))
    values = values * size[:, None]
    peak = torch.maximum(
        values.amax(1).clamp_min(0) / max(high, 1), -values.amin(1).clamp_max(0) / max(-low, 1)
    )
    if low == 0:
        peak = values.amax(1).clamp_min(0) / high
    best, least = peak.clone(), torch.full_like(peak, torch.inf)
    if power_of_two:
        outermost = torch.exp2(peak.clamp_min(SCALE_FLOOR).log2().ceil())
        tried = [outermost / 2**halvings for halvings in range(6)]
    else:
        tried = [peak * (index / CANDIDATES) for index in range(1, CANDIDATES + 1)]
    for candidate in tried:
        scale = candidate.clamp_min(SCALE_FLOOR)
        levels = (values / scale[:, None]).round_().clamp_(low, high)
        error = levels.mul_(scale[:, None]).sub_(values).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return (best / size).clamp_min(SCALE_FLOOR)


def _power_of_two(peak: Tensor) -> Tensor:
    """The factor that brings each number to [1/2, 1), as float32's exponent says it."""
    exponent = torch.frexp(peak.float()).exponent.clamp(-125, 126)
    return ((127 - exponent) << 23).view(torch.float32).to(peak.dtype)


def weight_scale(quantizer: Quantizer, module: WeightedOperator) -> Tensor:
    """The scale that the quantizer of a layer's weights starts from, (channels,).

    A DoReFa quantizer gets its span as well.
    """
    weight = module.weight.detach()
    rows = weight.reshape(quantizer.channels, -1)
    if isinstance(quantizer, WeightDoReFa):
        return quantizer.fit(weight)
    if quantizer.bits == 1:
        return rows.abs().mean(1)
    best = best_scale(rows, quantizer.low, quantizer.high, quantizer.power_of_two)
    return best if module.trainable else _exact_scale(rows, quantizer.low, quantizer.high, best)


def _exact_scale(rows: Tensor, low: int, high: int, best: Tensor) -> Tensor:
    """The largest power of two of which a row's numbers are whole multiples on the grid; the best
    scale where there is none, or where that holds them exactly as well.

    Enlarging by a whole factor has such rows: a bilinear one by r weighs pixels by multiples of
    1 / (2 r).
    """

    def error(scale: Tensor) -> Tensor:
        levels = (rows / scale[:, None]).round().clamp(low, high)
        return (levels * scale[:, None] - rows).abs().amax(1) / rows.abs().amax(1).clamp_min(1e-30)

    found, open_ = best, error(best) > ROUNDING
    scale = 1 / _power_of_two(rows.abs().amax(1))
    for _ in range(high.bit_length() + 1):
        fits = open_ & (error(scale) == 0)
        found, open_ = torch.where(fits, scale, found), open_ & ~fits
        scale = scale / 2
    return found


def calibrate_weights(student: Student) -> None:
    """Set the scale of every weight quantizer."""
    for module in student.modules():
        if isinstance(module, WeightedOperator) and isinstance(module.weight_quantizer, Quantizer):
            quantizer = module.weight_quantizer
            quantizer.set_scale(weight_scale(quantizer, module))


def make_room_for_biases(student: Student) -> None:
    """Raise the scale of weights that are so small beside their bias that it fits no accumulator.

    Weight decay leaves channels like that, or a whole layer (squeeze-and-excitation that a teacher
    has no use for). What weights lose by the coarser grid is a thousandth of the bias at most.
    Weights that are all zero get the scale of the layer's others.

    Raises:
        QuantizationError: an accumulator's unit is no number of float32 (naming the step).
    """
    for step in student.graph.steps:
        module = student.operator(step.name)
        if not isinstance(module, WeightedOperator):
            continue
        quantizer, biases = module.weight_quantizer, module.bias_quantizer
        if not isinstance(quantizer, Quantizer) or not isinstance(biases, BiasQuantizer):
            continue
        source = biases.source
        rows = quantizer.integers(module.weight.detach()).reshape(len(module.weight), -1)
        usual = rows.square().sum(1).sqrt() * max(-source.low, source.high)
        most = (LARGEST_SHARE * usual).clamp_min(LARGEST_BIAS)
        # One division after another: the product may be no number of float32.
        least = module.bias.detach().abs() / most / source.scale.detach()
        empty = ~rows.any(1)
        if quantizer.channels == 1:
            least, empty = least.amax().reshape(1), empty.all().reshape(1)
        scale = quantizer.scale.detach()
        others = scale[~empty].mean() if not bool(empty.all()) else torch.ones_like(scale[0])
        scale = torch.where(empty, torch.where(least > 0, least, others), scale)
        if isinstance(quantizer, WeightLSQ):  # The levels of the other kind follow no scale.
            scale = torch.maximum(scale, least)
        quantizer.set_scale(scale)
        if rows.any() and not quantizer.integers(module.weight.detach()).any():
            _log.warning(
                "%s: its weights are too small beside its biases to be quantized, so that its "
                "result is constant",
                _said(student, step.name),
            )
        unit = quantizer.scale.detach().double() * source.scale.detach().double()
        if not bool(((unit >= SMALLEST_UNIT) & (unit <= LARGEST_UNIT)).all()):
            raise QuantizationError(
                f"{_said(student, step.name)}: scales of its weights times the scale of its input "
                f"are {float(unit.min()):.3g} to {float(unit.max()):.3g}, beyond the range of "
                "float32: its weights or its input are too small or too large to be quantized"
            )


def require_finite(student: Student) -> None:
    """Refuse a student with weights, biases or statistics that are not finite.

    Raises:
        QuantizationError: naming the step.
    """
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, WeightedOperator | AFFINE):
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise QuantizationError(
                        f"{_said(student, step.name)}: its {name} is not finite (nan or inf)"
                    )


def _said(student: Student, name: str) -> str:
    """A step, or of a value in which nothing was computed the step before that did."""
    by_name = {step.name: step for step in student.graph.steps}
    while name in by_name:
        step = by_name[name]
        if isinstance(student.operator(name), WeightedOperator | AFFINE) or not step.inputs:
            break
        if step.inputs[0] not in by_name:
            break
        name = step.inputs[0]
    origin = by_name[name].origin if name in by_name else ""
    return f"step {name}" + (f", from '{origin}' in the teacher" if origin else "")


def observe(
    student: Student,
    names: Sequence[str],
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    seed: int = 0,
) -> dict[str, Tensor]:
    """A sample of each named value over some batches, flattened (at most `SAMPLES` values)."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}
    parts = _split(student, batches)
    share = -(-SAMPLES // max(1, len(parts)))
    generator = torch.Generator().manual_seed(seed)
    for name, value in _seen(student, names, parts):
        flat = value.flatten().float().cpu()
        picks = torch.randint(len(flat), (min(share, len(flat)),), generator=generator)
        drawn = flat[picks]
        # A sign that none drawn has is added, so that nothing is taken for unsigned, or for dead,
        # by chance. Extremes have no other privilege: a scale of least squared error would be
        # stretched to one value in a million.
        if (lowest := flat.min()) < 0 <= drawn.min():
            drawn = torch.cat([drawn, lowest[None]])
        if (highest := flat.max()) > 0 >= drawn.max():
            drawn = torch.cat([drawn, highest[None]])
        taken[name].append(drawn)
    return {name: torch.cat(parts) for name, parts in taken.items()}


def observe_channels(
    student: Student,
    axes: Mapping[str, int],
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    seed: int = 0,
) -> dict[str, Tensor]:
    """A sample of each named value by channel, (C, N), with at most `CHANNEL_SAMPLES` numbers.

    ``axes`` names the values and the axis of their channels, counted with the batch as axis 0.
    """
    taken: dict[str, list[Tensor]] = {name: [] for name in axes}
    parts = _split(student, batches)
    generator = torch.Generator().manual_seed(seed)
    for name, value in _seen(student, list(axes), parts):
        rows = value.movedim(axes[name], 0).flatten(1)
        share = -(-CHANNEL_SAMPLES // (len(rows) * len(parts)))
        picks = torch.randint(rows.shape[1], (min(share, rows.shape[1]),), generator=generator)
        taken[name].append(rows[:, picks.to(rows.device)].float().cpu())
    return {name: torch.cat(parts, 1) for name, parts in taken.items()}


def _split(
    student: Student, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """Batches of all inputs, so small that no value of theirs is too large.

    Raises:
        QuantizationError: there are none, or one is not finite.
    """
    widest = max(math.prod(shape) for shape in student.graph.shapes.values())
    parts = list[tuple[Tensor, ...]]()
    for index, batch in enumerate(batches):
        inputs = (batch,) if isinstance(batch, Tensor) else batch
        for name, x in zip(student.graph.inputs, inputs, strict=True):
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise QuantizationError(
                    f"calibration: {name} of batch {index} has values that are not finite (nan or "
                    "inf)"
                )
        parts += zip(*(x.split(max(1, AT_ONCE // widest)) for x in inputs), strict=True)
    if not parts:
        raise QuantizationError("calibration has no batch: give some unlabelled (B, C, H, W)")
    return parts


def _seen(
    student: Student, names: Sequence[str], parts: Sequence[tuple[Tensor, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The named values on each of the parts, one after another."""
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    for inputs in parts:
        given = zip(student.graph.inputs, (x.to(device) for x in inputs), strict=True)
        with torch.no_grad():
            for name, value in student.visit(dict(given), names):
                if not bool(value.isfinite().all()):
                    raise QuantizationError(
                        f"{_said(student, name)}: its result on calibration inputs is not finite "
                        "(nan or inf): its weights or what it reads are too large for float32"
                    )
                yield name, value


def observe_grids(
    student: Student, shared: Mapping[str, str], batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Samples of what meets on every shared grid, by the first activation step of it, and of each
    result.

    Args:
        student: float, with a place for every activation (`insert_activations`).
        shared: its `shared_grids`.
        batches: unlabelled (B, C, H, W), or tuples of all inputs.
    """
    groups: dict[str, list[Tensor]] = {}
    outputs = student.graph.outputs
    found = observe(student, list(dict.fromkeys([*shared, *outputs])), batches)
    for name, group in shared.items():
        groups.setdefault(group, []).append(found[name])
    return {group: torch.cat(parts) for group, parts in groups.items()}, [
        found[name] for name in outputs
    ]


def lowest_level(samples: Tensor, bits: int, power_of_two: bool, zero_points: bool) -> int:
    """Where a grid of activations begins: at 0 if nothing is below it, else by least squares.

    Args:
        samples: (N,) values.
        bits: width of the grid. At 8 bits it is symmetric, so that its integers fit a byte.
        power_of_two: whether the scale is one.
        zero_points: whether grids may begin elsewhere than at 0 and at -2^(bits-1).
    """
    symmetric = signed_range(bits)[0]
    if not bool((samples < 0).any()):
        return 0
    if bits in (1, 8) or not zero_points:
        return symmetric
    rows = samples[None, :: max(1, ZERO_POINTS // 2)]
    rows = rows * _power_of_two(rows.abs().amax(1))[:, None]
    best, least = symmetric, _WORTH * _error(rows, symmetric, bits, power_of_two)
    for eighths in range(1, ZERO_POINTS):
        low = -(-symmetric * eighths // ZERO_POINTS)
        if low < 0 and (error := _error(rows, low, bits, power_of_two)) < least:
            best, least = low, error
    return best


def _error(rows: Tensor, low: int, bits: int, power_of_two: bool) -> float:
    """What the best scale leaves, squared, on a grid from ``low`` on."""
    high = low + 2**bits - 1
    scale = best_scale(rows, low, high, power_of_two)
    return float(((rows / scale).round().clamp(low, high) * scale - rows).square().sum())


def activation_scale(samples: Tensor, quantizer: Quantizer) -> Tensor:
    """The scale an activation quantizer starts from, (1,).

    What is zero on all samples (a ReLU that never opens) has no size: its step is one, so that the
    biases of its readers, in steps of it, fit their accumulators.
    """
    if not samples.any():
        return torch.ones(1, device=samples.device)
    return best_scale(samples[None], quantizer.low, quantizer.high, quantizer.power_of_two)
