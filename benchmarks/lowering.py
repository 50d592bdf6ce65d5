"""What families of networks become on a target: nodes, moves, MACs, and the time to convert.

    python benchmarks/lowering.py

Random weights. A teacher's file is torch's own export; Constant and Identity are not counted.
``moves`` are Slice, Split, Transpose, Reshape, Pad and their like; ``moves_ahead`` those of them
in front of the last pooling or mean over the map. A student's file is float.
"""

import argparse
import io
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import onnx
import torch
from record import append

import archnet
from archnet.coverage import Spent, load_everything
from archnet.deploy import to_onnx
from archnet.hardware import teacher_cost
from archnet.lower import deployed_cost
from archnet.teachers import MEMBERS, member, random_network

LEFT_OUT = ("Constant", "Identity")
MOVES = (
    "Slice",
    "Split",
    "Transpose",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Pad",
    "Expand",
    "Gather",
)
POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean", "MaxPool")
SMALL = 64  # of the pictures, where a network takes them
OWN_SIZE = ("ViT", "DeiT", "Swin", "MaxViT", "Inception", "EfficientFormer", "VGG")


def operators(model: onnx.ModelProto) -> list[str]:
    """The operators of a file, in order."""
    return [node.op_type for node in model.graph.node if node.op_type not in LEFT_OUT]


def moves(found: list[str]) -> tuple[int, int]:
    """Layout moves, and those in front of the last pooling."""
    last = max((index for index, name in enumerate(found) if name in POOLS), default=0)
    return sum(name in MOVES for name in found), sum(name in MOVES for name in found[:last])


def file_of(network: torch.nn.Module, images: torch.Tensor) -> onnx.ModelProto:
    """A network as torch exports it."""
    buffer = io.BytesIO()
    torch.backends.mha.set_fastpath_enabled(False)  # which ONNX has no operator for
    torch.onnx.export(network, (images,), buffer, opset_version=17, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def measure(name: str, hardware: str, size: int, seed: int) -> dict[str, Any]:
    """The row of one network."""
    network = random_network(member(name), seed=seed)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    before = operators(file_of(network, images))
    teacher = teacher_cost(network, images)
    mega = sum(t.nbytes for t in (*network.parameters(), *network.buffers())) / 2**20
    load_everything(hardware)
    start = time.process_time()
    student = archnet.convert(network, images, hardware)
    seconds = time.process_time() - start
    # Memory in a conversion of its own: measuring it costs time.
    del student
    with Spent() as spent:
        student = archnet.convert(network, images, hardware)
    after = operators(to_onnx(student))
    audit = archnet.audit(student, hardware)
    all_moves, ahead = moves(after)
    return {
        "task": f"random images {size}x{size}",
        "teacher": name,
        "hardware": hardware,
        "seed": seed,
        "command": f"python benchmarks/lowering.py {name} --hardware {hardware} --size {size}",
        "teacher_nodes": len(before),
        "teacher_moves": moves(before)[0],
        "nodes": len(after),
        "moves": all_moves,
        "moves_ahead": ahead,
        "nodes_ratio": round(len(after) / len(before), 2),
        "macs_ratio": round(deployed_cost(student).macs / teacher.macs, 3),
        "pure": audit.pure,
        "convert_cpu_s": round(seconds, 1),
        "convert_peak_mb": "" if spent.peak_mb is None else round(spent.peak_mb),
        "teacher_mb": round(mega, 1),
        "error": f"{student.graph.error:.1e}" if student.graph.error is not None else "",
        "operators": " ".join(f"{k}:{v}" for k, v in Counter(after).most_common()),
    }


def size_of(name: str) -> int:
    """Small pictures where a network, and the export of its teacher, takes them."""
    found = member(name)
    return found.size if found.family in OWN_SIZE else min(SMALL, found.size)


def main() -> None:
    """Measure and add the rows to ``results/lowering.csv``, each network in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("networks", nargs="*", help="names in archnet.teachers.MEMBERS")
    parser.add_argument("--hardware", default="arch5", help="target")
    parser.add_argument("--size", type=int, help="side of the pictures, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    options = parser.parse_args()
    names = options.networks or [item.name for item in MEMBERS]
    if len(names) > 1:
        for name in names:
            more = ["--size", str(options.size)] if options.size else []
            arguments = [name, "--hardware", options.hardware, *more]
            subprocess.run([sys.executable, __file__, *arguments], check=False)
        return
    torch.set_num_threads(1)
    (name,) = names
    row = measure(name, options.hardware, options.size or size_of(name), options.seed)
    append("lowering", row)
    print(
        f"{name}: {row['nodes']} nodes of {row['teacher_nodes']} ({row['nodes_ratio']}x), "
        f"{row['moves']} moves, {row['macs_ratio']} x MACs, {row['convert_cpu_s']} s"
    )


if __name__ == "__main__":
    main()
