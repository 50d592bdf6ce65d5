"""What Arm's compiler says of students on an Ethos-U chip, and of their teacher in int8.

    python benchmarks/vela.py outputs/cifar10/<run>

quantizes the run's student at each of the widths by calibration alone, writes it as TensorFlow
Lite, has it compiled by `ethos-u-vela` and adds a row a width to ``results/vela.csv``. With
``--as-trained`` it takes the students as the runs left them. The teacher goes the same way as it
is: convolutions with their batch norms folded, additions kept, int8 throughout by the range that
it has on the calibration images. Nothing is run: the figures are the compiler's estimates.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy import arguments, students
from numpy.typing import NDArray
from record import append, versions
from torch import Tensor

from archnet.capture import TeacherGraph, TeacherNode, capture
from archnet.chips import ChipError, Compiled, bridge
from archnet.deploy import to_integers
from archnet.deploy.tflite import (
    LINEAR,
    RELU,
    SAME,
    VALID,
    Quantized,
    TfliteFile,
    convolution_options,
    pooling_options,
    to_tflite,
)
from archnet.errors import ArchnetError
from archnet.hardware import teacher_cost
from archnet.jobs.tensors import TensorJob
from archnet.lower import deployed_cost

WIDTHS = ("W8A8", "W4A4", "W2A4")
SHOWN = (
    "cycles",
    "sram_bytes",
    "flash_bytes",
    "encoded_weight_bytes",
    "cpu_operators",
    "npu_operators",
)
_READERS = {"aten.batch_norm.default": "batch_norm", "aten.relu.default": "relu"}


def teacher_tflite(graph: TeacherGraph, batches: Sequence[Tensor]) -> bytes:
    """A captured teacher as int8, its ranges those on the calibration images.

    Args:
        graph: of convolutions with stride 1, batch norms behind them, ReLUs, additions, 2x2
            pooling and linear layers.
        batches: (B, C, H, W) each.

    Raises:
        ArchnetError: the teacher has another operator.
    """
    return _Teacher(graph, batches).content()


class _Teacher:
    """One walk along the teacher's graph. A node's value lies under the last node fused into it."""

    def __init__(self, graph: TeacherGraph, batches: Sequence[Tensor]) -> None:
        self.graph, self.file = graph, TfliteFile()
        self.grids = self._grids(batches)
        self.tensors: dict[str, str] = {}

    def _grids(self, batches: Sequence[Tensor]) -> dict[str, Quantized]:
        """The whole of int8 for the range of every value, 0 being on the grid."""
        names = [node.name for node in self.graph.nodes]
        network = self.graph.features(names)
        (entry,) = self.graph.inputs
        ends: dict[str, tuple[float, float]] = dict.fromkeys([entry, *names], (0.0, 0.0))
        with torch.no_grad():
            for images in batches:
                for name, value in zip([entry, *names], [images, *network(images)], strict=False):
                    low, high = ends[name]
                    ends[name] = min(low, float(value.min())), max(high, float(value.max()))
        grids = {}
        for name, (low, high) in ends.items():
            scale = np.array([max(high - low, 1e-6) / 255])
            grids[name] = Quantized(scale, round(-128 - low / scale[0]))
        return grids

    def content(self) -> bytes:
        (entry,) = self.graph.inputs
        channels, height, width = self.graph.inputs[entry]
        shape = (1, height, width, channels)
        self.tensors[entry] = self.file.tensor(entry, shape, self.grids[entry])
        done = set()
        for node in self.graph.nodes:
            if node.name not in done:
                done |= self._write(node)
        return self.file.content([entry], [self.tensors[self.graph.outputs[0]]])

    def _write(self, node: TeacherNode) -> set[str]:
        """Write a node and those that are fused into it: their names."""
        kind, arguments = node.operator.split(".")[1], node.arguments
        x = [self.tensors[name] for name in node.refs()]
        if kind == "conv2d" and list(arguments["stride"]) == [1, 1]:
            fused, norm = self._fused(node, {"batch_norm", "relu"})
            weight, bias = _folded(arguments["weight"], arguments.get("bias"), norm)
            padding = SAME if list(arguments["padding"]) == [1, 1] else VALID
            self._convolution(fused, x[0], weight, bias, padding)
        elif kind == "linear":
            fused, _ = self._fused(node, {"relu"})
            # On a flattened map it is a convolution as large as the map.
            _, height, width, channels = self.file.tensors[x[0]].shape
            weight = _array(arguments["weight"]).reshape(-1, channels, height, width)
            self._convolution(fused, x[0], weight, _array(arguments["bias"]), VALID)
        elif kind == "add" and len(x) == 2:
            fused, _ = self._fused(node, {"relu"})
            name = fused[-1]
            self.file.tensor(name, self.file.tensors[x[0]].shape, self.grids[name])
            options = {0: self._activation(fused)}
            self.tensors[name] = self.file.operator("ADD", x, name, options)
        elif kind == "max_pool2d" and list(arguments["kernel_size"]) == [2, 2]:
            fused = [node.name]
            shape, grid = self.file.tensors[x[0]].shape, self.file.tensors[x[0]].quantized
            assert grid is not None
            halved = (1, shape[1] // 2, shape[2] // 2, shape[3])
            self.file.tensor(node.name, halved, grid)
            options = pooling_options(VALID, (2, 2), 2)
            self.tensors[node.name] = self.file.operator("MAX_POOL_2D", x, node.name, options)
        elif kind == "flatten":
            fused = [node.name]
            self.tensors[node.name] = x[0]
        else:
            raise ArchnetError(f"{node.path}: no way to write the teacher's {node.operator} here")
        return set(fused)

    def _fused(self, node: TeacherNode, kinds: set[str]) -> tuple[list[str], Mapping[str, Any]]:
        """The node and its only readers of these kinds; the batch norm's arguments, if any."""
        names, norm = [node.name], {}
        uses = self.graph.uses()
        while uses[names[-1]] == 1 and names[-1] != self.graph.outputs[0]:
            (reader,) = [other for other in self.graph.nodes if names[-1] in other.refs()]
            kind = _READERS.get(reader.operator)
            if kind not in kinds:
                break
            names.append(reader.name)
            norm = reader.arguments if kind == "batch_norm" else norm
        return names, norm

    def _activation(self, fused: list[str]) -> np.int8:
        (last,) = [node for node in self.graph.nodes if node.name == fused[-1]]
        return RELU if _READERS.get(last.operator) == "relu" else LINEAR

    def _convolution(
        self,
        fused: list[str],
        x: str,
        weight_OIHW: NDArray[np.float64],
        bias: NDArray[np.float64],
        padding: np.int8,
    ) -> None:
        name = fused[-1]
        size, source = self.file.tensors[x].shape, self.file.tensors[x].quantized
        assert source is not None
        scale = np.abs(weight_OIHW).max((1, 2, 3)).clip(1e-9) / 127
        integers = np.rint(weight_OIHW / scale[:, None, None, None]).transpose(0, 2, 3, 1)
        units = scale * source.scale
        kernel = weight_OIHW.shape[2:]
        height, width = size[1:3]
        if padding == VALID:
            height, width = height - kernel[0] + 1, width - kernel[1] + 1
        constants = [
            self.file.constant(f"{name}.weight", integers.astype(np.int8), Quantized(scale)),
            self.file.constant(
                f"{name}.bias",
                np.rint(bias / units).astype(np.int32),
                Quantized(units, dtype=np.int32),
            ),
        ]
        self.file.tensor(name, (1, height, width, len(bias)), self.grids[name])
        options = convolution_options(padding, 1, self._activation(fused))
        self.tensors[name] = self.file.operator("CONV_2D", [x, *constants], name, options)


def _folded(
    weight: Tensor, bias: Tensor | None, norm: Mapping[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight and bias of a convolution with the batch norm behind it, if there is one."""
    weights = _array(weight)
    biases = _array(bias) if bias is not None else np.zeros(len(weights))
    if norm:
        slope = _array(norm["weight"]) / np.sqrt(_array(norm["running_var"]) + norm["eps"])
        weights = weights * slope[:, None, None, None]
        biases = (biases - _array(norm["running_mean"])) * slope + _array(norm["bias"])
    return weights, biases


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


def estimated(content: bytes, accelerator: str) -> Compiled:
    """What the compiler says of a file.

    Raises:
        ChipError: it is not installed, or fails.
    """
    found = bridge("vela").compile(content, accelerator)
    if found.error:
        raise ChipError(f"{found.version}: {found.error}")
    return found


def teacher_report(job: TensorJob, accelerator: str) -> tuple[Compiled, int]:
    """The compiler's estimates of a run's teacher, and its multiply-accumulates."""
    batches = job.data.calibration_batches(job.config.quant.calibration_batches)
    content = teacher_tflite(capture(job.teacher, batches[0][:1]), batches)
    macs = teacher_cost(job.teacher, batches[0][:1], weight_bits=8, act_bits=8).macs
    return estimated(content, accelerator), macs


def main() -> None:
    """Compile and add the rows."""
    known = [chip for chips in bridge("vela").chips.values() for chip in chips]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    arguments(parser, WIDTHS)
    parser.add_argument("--accelerator", default=known[0], choices=known)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teachers: dict[Path, tuple[Compiled, int]] = {}
    for job, student, about in students(options):
        run = job.folder.path
        if run not in teachers:
            teachers[run] = teacher_report(job, options.accelerator)
            print(f"{about['task']} teacher", teachers[run][0].figures, flush=True)
        before, macs = teachers[run]
        after = estimated(to_tflite(to_integers(student, target="arch5")), options.accelerator)
        figures = {key: after.figures[key] for key in SHOWN}
        print(f"{about['task']} W{about['weight_bits']}A{about['act_bits']}", figures, flush=True)
        if options.dry_run:
            continue
        append(
            "vela",
            {
                **about,
                "metric": "inferences a second, estimated (teacher int8)",
                "teacher_value": round(before.figures["inferences_per_second"], 1),
                "student_value": round(after.figures["inferences_per_second"], 1),
                "macs_ratio": round(deployed_cost(student).macs / macs, 4),
                "versions": f"{versions()}; {after.version}",
                "command": f"{about['command']} --accelerator {options.accelerator}",
                **figures,
                **{f"teacher_{key}": before.figures[key] for key in SHOWN},
                "accelerator": options.accelerator,
                "memory": f"{after.figures['memory']}, {after.figures['clock_mhz']:.0f} MHz",
            },
        )


if __name__ == "__main__":
    main()
