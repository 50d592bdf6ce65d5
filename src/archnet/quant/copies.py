"""Values that trained layers read several times, on grids that begin a part of a step apart.

The mean of round(x - s/4) and round(x + s/4) on a grid of step s is x rounded to s/2: a layer that
reads both has a bit more than its operands. Likewise its weights, w = (w/2 - d/4) + (w/2 + d/4) on
a grid of step d. It is the quantization-aware splitting of Zhao et al. 2019 (arXiv 1901.09504,
section 3.3), but of all channels and of both operands: networks too narrow for few bits become
wider ones (Mishra et al. 2017, arXiv 1709.01134), at as many times the multiplications.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from archnet.ops import (
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    Operator,
    Permute,
    Step,
    Student,
    WeightedOperator,
)
from archnet.quant.attach import QuantizationError, describe
from archnet.quant.calibrate import best_scale, lowest_level, observe
from archnet.quant.equalize import columns_read, norm_along
from archnet.quant.quantizers import ActivationLSQ, Quantizer, WeightLSQ
from archnet.quant.recipe import Recipe
from archnet.quant.widths import FLOAT, first_and_last, weighted

_Place = tuple[str, int]  # a value, and the axis of its channels, counted with the batch as axis 0


def copy_values(
    student: Student, recipe: Recipe, calibration: Iterable[Tensor | tuple[Tensor, ...]]
) -> dict[str, Quantizer]:
    """Give what trained layers multiply to them ``recipe.copies`` times, in place.

    A concatenation repeats a value, a batch norm moves each copy by a part of the step that its
    grid is going to have, and the layer's columns are repeated and divided. The first and the last
    layer have widths of their own and are left alone.

    Args:
        student: float, not quantized. It computes the same as before, but for an eighth of both
            steps beside zeros that a convolution pads with.
        recipe: how it is going to be quantized, with at least 2 copies.
        calibration: unlabelled batches (B, C, H, W), or tuples of all inputs of the student.

    Returns:
        Grids of the copies and of the weights that meet them, by step, for `quantize`: as several
        share one range, they are not those that would suit an operand alone. {} if activations
        stay float.

    Raises:
        QuantizationError: the student is quantized already.
    """
    if describe(student):
        raise QuantizationError("the student is quantized already; copy its values before")
    if recipe.act_bits == FLOAT:
        return {}
    recipe, copies = recipe.on(student), recipe.copies
    readers = _readers(student)
    samples = observe(student, list({name: None for name, _ in readers}), calibration)
    parts = (torch.arange(copies) - (copies - 1) / 2) / copies  # of a step
    found: dict[str, Quantizer] = {}
    shifts: dict[_Place, Tensor] = {}
    for place, layers in readers.items():
        values = samples[place[0]]
        low = lowest_level(values, recipe.act_bits, recipe.acts_in_powers, bool(recipe.zero_points))
        grid = ActivationLSQ(recipe.act_bits, low, recipe.acts_in_powers)
        _share(grid, values[None], copies)
        shifts[place] = parts * grid.scale.detach()
        found[f"{_norm(place)}_grid"] = grid
        for layer in layers:
            module = student.operator(layer)
            assert isinstance(module, WeightedOperator)
            step = torch.zeros_like(module.weight)
            if recipe.weight_bits != FLOAT:
                rows = module.weight.detach().flatten(int(bool(recipe.per_channel)))
                rows = rows.reshape(-1, rows.shape[-1])
                found[layer] = WeightLSQ(recipe.weight_bits, len(rows), bool(recipe.power_of_two))
                _share(found[layer], rows, copies)
                step = found[layer].along(module.weight).detach()
            _widen(module, parts, shifts[place], step)
    _rewire(student, readers, shifts)
    return found


def copied_layers(student: Student) -> dict[str, int]:
    """The layers that read copies of a value, and how many."""
    return {layer: len(source.inputs) for layer, (source, _) in _sources(student).items()}


def merge_copies(student: Student) -> None:
    """Take copies out again, in place: to be made anew for other widths, or for none.

    What training made of each copy's weights, sizes and shifts becomes one weight and a bias. The
    student, which is float, computes the same but beside zeros that a convolution pads with.
    """
    sources = _sources(student)
    for layer, (source, norm) in sources.items():
        module, copies = student.operator(layer), len(source.inputs)
        assert isinstance(module, WeightedOperator)
        with torch.no_grad():
            sizes = norm.weight / (norm.running_var + norm.eps).sqrt()
            shifts = norm.bias - norm.running_mean * sizes
            weight = module.weight.reshape(*module.weight.shape[:2], -1)
            columns = columns_read(module)
            module.bias.add_((weight.sum(2) * shifts[columns]).sum(1))
            sums = (weight * sizes[columns][..., None]).unflatten(1, (copies, -1)).sum(1)
            shape = (len(weight), -1, *module.weight.shape[2:])
            module.weight = nn.Parameter(sums.reshape(shape), module.trainable)
        _resize(module, 1)
    steps = [
        replace(step, inputs=sources[step.name][0].inputs[:1]) if step.name in sources else step
        for step in student.graph.steps
    ]
    student.rewire(steps)
    student.drop_unread()


def _sources(student: Student) -> dict[str, tuple[Step, BatchNorm]]:
    """For each layer that reads copies, the concatenation and the norm that make them.

    By their names: a teacher may repeat channels as well, and norm them.
    """
    by_name = {step.name: step for step in student.graph.steps}
    found: dict[str, tuple[Step, BatchNorm]] = {}
    for step in student.graph.steps:
        if not isinstance(student.operator(step.name), Convolution | FullyConnected):
            continue
        above = _behind_permutes(student, by_name, step)
        norm = None if above is None else student.operator(above.name)
        source = None if above is None else _behind_permutes(student, by_name, above)
        if isinstance(norm, BatchNorm) and above is not None and source is not None:
            repeat = student.operator(source.name)
            if isinstance(repeat, Concat) and above.name.endswith(_norm(("", repeat.axis))):
                found[step.name] = (source, norm)
    return found


def _behind_permutes(student: Student, by_name: Mapping[str, Step], step: Step) -> Step | None:
    """The step that makes what another reads, whatever its order of axes."""
    source = by_name.get(step.inputs[0])
    while source is not None and isinstance(student.operator(source.name), Permute):
        source = by_name.get(source.inputs[0])
    return source


def _readers(student: Student) -> dict[_Place, list[str]]:
    """The trained layers between the first and the last ones, by what they read."""
    trained = {name for name, module in weighted(student).items() if module.trainable}
    first, last, _ = first_and_last(student)
    between = trained - {*first, *last}
    found: dict[_Place, list[str]] = {}
    for step in student.graph.steps:
        module = student.operator(step.name)
        if step.name in between and isinstance(module, Convolution | FullyConnected):
            (name,) = step.inputs
            axis = 1 if isinstance(module, Convolution) else len(student.graph.shapes[name])
            found.setdefault((name, axis), []).append(step.name)
    return found


def _norm(place: _Place) -> str:
    """The batch norm that moves the copies of a value."""
    return f"{place[0]}_moved_{place[1]}"


def _share(grid: Quantizer, rows: Tensor, copies: int) -> None:
    """Set the scale with which several numbers on a grid add up to each value of the rows best,
    or have it for their mean: a sum has as many times the levels.
    """
    scale = best_scale(rows, grid.low * copies, grid.high * copies, grid.power_of_two)
    grid.set_scale(scale * copies if isinstance(grid, ActivationLSQ) else scale)


def _widen(module: WeightedOperator, parts: Tensor, shifts: Tensor, step: Tensor) -> None:
    """Repeat a layer's columns for copies of its input that are moved by ``shifts``."""
    weight = module.weight.detach()
    share = weight / len(parts)
    # Neighbours move in opposite directions, so that moves of both operands do not add up; what
    # conversion left at zero stays there.
    turns = 1 - 2 * (torch.arange(weight[0].numel()).reshape(weight[0].shape) % 2)
    moves = turns.to(weight) * (share != 0) * step
    wide = [share + part * moves for part in parts.tolist()]
    with torch.no_grad():
        for columns, shift in zip(wide, shifts.tolist(), strict=True):
            module.bias.sub_(columns.flatten(1).sum(1) * shift)
    module.weight = nn.Parameter(torch.cat(wide, 1), module.trainable)
    _resize(module, len(parts))


def _resize(module: WeightedOperator, copies: int) -> None:
    """Have a layer say what its weight has columns for."""
    if isinstance(module, Convolution):
        module.in_channels = module.weight.shape[1] * module.groups
        module.copies = copies
    elif isinstance(module, FullyConnected):
        module.in_features = module.weight.shape[1]


def _rewire(
    student: Student, readers: Mapping[_Place, Sequence[str]], shifts: Mapping[_Place, Tensor]
) -> None:
    """Put what makes copies in front of the layers that read them."""
    shapes, place_of = student.graph.shapes, {x: place for place in readers for x in readers[place]}
    added: dict[str, Operator] = {}
    steps: list[Step] = []

    def copied(place: _Place, origin: str) -> str:
        (name, axis), rank = place, len(shapes[place[0]]) + 1
        channels = shapes[name][axis - 1]
        norm = BatchNorm(channels * len(shifts[place])).to(next(student.parameters()))
        with torch.no_grad():
            norm.bias.copy_(shifts[place].repeat_interleave(channels))
            norm.running_var.fill_(1 - norm.eps)
        work: dict[str, Operator] = {f"{name}_copies_{axis}": Concat(axis)}
        work |= norm_along(_norm(place), norm, axis, rank)
        inputs = (name,) * len(shifts[place])
        for made, operator in work.items():
            if made not in added:
                added[made] = operator
                steps.append(Step(made, inputs, origin))
            inputs = (made,)
        return inputs[0]

    for step in student.graph.steps:
        place = place_of.get(step.name)
        inputs = step.inputs if place is None else (copied(place, step.origin),)
        steps.append(Step(step.name, inputs, step.origin))
    student.rewire(steps, added=added)
