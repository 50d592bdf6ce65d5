"""Quantizers: a float tensor is rounded to a grid of integers times a scale.

Every quantizer has ``bits``, the integer bounds ``low`` and ``high``, a positive ``scale`` and
``integers()``, which gives the very integers that an exported file holds. The forward pass
returns integers * scale, with a straight-through gradient.

Learned steps (LSQ, Esser et al. 2020, arXiv 1902.08153) are kept as logarithms. Adam then moves
every scale by the same *relative* step, whatever its size, so that one learning rate serves every
layer, and no scale can reach zero. The gradient is that of LSQ's equation 3 times the scale
(chain rule), with LSQ's own factor 1 / sqrt(n * high).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from archnet.ops.tables import joined, kept

SPANS = 20  # shares of the largest weight that are tried for the span of a DoReFa grid
PART = 2**16  # values a pass takes at a time on a CPU
# The smallest step. Anything below is taken for zero (weight decay leaves channels of 1e-38), and a
# channel without any weight still has a scale to divide by.
SCALE_FLOOR = 2.0**-116


class LearnedStep(torch.autograd.Function):
    """Round x / scale to [low, high] and multiply back; gradients for x and for the scale.

    y = s * clamp(round(r)) with r = x / s. Where r lies inside the range dy/dx = 1 and
    dy/ds = (y - x) / s; outside dy/dx = 0 and dy/ds = y / s. With g the incoming gradient,
    dL/dlog s = sum(g * y) - sum(dL/dx * x). The two sums are ``left`` for `_Logarithms`, of which
    ``logarithms`` come: it makes the gradient of many scales at once.

    ``scale`` is one number, or one for each entry of the first axis.

    A GPU, where every pass is a launch, trains in one pass, which multiplies by 1 / s instead of
    dividing: what lies within a rounding error of a border may then be a level apart, as it may
    behind sums in another order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        logarithms: Tensor,
        scale: Tensor,
        low: int,
        high: int,
        left: "Left",
        place: int | Tensor,
        factor: float | Tensor,
    ) -> Tensor:
        scale = scale.to(x.dtype)
        ctx.rows, ctx.bounds = scale.numel() > 1, (low - 0.5, high + 0.5)
        ctx.leave = partial(left.leave, place, factor)
        ctx.is_fused = any(ctx.needs_input_grad) and not ctx.rows and _fuses(x)
        if ctx.is_fused:
            y, inside = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
                x, scale, *kept(_offset, x), low, high
            )
            ctx.save_for_backward(x, y, inside)
            return y
        if ctx.rows:
            scale = scale.reshape(-1, *[1] * (x.dim() - 1))
        y = torch.empty_like(x)
        for some, results, step in _parts(scale, x, y):
            # A true division, as ONNX's QuantizeLinear: the same bits in every runtime.
            torch.div(some, step, out=results).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, last = ctx.saved_tensors
        if grad.stride() != y.stride() or grad.dtype != y.dtype:
            # In one memory order, so that all are walked alike.
            grad = torch.empty_like(y).copy_(grad)
        if ctx.is_fused:
            moved = grad * last
            ctx.leave(_product(grad, y, False), _product(moved, x, False))
            return moved, *[None] * 7
        moved, gains, losses = torch.empty_like(y), [], []
        for g, some, level, result, step in _parts(last, grad, x, y, moved):
            passed = torch.ops.aten.hardtanh_backward.grad_input
            passed(g, some / step, *ctx.bounds, grad_input=result)
            gains.append(_product(g, level, ctx.rows))
            losses.append(_product(result, some, ctx.rows))
        gain, loss = (joined(parts) for parts in (gains, losses))
        if not ctx.rows and len(gains) > 1:
            gain, loss = (parts.sum(0, keepdim=True) for parts in (gain, loss))
        ctx.leave(gain, loss)
        return moved, *[None] * 7


def _fuses(x: Tensor) -> bool:
    """Whether a tensor is rounded in one pass."""
    return x.device.type != "cpu" and x.dtype == torch.float32


def _offset(device: torch.device) -> tuple[Tensor, Tensor]:
    """A zero point of 0, and a switch that is on."""
    return (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.ones(1, dtype=torch.int64, device=device),
    )


def _product(a: Tensor, b: Tensor, rows: bool) -> Tensor:
    """The sum of all products of two tensors walked alike, (1,); or of each entry, (O,)."""
    if rows:
        return (a * b).sum(tuple(range(1, a.dim())))
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(*(x.permute(order).reshape(-1) for x in (a, b))).reshape(1)


def _parts(scale: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same stretch of all tensors and its scale, one after another, each small enough for a
    CPU's cache.

    What this costs on a CPU are the passes over memory, and the passes after the first one find
    a stretch in the cache. Elsewhere, and for a tensor with holes, the whole is one part; rows,
    which have scales of their own, are parted between two rows, if they lie in a row.
    """
    first, rows = tensors[0], scale.numel() > 1
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    views = [tensor.permute(order) for tensor in tensors] if not rows else list(tensors)
    dense = all(view.is_contiguous() for view in views) and (first.dim() == 2 or not rows)
    if first.device.type != "cpu" or not dense:
        return [(*tensors, scale)]
    if rows:
        own = [*views, scale]
        return zip(*(view.split(max(1, PART // first.shape[1])) for view in own), strict=True)
    return ((*parts, scale) for parts in zip(*(x.view(-1).split(PART) for x in views), strict=True))


class Left:
    """What was rounded leaves here the two sums that the gradients of its scales are made of.

    A place says which scales among those of `Steps` they are: the number of one, or of each row's
    (rows,); a factor is LSQ's.
    """

    def __init__(self) -> None:
        self.of_tensors: list[tuple[int, float, Tensor, Tensor]] = []
        self.of_rows: list[tuple[Tensor, float | Tensor, Tensor, Tensor]] = []

    def leave(
        self, place: int | Tensor, factor: float | Tensor, gain: Tensor, loss: Tensor
    ) -> None:
        if isinstance(place, Tensor):
            self.of_rows.append((place, factor, gain, loss))
        else:
            self.of_tensors.append((place, cast(float, factor), gain, loss))


class _Logarithms(torch.autograd.Function):
    """The logarithms of scales, as `LearnedStep` reads them: (N,) -> (0,).

    The result has no values and gets no gradient: reading it makes autograd come here last, when
    all that was rounded has left its sums. The gradient of the logarithms is
    factor * (gain - loss), added up for each scale.
    """

    @staticmethod
    def forward(ctx: Any, logarithms: Tensor, left: Left) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left = left
        ctx.save_for_backward(logarithms)
        return logarithms.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: None) -> tuple[Tensor, None]:
        (logarithms,), left = ctx.saved_tensors, ctx.left
        total = torch.zeros_like(logarithms)
        if left.of_tensors:
            places, factors, gains, losses = zip(*left.of_tensors, strict=True)
            change = joined(gains) - joined(losses)
            change = change * kept(_numbers, logarithms, factors, total.dtype)
            total.index_add_(0, kept(_numbers, logarithms, places, torch.int64), change)
        for place, factor, gain, loss in left.of_rows:
            total.index_add_(0, place, ((gain - loss) * factor).to(total.dtype))
        left.of_tensors, left.of_rows = [], []
        return total, None


def _numbers(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


class Steps:
    """The scales of some quantizers, computed at once, with one gradient for all of them.

    Attributes:
        scales: of all, one behind the other; ``starts`` says where each quantizer's begin.
        logarithms, left: what `LearnedStep` reads, and where it leaves its sums.
        entries: of the quantizers.
    """

    def __init__(self, quantizers: Sequence["Quantizer"]) -> None:
        sizes = [quantizer.channels for quantizer in quantizers]
        self.starts = dict(zip(quantizers, accumulate(sizes, initial=0), strict=False))
        # Those of one kind are computed together.
        kinds = [
            (kind, joined([quantizer.log_scale for quantizer in members]))
            for kind, members in groupby(quantizers, lambda quantizer: quantizer.power_of_two)
        ]
        self.scales = joined([_step(part.detach(), kind) for kind, part in kinds])
        self.left = Left()
        self.logarithms = _Logarithms.apply(joined([part for _, part in kinds]), self.left)
        self.entries = {
            quantizer: Entry(self, scale)
            for quantizer, scale in zip(quantizers, self.scales.split(sizes), strict=True)
        }

    def places(self, quantizer: "Quantizer") -> Tensor:
        """Where the quantizer's scales are among all, (channels,)."""
        start = self.starts[quantizer]
        return torch.arange(start, start + quantizer.channels, device=self.scales.device)


@dataclass(frozen=True)
class Entry:
    """What `Steps` have for a quantizer: its scale, (channels,)."""

    steps: Steps
    scale: Tensor


def _step(logarithm: Tensor, power_of_two: bool) -> Tensor:
    """The scale of which this is the logarithm, or the power of two nearest to it."""
    if power_of_two:
        return torch.exp2(round_through(logarithm / math.log(2)))
    return logarithm.exp()


class _Round(torch.autograd.Function):
    """Rounding (half to even) with the identity for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had happened."""
    return _Round.apply(x)


class Quantizer(nn.Module):
    """Base of all quantizers; ``log_scale`` holds the logarithm of the scale.

    Args:
        bits: width, 1 to 8.
        low, high: integer bounds of the grid.
        channels: scales along the first axis of the tensor, 1 for one scale.
        learned: whether training moves the scale.
        power_of_two: whether the scale is the power of two nearest to what is learned, for chips
            that requantize by shifts alone.
    """

    def __init__(
        self,
        bits: int,
        low: int,
        high: int,
        channels: int,
        learned: bool,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        self.power_of_two = power_of_two
        self.bits, self.low, self.high, self.channels = bits, low, high, channels
        self.log_scale = nn.Parameter(torch.zeros(channels), requires_grad=learned)
        # While many are used at once (`archnet.quant.together`).
        self.entry: Entry | None = None

    @property
    def scale(self) -> Tensor:
        """Step between neighbouring levels, (channels,), positive."""
        if self.entry is not None:
            return self.entry.scale
        return _step(self.log_scale, self.power_of_two)

    def set_scale(self, scale: Tensor) -> None:
        """Set the step; anything below the floor is raised to it (dead channels)."""
        with torch.no_grad():
            self.log_scale.copy_(scale.clamp_min(SCALE_FLOOR).log().reshape(self.log_scale.shape))

    def spec(self) -> dict[str, Any]:
        """What rebuilds this quantizer, as plain data."""
        return {
            "kind": type(self).__name__,
            "bits": self.bits,
            "channels": self.channels,
            "power_of_two": self.power_of_two,
        }

    def integers(self, x: Tensor) -> Tensor:
        """The grid's integers (float dtype) nearest to x."""
        return torch.round(x / self.along(x)).clamp(self.low, self.high)

    def bounds(self, low: float, high: float) -> tuple[int, int]:
        """The lowest and the highest integer of values between ``low`` and ``high``.

        Rounding keeps the order, so a clip of the value is a clip of the integer.
        """
        lowest, highest = self.integers(self.scale.new_tensor([low, high])).tolist()
        return int(lowest), int(highest)

    def along(self, x: Tensor) -> Tensor:
        """The scale, broadcast along the first axis of x."""
        scale = self.scale
        return scale if self.channels == 1 else scale.reshape(-1, *[1] * (x.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._rounded(x, self.values(x))

    def _rounded(self, x: Tensor, values: int) -> Tensor:
        """Round x onto the grid, where so many values of one sample share a scale."""
        entry = self.entry or Steps([self]).entries[self]
        steps = entry.steps
        place = steps.places(self) if self.channels > 1 else steps.starts[self]
        where = steps.logarithms, entry.scale, self.low, self.high, steps.left, place
        return cast(Tensor, LearnedStep.apply(x, *where, self.factor(values)))

    def factor(self, values: int) -> float:
        """LSQ's factor of the scale's gradient, where so many values of a sample share it."""
        return 1.0 / math.sqrt(max(1, values) * max(1, self.high))

    def values(self, x: Tensor) -> int:
        """How many values of one sample share a scale (LSQ, section 2.2)."""
        return x[0].numel()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.low}, {self.high}], channels={self.channels}"


class WeightLSQ(Quantizer):
    """LSQ on weights: signed, range [-2^(b-1), 2^(b-1) - 1]; one bit is {-1, +1}.

    Example (2 bits, scale 0.5): levels -1, -0.5, 0, 0.5; 0.3 becomes 0.5, 2.0 becomes 0.5.
    """

    def __init__(self, bits: int, channels: int = 1, power_of_two: bool = False) -> None:
        super().__init__(bits, *signed_range(bits), channels, True, power_of_two)

    def values(self, x: Tensor) -> int:
        return x.numel() // self.channels

    def integers(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            return torch.where(x >= 0, 1.0, -1.0)
        return super().integers(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            # Two levels without a zero: sign, with the gradient clipped at the outer levels.
            scale = self.along(x)
            level = (x / scale).clamp(-1, 1)
            return (level + (self.integers(x) - level).detach()) * scale
        return super().forward(x)


class WeightDoReFa(Quantizer):
    """DoReFa on weights (Zhou et al. 2016, arXiv 1606.06160): tanh, then a uniform grid.

    t = tanh(w) / (span max|tanh(w)|), q = clamp(round(n t)) with n = 2^(b-1) - 1, y = q * scale.
    Scale and span are chosen when the quantizer is calibrated and then stay. The published grid has
    2^b levels and no zero, whose integers need b + 1 bits; this one has a zero and fits b bits.
    Published, the span is 1: the largest weight has the largest level. On a grid with a zero that
    leaves what is below max|tanh(w)| / 2n at zero, which at 2 bits is nearly every weight.

    Example (2 bits, max|tanh| 1, span 1): weights -0.9, 0.1, 0.6 give -1, 0, 1 times the scale.
    """

    span: Tensor  # (channels,), a share of max|tanh(w)|

    def __init__(self, bits: int, channels: int = 1, power_of_two: bool = False) -> None:
        high = max(1, 2 ** (bits - 1) - 1)
        super().__init__(bits, -high, high, channels, False, power_of_two)
        self.register_buffer("span", torch.ones(channels))

    def _normalised(self, x: Tensor) -> Tensor:
        squashed = torch.tanh(x)
        rows = squashed.detach().abs().reshape(self.channels, -1)
        peak = (rows.amax(1) * self.span).clamp_min(SCALE_FLOOR)
        if self.channels > 1:
            peak = peak.reshape(-1, *[1] * (x.dim() - 1))
        return squashed / peak * self.high

    def integers(self, x: Tensor) -> Tensor:
        if self.bits == 1:
            return torch.where(x >= 0, 1.0, -1.0)
        return self._normalised(x).round().clamp(self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        # Beyond the outermost levels nothing is learned, as in LSQ.
        level = self._normalised(x).clamp(self.low - 0.5, self.high + 0.5)
        return (level + (self.integers(x) - level).detach()) * self.along(x)

    def fit(self, weight: Tensor) -> Tensor:
        """Choose the span that leaves the least squared error of some weights, (channels,) of them.

        Returns:
            The scale that belongs to it, (channels,).
        """
        rows = weight.detach().reshape(self.channels, -1)
        least = torch.full_like(rows[:, 0], torch.inf)
        span, scale = torch.ones_like(least), torch.ones_like(least)
        for part in range(SPANS, 0, -1):
            self.span.fill_(part / SPANS)
            levels = self.integers(weight.detach()).reshape(self.channels, -1)
            length = levels.square().sum(1).clamp_min(SCALE_FLOOR)
            found = ((rows * levels).sum(1) / length).clamp_min(SCALE_FLOOR)
            error = (levels * found[:, None] - rows).square().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            span = torch.where(better, self.span, span)
            scale = torch.where(better, found, scale)
        self.span.copy_(span)
        return scale


class ActivationLSQ(Quantizer):
    """LSQ on activations, one scale: 2^b levels from ``low`` on, zero among them.

    ``low`` is 0 after a ReLU, where the lowest level is the ReLU; -2^(b-1) where values are as
    large on either side; and between them where they are not (a hardswish's, a GELU's: the offset
    of LSQ+, Bhalgat et al. 2020, arXiv 2004.09576, in whole steps). Zero is a level, whose integer
    is 0, so that zero padding is exact.

    Example (4 bits, from 0, scale 0.25): 1.1 becomes 1.0, 9.0 becomes 3.75, -0.7 becomes 0.
    From -1: 9.0 becomes 3.5, -0.7 becomes -0.25.
    """

    learned = True

    def __init__(self, bits: int, low: int, power_of_two: bool = False) -> None:
        # One bit on both sides of zero has three levels.
        high = max(1, low + 2**bits - 1)
        super().__init__(bits, low, high, 1, self.learned, power_of_two)

    def forward(self, x: Tensor, values: int | None = None) -> Tensor:
        """Round x onto the grid; ``values`` counts those of a sample, where x is no batch."""
        return self._rounded(x, self.values(x) if values is None else values)

    def passed(self, x: Tensor, given: Tensor) -> Tensor:
        """The gradient at x where that of the rounded result is ``given``; 0 outside the grid."""
        ratio, bounds = x / self.scale.to(x.dtype), (self.low - 0.5, self.high + 0.5)
        return torch.ops.aten.hardtanh_backward(given, ratio, *bounds)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "bits": self.bits,
            "low": self.low,
            "power_of_two": self.power_of_two,
        }


class ActivationDoReFa(ActivationLSQ):
    """DoReFa on activations: clipped to a fixed range, uniform grid.

    The published code multiplies by a fixed 0.1 and clips to [0, 1]; here the range is fixed by
    calibration, so that it fits the teacher at hand.
    """

    learned = False


class BiasQuantizer(nn.Module):
    """A bias in steps of input scale * weight scale, as an int32 accumulator adds it."""

    def __init__(self, weight: Quantizer, source: Quantizer) -> None:
        super().__init__()
        # In a tuple, so that scales that belong to others are not registered here again.
        self._scales = (weight, source)

    @property
    def source(self) -> Quantizer:
        """The quantizer of what the layer reads."""
        return self._scales[1]

    def step(self) -> Tensor:
        """Value of one accumulator unit for every output channel, (O,) or (1,)."""
        weight, source = self._scales
        return (weight.scale * source.scale).detach()

    def integers(self, bias: Tensor) -> Tensor:
        return torch.round(bias / self.step())

    def forward(self, bias: Tensor) -> Tensor:
        step = self.step()
        return round_through(bias / step) * step


def signed_range(bits: int) -> tuple[int, int]:
    """[-2^(b-1), 2^(b-1) - 1], and [-1, 1] for one bit."""
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.__name__: cls for cls in (WeightLSQ, WeightDoReFa, ActivationLSQ, ActivationDoReFa)
}
