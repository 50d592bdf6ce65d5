"""How a part of a student is run: the same values as step by step, in fewer and larger pieces."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.ops.graph import Step
from archnet.ops.layout import LayoutMove, Pad, Slice
from archnet.ops.operators import Concat, FullyConnected
from archnet.ops.pairs import copies, hinges_of_sums
from archnet.ops.piece import Piece
from archnet.ops.tables import functions_of_levels


def plan(
    steps: Sequence[Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
    targets: Sequence[str],
) -> list[Piece]:
    """The steps as pieces of work, in order.

    - A fully connected layer that reads the windows of a map (what a 7x7 convolution becomes) is
      run as the convolution it is: its 49 views and their concatenation need not exist, which is
      most of the time of a training step of such a student.
    - Hinges of a sum that are added up (attention by pairs of tokens) are one function of the sum,
      computed at once (`archnet.ops.pairs`): there are too many of them to exist for every pair.
      Copies along an axis are views.
    - What becomes of single numbers between two grids (an activation by hinges, a norm) is looked
      up in a table (`archnet.ops.tables`).
    - Slices that part a whole axis (the lanes of a depthwise layer) are one split, whose gradient
      is one concatenation; every slice alone would fill a whole tensor with zeros.
    """
    windows = _windows(steps, operators, shapes)
    bent: dict[str, Piece] = {
        **functions_of_levels(steps, operators, shapes),
        **hinges_of_sums(steps, operators, shapes),
    }
    needed, chosen = set(targets), []
    for step in reversed(steps):
        if step.name in needed:
            if step.name in windows:
                needed.add(windows[step.name].source)
            else:
                needed.update(bent[step.name].reads if step.name in bent else step.inputs)
            chosen.append(step)
    chosen.reverse()
    together: dict[str, Piece] = {
        **bent,
        **copies(chosen, operators, shapes),
        **_parts(chosen, operators),
        **_convolved(chosen, operators, windows),
    }
    done: set[str] = set()
    pieces: list[Piece] = []
    for step in chosen:
        if step.name in done:
            continue
        piece = together.get(step.name) or Piece((step.name,), step.inputs)
        done.update(piece.names)
        pieces.append(piece)
    read_later: set[str] = set()
    for piece in reversed(pieces):
        # A target that nobody reads any more is dropped once it has been given.
        ends = dict.fromkeys([*piece.names, *piece.reads])
        piece.dropped = tuple(name for name in ends if name not in read_later)
        read_later.update(piece.reads)
    return pieces


# Slices ---------------------------------------------------------------------------------------


@dataclass
class Split(Piece):
    """Slices that follow one another on ``axis``, parted at ``bounds``."""

    axis: int = 0
    bounds: tuple[int, ...] = ()

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        x = live[self.reads[0]]
        if x.shape[self.axis] == self.bounds[-1]:
            return x.split([b - a for a, b in itertools.pairwise(self.bounds)], self.axis)
        return [operators[name](x) for name in self.names]


def _parts(steps: Sequence[Step], operators: nn.ModuleDict) -> dict[str, Split]:
    """Slices that follow one another on an axis, by the name of the first."""
    groups: dict[tuple[str, int], list[tuple[str, Slice]]] = {}
    for step in steps:
        module = operators[step.name]
        if isinstance(module, Slice) and module.step == 1:
            groups.setdefault((step.inputs[0], module.axis), []).append((step.name, module))
    found = {}
    for (source, axis), slices in groups.items():
        bounds = (0, *(module.stop for _, module in slices))
        if len(slices) > 1 and bounds[:-1] == tuple(module.start for _, module in slices):
            names = tuple(name for name, _ in slices)
            found[names[0]] = Split(names, (source,), axis=axis, bounds=bounds)
    return found


# Windows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Values (B, H', W', J) of a map (B, C, H, W): the J pixels of a window at every position.

    ``channels``, ``rows`` and ``columns`` are what the windows lie in; ``sizes`` are the window's
    channels, rows and columns; ``order`` is the order of these three in J, the last one fastest.
    """

    source: str
    channels: slice
    rows: slice
    columns: slice
    sizes: tuple[int, int, int]
    order: tuple[int, int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def kernel(self, layer: FullyConnected) -> tuple[Tensor, Tensor]:
        """Weight (O, channels, rows, columns) and bias of the layer as a convolution."""
        weight, bias = layer.parameters_on_grid()
        split = weight.unflatten(1, [self.sizes[i] for i in self.order])
        return split.permute(0, *(1 + self.order.index(i) for i in range(3))), bias

    def is_followed_by(self, other: "Windows") -> bool:
        """Whether ``other`` are the same windows of as many channels, the next ones."""
        count = other.channels.stop - other.channels.start
        here = slice(other.channels.start - count, other.channels.start)
        return self == replace(other, channels=here)


class Convolved(Piece):
    """Fully connected layers that read ``windows``, each those of its own channels."""

    def __init__(self, names: tuple[str, ...], windows: tuple[Windows, ...]) -> None:
        super().__init__(names, (windows[0].source,))
        self.windows = windows

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        first, last = self.windows[0], self.windows[-1]
        kernels, biases = [], []
        for name, windows in zip(self.names, self.windows, strict=True):
            layer = operators[name]
            assert isinstance(layer, FullyConnected)
            kernel, bias = windows.kernel(layer)
            kernels.append(kernel)
            biases.append(bias)
        channels = slice(first.channels.start, last.channels.stop)
        x = live[first.source][:, channels, first.rows, first.columns]
        weight, bias = torch.cat(kernels), torch.cat(biases)
        y = F.conv2d(x, weight, bias, first.stride, 0, first.dilation, len(kernels))
        return y.permute(0, 2, 3, 1).chunk(len(kernels), -1)


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer, FullyConnected)
    return layer.out_features


def _convolved(
    steps: Sequence[Step], operators: nn.ModuleDict, windows: Mapping[str, Windows]
) -> dict[str, Convolved]:
    """Layers on windows that are the lanes of one layer together, by the name of the first."""
    lanes: list[list[str]] = []
    for name in (step.name for step in steps if step.name in windows):
        before = lanes[-1][-1] if lanes else name
        follows = windows[before].is_followed_by(windows[name])
        if follows and _outputs(operators[before]) == _outputs(operators[name]):
            lanes[-1].append(name)
        else:
            lanes.append([name])
    return {
        names[0]: Convolved(tuple(names), tuple(windows[name] for name in names)) for names in lanes
    }


def _windows(
    steps: Sequence[Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Windows]:
    """The fully connected layers of ``steps`` that read the windows of a map."""
    by_name = {step.name: step for step in steps}

    def is_move(name: str) -> bool:
        module = operators[name] if name in by_name else None
        return isinstance(module, LayoutMove | Concat) and not isinstance(module, Pad)

    def is_join(name: str) -> bool:
        return name in by_name and isinstance(operators[name], Concat)

    # Where every entry of a joined value lies in the map it is taken from, counted from 0.
    places: dict[str, tuple[str, Tensor] | None] = {}

    def joined(name: str) -> tuple[str, Tensor] | None:
        if name not in places:
            places[name] = _places(by_name[name], by_name, operators, shapes, is_move)
        return places[name]

    found = {}
    for step in steps:
        if not isinstance(operators[step.name], FullyConnected) or len(shapes[step.name]) != 3:
            continue
        moves, name = [], step.inputs[0]
        while is_move(name) and not is_join(name):
            moves.append(name)
            (name,) = by_name[name].inputs
        place = joined(name) if is_join(name) else None
        if place is None:
            continue
        source, index = place
        for move in reversed(moves):
            index = operators[move](index)
        windows = _as_windows(source, shapes[source], index[0])
        if windows is not None:
            found[step.name] = windows
    return found


def _places(
    join: Step,
    by_name: Mapping[str, Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
    is_move: Callable[[str], bool],
) -> tuple[str, Tensor] | None:
    """The map that everything joined is moved from, and the entries of it that the join holds."""
    chains = []
    for name in join.inputs:
        chain = [name]
        while is_move(chain[-1]) and len(by_name[chain[-1]].inputs) == 1:
            chain.append(by_name[chain[-1]].inputs[0])
        chains.append(chain)
    common = [name for name in chains[0] if all(name in chain for chain in chains)]
    if not common or len(shapes[common[0]]) != 3 or len(set(join.inputs)) == 1:
        return None
    source, shape = common[0], shapes[common[0]]
    values = {source: torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.int32)}
    values[source] = values[source].view(1, *shape)
    for chain in chains:
        for name in reversed(chain[: chain.index(source)]):
            if name not in values:
                values[name] = operators[name](values[by_name[name].inputs[0]])
    return source, operators[join.name](*[values[name] for name in join.inputs])


def _as_windows(source: str, shape: tuple[int, ...], index: Tensor) -> Windows | None:
    """The windows that ``index`` (H', W', J) describes, None where it describes none."""
    height, width, count = index.shape
    _, rows, columns = shape
    first = index[0, 0]
    step_y = int(index[1, 0, 0] - first[0]) if height > 1 else columns
    step_x = int(index[0, 1, 0] - first[0]) if width > 1 else 1
    if step_y <= 0 or step_x <= 0 or step_y % columns:
        return None
    grid = step_y * torch.arange(height)[:, None] + step_x * torch.arange(width)
    if not torch.equal(index, (grid[..., None] + first).to(index.dtype)):
        return None
    taps = [first // (rows * columns), first // columns % rows, first % columns]
    axes = [sorted(set(tap.tolist())) for tap in taps]
    gaps = [axis[1] - axis[0] if len(axis) > 1 else 1 for axis in axes]
    sizes = (len(axes[0]), len(axes[1]), len(axes[2]))
    if sizes[0] * sizes[1] * sizes[2] != count or gaps[0] != 1:
        return None
    if any(
        axis != list(range(axis[0], axis[-1] + 1, gap))
        for axis, gap in zip(axes, gaps, strict=True)
    ):
        return None
    places = (
        torch.tensor(axes[0])[:, None, None] * rows * columns
        + torch.tensor(axes[1])[:, None] * columns
        + torch.tensor(axes[2])
    ).to(first.dtype)
    stride = (step_y // columns, step_x)
    last_row = axes[1][-1] + (height - 1) * stride[0]
    last_column = axes[2][-1] + (width - 1) * stride[1]
    if last_row >= rows or last_column >= columns:
        return None
    for order in itertools.permutations(range(3)):
        if torch.equal(places.permute(order).flatten(), first):
            a, b, c = order
            return Windows(
                source,
                slice(axes[0][0], axes[0][-1] + 1),
                slice(axes[1][0], last_row + 1),
                slice(axes[2][0], last_column + 1),
                sizes,
                (a, b, c),
                stride,
                (gaps[1], gaps[2]),
            )
    return None
