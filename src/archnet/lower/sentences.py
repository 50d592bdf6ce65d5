"""What reads other positions of a sentence, once their number is known (exact).

A sentence has any length, and so these stay as they are (`Draft.is_free`). For a file of fixed
sizes they are layers and moves that images have as well.
"""

from archnet.lower.draft import Draft, Weights
from archnet.lower.linear import linear
from archnet.lower.pooling import halved
from archnet.lower.registry import Result, lowering
from archnet.ops import Operator, Pad, PairFullyConnected, SourcePool, Window


def _as_it_is(op: Operator, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Whatever the number of positions."""
    return draft.emit("", op, *inputs, name=draft.step.name) if draft.is_free else None


for _operator in (Window, PairFullyConnected, SourcePool):
    lowering(_operator)(_as_it_is)


@lowering(Window)
def shifted(op: Window, inputs: tuple[str, ...], draft: Draft) -> Result:
    """Zeros around the sentence, and shifted views of it side by side."""
    if draft.is_free:
        return None
    length = draft.shapes[inputs[0]][0]
    wide = draft.emit("pad", Pad(((op.before, op.after), (0, 0))), inputs[0])
    views = [
        draft.slice(wide, 1, start, start + length) for start in range(op.before + op.after + 1)
    ]
    return draft.concat(views, 2)


@lowering(PairFullyConnected)
def joined(op: PairFullyConnected, inputs: tuple[str, ...], draft: Draft) -> Result:
    """One target position's features, copied for each source position, beside the source's."""
    (target, _), (source, _) = (draft.shapes[name] for name in inputs)
    if draft.is_free or target != 1:
        return None
    copies = _copies(draft, inputs[0], source)
    rows = linear(Weights.of(op), draft.concat([copies, inputs[1]], 2), draft)
    return draft.reshape(rows, (1, source, op.out_features))


def _copies(draft: Draft, x: str, count: int) -> str:
    """``count`` copies of a value, one behind another, by doubling."""
    made, found, held = x, [], 1
    while held <= count:
        if count & held:
            found.append(made)
        held *= 2
        if held <= count:
            made = draft.concat([made, made], 1)
    return draft.concat(found, 1)


@lowering(SourcePool)
def rectangle(op: SourcePool, inputs: tuple[str, ...], draft: Draft) -> Result:
    """2x2 max-pooling of the source, laid out as a rectangle, until one pixel is left."""
    target, source, channels = draft.shapes[inputs[0]]
    if draft.is_free or target != 1:
        return None
    height = 1 << (source.bit_length() // 2)
    if source % height:
        height = 1
    x = draft.reshape(inputs[0], (source, channels))
    x = draft.reshape(draft.permute(x, (0, 2, 1)), (channels, height, source // height))
    return draft.reshape(halved(draft, x), (1, channels))
