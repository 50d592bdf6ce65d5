"""What users hold as data, read as batches of a network's inputs.

Any of these will do: a tensor or an array (one batch), a list of batches, a DataLoader or any
other iterable, a generator, or a function that makes one of these anew each time it is called. A
batch is a tensor, a tuple (inputs, labels), or a mapping with the names of the network's inputs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from archnet.errors import ArchnetError, CaptureError, TaskError, printable

_log = logging.getLogger(__name__)

Loadable = Tensor | np.ndarray[Any, Any] | Iterable[Any] | Callable[[], Iterable[Any]]
Inputs = Tensor | np.ndarray[Any, Any] | Sequence[Any] | Mapping[str, Any]
# Samples that calibration reads of what is no list: as many as `quant.calibration_batches` of 64.
CALIBRATION = 512
FITTING = 256  # that conversion reads, as many as `convert.calibration`
# Batches that are read where all are asked for; an iterable without a length may have no end.
MOST_BATCHES = 10_000
# What a mapping calls the input of a network that has one, and the labels.
_INPUT_NAMES = ("input", "inputs", "image", "images", "pixel_values", "x", "data")
_LABEL_NAMES = ("label", "labels", "target", "targets", "y", "mask", "masks")


class Network(Protocol):
    """What is read of a student: the names of its inputs, and their shapes for one sample."""

    @property
    def graph(self) -> Any: ...


@dataclass(frozen=True)
class Takes:
    """The inputs of a network: by name the shape of one sample, without the batch.

    ``whole`` names those that hold whole numbers (tokens, marks) instead of features. A network
    with such inputs takes sentences of any length.
    """

    shapes: Mapping[str, tuple[int, ...]]
    whole: frozenset[str] = frozenset()

    @classmethod
    def of(cls, student: Network) -> "Takes":
        """Those of a student."""
        graph = student.graph
        return cls({name: graph.shapes[name] for name in graph.inputs}, frozenset(graph.indices))

    def example(self) -> tuple[Tensor, ...]:
        """Two samples of noise (zeros for whole numbers), to capture a network with."""
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.zeros(2, *shape, dtype=torch.long)
            if name in self.whole
            else torch.randn(2, *shape, generator=generator)
            for name, shape in self.shapes.items()
        )

    def batch(
        self, given: Any, place: str, error: type[ArchnetError] = TaskError
    ) -> "LabelledBatch":
        """One batch of what a loader gives, checked; floating-point inputs as float32.

        Args:
            given: a tensor, a tuple or a list, or a mapping. A tuple is (inputs, labels), or all
                inputs, and then labels, of a network that takes several.
            place: what it is called in errors.
            error: raised for what is no batch of these inputs.
        """
        inputs, labels = self._parted(given, place, error)
        found = {
            name: as_tensor(value, place if len(inputs) == 1 else f"{name} of {place}", error)
            for name, value in zip(self.shapes, inputs, strict=True)
        }
        for name, x in found.items():
            self._check(name, x, place, error)
        sizes = {len(x) for x in found.values()}
        if len(sizes) > 1:
            raise error(f"{place}: its inputs have {' and '.join(map(str, sorted(sizes)))} samples")
        return LabelledBatch(tuple(found.values()), labels)

    def _parted(
        self, given: Any, place: str, error: type[ArchnetError]
    ) -> tuple[Sequence[Any], Any]:
        """Inputs in order, and labels; None without any."""
        wanted = len(self.shapes)
        if isinstance(given, Mapping):
            return self._named(given, place, error)
        if not isinstance(given, tuple | list):
            given = [given]
        parts = list(given)
        if not parts:
            raise error(f"{place} is an empty {type(given).__name__}")
        if isinstance(parts[0], Mapping) or (
            isinstance(parts[0], tuple | list)
            and any(isinstance(x, Tensor | np.ndarray | Mapping) for x in parts[0])
        ):
            inputs, _ = self._parted(parts[0], place, error)
            return inputs, parts[1] if len(parts) > 1 else None
        if wanted == 1:
            return parts[:1], parts[1] if len(parts) > 1 else None
        if len(parts) not in (wanted, wanted + 1):
            raise error(
                f"{place} is {len(parts)} values, and the network takes {wanted} inputs "
                f"({', '.join(self.shapes)}): give ({', '.join(self.shapes)}) or the same with "
                "labels behind"
            )
        return parts[:wanted], parts[wanted] if len(parts) > wanted else None

    def _named(
        self, given: Mapping[Any, Any], place: str, error: type[ArchnetError]
    ) -> tuple[Sequence[Any], Any]:
        labels = next((given[name] for name in _LABEL_NAMES if name in given), None)
        if all(name in given for name in self.shapes):
            labels = None if set(_LABEL_NAMES) & set(self.shapes) else labels
            return [given[name] for name in self.shapes], labels
        known = [name for name in _INPUT_NAMES if name in given]
        if len(self.shapes) == 1 and known:
            return [given[known[0]]], labels
        keys = ", ".join(map(printable, given)) or "no keys"
        hint = f", or {', '.join(_INPUT_NAMES[:5])}" if len(self.shapes) == 1 else ""
        raise error(
            f"{place} is a mapping with {keys}: the network's inputs are called "
            f"{', '.join(self.shapes)}{hint}"
        )

    def _check(self, name: str, x: Tensor, place: str, error: type[ArchnetError]) -> None:
        shape = self.shapes[name]
        shown = f"(B, {', '.join(map(str, shape))})" if shape else "(B,)"
        if tuple(x.shape) == shape and not self.whole:
            raise error(
                f"{place}: {name} has the shape {shape} of one sample, without a batch: give "
                f"{shown}, such as DataLoader(dataset, batch_size=64) makes"
            )
        if name not in self.whole and not x.is_floating_point():
            advice = (
                "convert pictures as the teacher's training did: x.float() / 255, then its mean "
                "and standard deviation"
                if x.dtype == torch.uint8
                else "give float32"
            )
            raise error(f"{place}: {name} holds {x.dtype}, and the network takes floats: {advice}")
        fits = x.dim() == len(shape) + 1 if self.whole else tuple(x.shape[1:]) == shape
        if not fits:
            raise error(
                f"{place}: {name} has the shape {tuple(x.shape)}, and the network takes {shown}: "
                "bring all samples to the size that it was converted for, or convert it for this"
            )


class LabelledBatch(NamedTuple):
    """A batch: one tensor (B, ...) an input, and what stood beside them; None where nothing did."""

    inputs: tuple[Tensor, ...]
    labels: Any

    @property
    def given(self) -> Tensor | tuple[Tensor, ...]:
        """The inputs as a student's calibration and training have them: alone where one is."""
        return self.inputs[0] if len(self.inputs) == 1 else self.inputs


class Batches:
    """Batches of what a user has; each ``iter()`` begins it anew.

    Args:
        data: see the module.
        takes: the inputs of the network that reads them.
        name: what they are called in errors and in the log.
        error: raised for what cannot be read.

    Raises:
        ArchnetError: (``error``) ``data`` is nothing that gives batches; while reading, a batch
            does not fit the network, or a generator is asked for a second pass.
    """

    def __init__(
        self,
        data: Loadable,
        takes: Takes,
        name: str = "data",
        error: type[ArchnetError] = TaskError,
    ) -> None:
        self.takes, self.name, self.error = takes, name, error
        self.is_list = isinstance(data, Tensor | np.ndarray | list | tuple)
        self._data = self._source(data)
        # An iterator is its own iterable: it can be read once.
        self._once = isinstance(self._data, Iterator)
        self._begun = self._told = False

    def _source(self, data: Any) -> Any:
        if isinstance(data, Tensor | np.ndarray):
            return [data]
        if isinstance(data, Mapping):
            return [data]
        if isinstance(data, tuple | list) and self._is_batch(data):
            return [data]
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise self.error(
                f"{self.name} is a {type(data).__name__}, a dataset of single samples: give "
                f"DataLoader({self.name}, batch_size=64)"
            )
        readable = isinstance(data, Iterable) or callable(data)
        if isinstance(data, str | bytes | type | torch.nn.Module) or not readable:
            kind = "None" if data is None else f"a {type(data).__name__}"
            raise self.error(
                f"{self.name} is {kind}: give a tensor (B, ...), a list of such batches, or a "
                "DataLoader"
            )
        return data

    def _is_batch(self, data: Sequence[Any]) -> bool:
        """Whether a sequence is all inputs of a network that takes several."""
        tensors = all(isinstance(x, Tensor | np.ndarray) for x in data)
        return tensors and len(data) == len(self.takes.shapes) > 1

    def labelled(self) -> Iterator[LabelledBatch]:
        """Batches with their labels.

        Raises:
            ArchnetError: (`error`) there is none, or one does not fit.
        """
        if self._once and self._begun:
            raise self.error(
                f"{self.name} is a {type(self._data).__name__}, which can be read once: give a "
                "list, a DataLoader, or the function that makes it"
            )
        self._begun = True
        is_function = callable(self._data) and not isinstance(self._data, Iterable)
        found = self._data() if is_function else self._data
        if not isinstance(found, Iterable):
            raise self.error(
                f"{self.name} is a function that returns a {type(found).__name__}: it has to give "
                "batches, one after another"
            )
        index = -1
        for index, given in enumerate(found):
            yield self.takes.batch(given, f"batch {index} of {self.name}", self.error)
        if index < 0:
            raise self.error(f"{self.name} has no batch: give some {self._shown()}")

    def _shown(self) -> str:
        shapes = self.takes.shapes.values()
        return ", ".join(f"(B, {', '.join(map(str, shape))})" for shape in shapes)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """Batches without their labels; one line in the log says where some were left out."""
        for batch in self.labelled():
            if batch.labels is not None and not self._told:
                _log.warning("%s: labels are dropped, only the inputs are read", self.name)
                self._told = True
            yield batch.given

    def endless(self) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """Batches without end: what ends is begun again."""
        for index in count():
            if self._once and index:
                raise self.error(
                    f"{self.name} is a {type(self._data).__name__} that has ended and cannot be "
                    "begun again: give a list, a DataLoader, or the function that makes it"
                )
            yield from self

    def first(self, samples: int) -> list["LabelledBatch"]:
        """The first batches, with at least so many samples where there are as many."""
        found, rows = list[LabelledBatch](), 0
        for batch in self.labelled():
            found.append(batch)
            rows += len(batch.inputs[0])
            if rows >= samples:
                break
        return found

    def limited(self, most: int | None, argument: str) -> Iterator[LabelledBatch]:
        """The first ``most`` batches with their labels; all of them where that is None.

        Raises:
            ArchnetError: (`error`) all are asked for, and there are more than `MOST_BATCHES` of
                what has no length.
        """
        has_length = hasattr(self._data, "__len__")
        for index, batch in enumerate(self.labelled()):
            if most is not None and index >= most:
                return
            if most is None and index >= MOST_BATCHES and not has_length:
                raise self.error(
                    f"{self.name} has no length and gives more than {MOST_BATCHES:,} batches: say "
                    f"how many to read, {argument}=<number>"
                )
            yield batch

    @property
    def known_samples(self) -> int | None:
        """How many samples a pass has, where the data say so without being read."""
        if isinstance(self._data, DataLoader) and isinstance(self._data.dataset, Sized):
            return len(self._data.dataset)
        if self.is_list:
            return sum(len(batch.inputs[0]) for batch in self.labelled())
        return None

    def samples(self, most: int) -> int:
        """How many samples a pass has, counted up to ``most``."""
        if self._once:
            return most
        if self.known_samples is not None:
            return min(most, self.known_samples)
        found = 0
        for batch in self.labelled():
            found += len(batch.inputs[0])
            if found >= most:
                return most
        return found


def calibration_batches(
    data: Loadable, takes: Takes, error: type[ArchnetError], most: int = CALIBRATION
) -> list[Tensor | tuple[Tensor, ...]]:
    """Unlabelled batches to calibrate with: of a list all, of anything else ``most`` samples.

    Raises:
        ArchnetError: (``error``) there are none, or they cannot be read.
    """
    batches, found = Batches(data, takes, "calibration", error), []
    samples = 0
    for batch in batches:
        found.append(batch)
        samples += len(batch if isinstance(batch, Tensor) else batch[0])
        if samples >= most and not batches.is_list:
            break
    return found


def inputs_of(given: Inputs, name: str = "example_inputs") -> dict[str, Tensor]:
    """The tensors of a network's inputs, floating-point ones as float32.

    Args:
        given: a tensor or an array (B, ...), a sequence of such, or a mapping from the names of
            the forward's arguments to such.
        name: what it is called in errors.

    Returns:
        By name, which is ``name`` or ``name[...]`` where it is no mapping.

    Raises:
        CaptureError: it holds no samples, something else than tensors, or values that are not
            finite.
    """
    if isinstance(given, Mapping):
        found = {f"{name}[{key!r}]": value for key, value in given.items()}
    elif isinstance(given, list | tuple) and not _is_numbers(given):
        found = {f"{name}[{index}]" if len(given) > 1 else name: x for index, x in enumerate(given)}
    else:
        found = {name: given}
    if not found:
        raise CaptureError(f"{name} is empty: give one tensor (B, ...) for every input")
    tensors = {place: as_tensor(value, place, CaptureError) for place, value in found.items()}
    for place, x in tensors.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise CaptureError(f"{place} has values that are not finite (nan or inf)")
    return tensors


def _is_numbers(given: object) -> bool:
    if not isinstance(given, list | tuple) or not given:
        return False
    return not any(isinstance(x, Tensor | np.ndarray) for x in given)


def as_tensor(value: Any, name: str, error: type[ArchnetError]) -> Tensor:
    """A dense tensor of real numbers with a batch, (B, ...); floating-point ones as float32.

    Raises:
        ArchnetError: (``error``) it is none.
    """
    if isinstance(value, np.ndarray):
        try:
            value = torch.as_tensor(value)
        except TypeError:
            raise error(f"{name} is an array of {value.dtype}, not of numbers") from None
    if not isinstance(value, Tensor):
        raise error(f"{name} is a {type(value).__name__}: give a tensor (B, ...)")
    if value.is_meta or value.layout != torch.strided or value.is_complex():
        kind = "meta" if value.is_meta else str(value.dtype if value.is_complex() else value.layout)
        raise error(f"{name} is a {kind} tensor: give a dense one of real numbers")
    if not value.dim() or not len(value):
        raise error(f"{name} of shape {tuple(value.shape)} holds no sample: give (B, ...)")
    return value.detach().float() if value.is_floating_point() else value.detach()
