"""Max-pooling of any window by 2x2 windows (exact)."""

import math

from archnet.lower.convolution import MOST_VIEWS
from archnet.lower.draft import Draft
from archnet.lower.registry import Result, lowering
from archnet.ops import MaxPool
from archnet.ops.layout import windows


@lowering(MaxPool)
def natively(op: MaxPool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """The pooling itself."""
    return draft.emit("", op, *inputs, name=draft.step.name)


@lowering(MaxPool)
def halves(op: MaxPool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One window over all of the map: poolings of stride 2, until one pixel is left."""
    _, height, width = draft.shapes[inputs[0]]
    if op.kernel != (height, width) or any(op.padding) or op.dilation != (1, 1):
        return None
    return halved(draft, inputs[0])


def halved(draft: Draft, x: str) -> str:
    """The maximum of every map; what a window lacks at the border is padding."""
    while draft.shapes[x][1:] != (1, 1):
        _, height, width = draft.shapes[x]
        x = draft.maxpool(x, 2, (0, width % 2, 0, height % 2))
    return x


@lowering(MaxPool)
def chain(op: MaxPool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A k x k window is k - 1 windows of 2x2 one after the other.

    max over k values = max over 2 of (max over k - 1): k - 2 poolings of stride 1, then one with
    the window's stride. Padding has the lowest value, and each pooling takes one pixel of it (a
    2x2 window on nothing but padding gives the lowest value again).
    """
    (ky, kx), stride, x = op.kernel, op.stride, inputs[0]
    plain = op.dilation == (1, 1) and ky == kx >= 2 and stride[0] == stride[1]
    if not plain or max(op.padding) > ky - 1:
        return None
    left, right, top, bottom = op.padding
    size = [
        (n + before + after - ky) // stride[0] + 1
        for n, before, after in zip(draft.shapes[x][1:], (top, left), (bottom, right), strict=True)
    ]
    step = stride[0] if stride[0] <= 2 else 1
    for index in range(ky - 1):
        left, right, top, bottom = (int(count > index) for count in op.padding)
        x = draft.maxpool(x, step if index == ky - 2 else 1, (left, right, top, bottom))
    if step != stride[0]:
        for axis in (2, 3):
            x = draft.slice(x, axis, 0, (size[axis - 2] - 1) * stride[0] + 1, stride[0])
    return draft.slice(draft.slice(x, 2, 0, size[0]), 3, 0, size[1])


@lowering(MaxPool)
def rows_of_values(op: MaxPool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Every window as a row of values, whose maximum is taken by halves.

    A border pixel, which such a window holds already, replaces each pixel of padding.
    """
    if math.prod(op.kernel) > MOST_VIEWS:
        return None
    x, (left, right, top, bottom) = inputs[0], op.padding
    for axis, ahead, behind in ((2, top, bottom), (3, left, right)):
        if (ahead or behind) and op.dilation[axis - 2] > 1:
            return None  # a window with gaps need not hold the border
        last = draft.shapes[x][axis - 1]
        first = [draft.slice(x, axis, 0, 1)] * ahead
        end = [draft.slice(x, axis, last - 1, last)] * behind
        x = draft.concat([*first, x, *end], axis)
    views = windows(draft.slice, x, draft.shapes[x], op.kernel, op.stride, op.dilation)
    channels, *size = draft.shapes[views[0]]
    tall = [draft.reshape(view, (channels, *size, 1)) for view in views]
    row = draft.reshape(draft.concat(tall, 4), (channels * math.prod(size), 1, len(views)))
    return draft.reshape(halved(draft, row), (channels, *size))
