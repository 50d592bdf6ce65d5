"""Entries of a tensor replaced by others at constant places (exact): what writes become.

y = S x + P v with matrices S and P of zeros and ones. Of a constant, S or P makes a scale or a
shift, which folds into layers; features are slices, concatenated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from archnet.capture import Ref
from archnet.convert.feature import Feature, Value, resized
from archnet.convert.rules.base import Site, as_form, at_each, constant, rule
from archnet.convert.rules.layout import joined, stretched
from archnet.ops import Pad, Reshape

# Of what is written into and what is written, both as the teacher has them.
Write = Callable[[Tensor, Tensor], Tensor]


@rule("aten.slice_scatter.default")
def slice_write(site: Site) -> Value:
    """y = x, and then y[start:stop:step] = v along one axis."""
    dim, bounds = site.argument("dim"), [site.argument(key) for key in ("start", "end", "step")]
    axis = _axis(site, dim)
    places = range(*slice(*bounds).indices(site.node.shape[axis - 1]))
    return _written(site, "src", axis, places, lambda x, v: x.slice_scatter(v, dim, *bounds))


@rule("aten.select_scatter.default")
def entry_write(site: Site) -> Value:
    """y = x, and then y[i] = v along an axis that v does not have."""
    dim, index = site.argument("dim"), site.argument("index")
    axis = _axis(site, dim)
    places = [index % site.node.shape[axis - 1]]
    return _written(site, "src", axis, places, lambda x, v: x.select_scatter(v, dim, index))


@rule("aten.index_put.default")
def indexed_write(site: Site) -> Value:
    """y = x, and then y[indices] = v, or plus v where it accumulates."""
    indices, adds = site.argument("indices"), bool(site.argument("accumulate"))
    held = [_constant_index(site, index) for index in indices]
    axes, dim = [], 0
    for index in held:
        count = index.dim() if index is not None and index.dtype == torch.bool else 1
        axes += [] if index is None else [_axis(site, dim + i) for i in range(count)]
        dim += count
    places = list[int]()
    (first, *others) = [index for index in held if index is not None]
    if first.dim() == 1 and not others and not adds:
        places = torch.arange(site.node.shape[axes[0] - 1])[first].tolist()
    elif isinstance(site.argument("values"), Ref):
        raise site.error(
            "writes or adds a feature at several indices, which has no rule: write slices"
        )

    def write(x: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten.index_put.default(x, held, v, adds)

    return _written(site, "values", axes[0], places, write)


@rule("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor", "aten.index_copy.default")
def entries_write(site: Site) -> Value:
    """y = x, and then y[index] = v along one axis."""
    dim, index = site.argument("dim"), _constant_index(site, site.argument("index"))
    axis, fills = _axis(site, dim), "fill" in site.node.operator
    assert index is not None

    def write(x: Tensor, v: Tensor) -> Tensor:
        return x.index_fill(dim, index, v) if fills else x.index_copy(dim, index, v)

    return _written(site, "value" if fills else "source", axis, index.tolist(), write)


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_write(site: Site) -> Value:
    """y = v where a constant mask says so, else x."""
    return _chosen(site, "mask", site.argument("value"), site.argument("self"))


@rule("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def choice(site: Site) -> Value:
    """y = a where a constant mask says so, else b."""
    return _chosen(site, "condition", site.argument("self"), site.argument("other"))


def _axis(site: Site, dim: int) -> int:
    """An axis of the result as the student's."""
    batch = site.node.batch
    if batch.axis < 0 or dim % batch.rank == batch.axis:
        raise site.error("writes to some samples of a batch and not to others")
    return batch.student_axis(dim)


def _constant_index(site: Site, index: Any) -> Tensor | None:
    if isinstance(index, Ref):
        raise site.error(
            "writes at positions that a feature gives; only constant positions have a rule"
        )
    return index if index is None else index.cpu()


def _written(site: Site, name: str, axis: int, places: Sequence[int], write: Write) -> Value:
    """The result of ``write``, which puts the argument ``name`` to these places of an axis."""
    into, source = site.argument(site.subject), site.argument(name)
    shape = list(site.node.shape)
    if site.node.batch.folded == 1:
        shape.insert(site.node.batch.axis, 1)
    blank = torch.zeros(shape, dtype=torch.float64)
    if not isinstance(source, Ref):
        held = _held(site, source)
        scale = site.constant(write(blank + 1, torch.zeros_like(held)))
        shift = site.constant(write(blank, held))
        return at_each(site, site.value(site.subject), torch.stack([scale, shift]))
    feature, wanted = site.feature(name), resized(site.node.shape, axis, len(places))
    if feature.shape != wanted:
        if site.node.operator != "aten.select_scatter.default":
            raise site.error(f"writes {feature.shape} into {wanted}: write it in that shape")
        feature = site.builder.layout(feature, "entry", Reshape(wanted))
    if isinstance(into, Ref):
        return _merged(site, site.builder.build(site.referred(into)), feature, axis, places)
    merged = _merged(site, None, feature, axis, places)
    around = site.constant(into).index_fill(axis - 1, torch.tensor(places), 0.0)
    return _shifted(site, merged, around)


def _merged(
    site: Site, into: Feature | None, source: Feature, axis: int, places: Sequence[int]
) -> Feature:
    """Entries of ``source`` at these places of an axis, and around them those of ``into``, zeros
    where that is not given.
    """
    size = site.node.shape[axis - 1]
    found = {place: index for index, place in enumerate(places)}
    runs: list[tuple[int | None, int]] = []  # where in the source, or None; how many entries
    for place in range(size):
        index, (start, count) = found.get(place), runs[-1] if runs else (None, 0)
        if count and index == (None if start is None else start + count):
            runs[-1] = (start, count + 1)
        else:
            runs.append((index, 1))
    if into is None:
        # Behind the source there are zeros to take.
        widest = max((count for start, count in runs if start is None), default=0)
        pads = [(0, widest if other == axis else 0) for other in range(1, len(source.shape) + 1)]
        source = site.builder.layout(source, "pad", Pad(tuple(pads)), source.axis)
    parts, place = [], 0
    for start, count in runs:
        if start is not None:
            parts.append(site.builder.slice(source, axis, start, start + count))
        elif into is not None:
            parts.append(site.builder.slice(into, axis, place, place + count))
        else:
            parts.append(site.builder.slice(source, axis, len(places), len(places) + count))
        place += count
    return joined(site, parts, axis) if len(parts) > 1 else parts[0]


def _chosen(site: Site, name: str, ours: Any, theirs: Any) -> Value:
    """Entries of the first where the mask says so, of the second elsewhere; one may be constant."""
    mask = site.argument(name)
    if isinstance(mask, Ref):
        raise site.error("chooses by a feature; only constant masks have a rule")
    here = site.constant(mask)
    form, shift = None, torch.zeros_like(here)
    for item, share in ((ours, here), (theirs, 1 - here)):
        if not isinstance(item, Ref):
            shift = torch.where(share > 0, site.constant(_held(site, item)), shift)
            continue
        value = stretched(site, site.referred(item))
        part = at_each(site, value, torch.stack([share, torch.zeros_like(share)]))
        if form is None:
            form = part
        else:
            form = as_form(form).plus(as_form(site.builder.tagged(part, form.axis)))
    assert form is not None
    return _shifted(site, form, shift)


def _shifted(site: Site, value: Value, shift: Tensor) -> Value:
    if not shift.any():
        return value
    return at_each(site, value, torch.stack([torch.ones_like(shift), shift]))


def _held(site: Site, value: Any) -> Tensor:
    """A number or a constant of the teacher that is written."""
    held = constant(value if isinstance(value, Tensor) else torch.tensor(float(value)))
    if not held.isfinite().all():
        raise site.error("writes numbers that are not finite: write large ones")
    return held
