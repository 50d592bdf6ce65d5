"""Rockchip's compiler and simulator for its NPUs: rknn-toolkit2.

Where an operator runs and its cycles stand in one place alone, a table in the log of ``build``.
The larger one of the memory's cycles and the array's counts; a row on the CPU is charged none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "Rockchip's compiler and simulator"
PACKAGE = "rknn-toolkit2"
CHIPS = {name: (name,) for name in ("rk3588", "rk3566", "rv1106", "rv1103b")}
ACCELERATOR = "NPU"
SUFFIX = ".onnx"
IR = 10  # the newest that its onnx reads
QUANTIZES = True
TORCH = True  # it imports it, and a plain installation would bring one for CUDA
ERRORS = (r"(\w+\.)*\w+(Error|Exception): ", r"E ")
MARK = r"^E (RKNN: )?(\[[\d:.]+\] )?"  # in front of what it says

ENDS = ("InputOperator", "OutputOperator")
ROW = re.compile(
    r"\] (?P<number>\d+)\s+(?P<operator>\S+)\s+(?P<type>\S+)\s+(?P<where>\S+)\s+(?P<reads>\S+)\s+"
    r"\S+\s+\d+/\d+/(?P<cycles>\d+)\s+(?P<kb>\d+)[ \t]*(?P<name>[^\n]*)"
)
MEMORY = re.compile(r"Total (Internal|Weight) Memory Size: ([\d.]+)KB")


def operators(log: str) -> list[dict[str, Any]]:
    """The rows of the last table in a log, without the network's inputs and outputs."""
    found: dict[int, dict[str, Any]] = {}
    for match in ROW.finditer(log):
        number = int(match["number"])
        if number == 0:
            found = {}
        found[number] = {
            "name": match["name"].strip().partition(":")[2] or match["operator"],
            "operator": match["operator"],
            "where": match["where"],
            "cycles": int(match["cycles"]),
            "reads": match["reads"],
            "kb": int(match["kb"]),
        }
    return [row for row in found.values() if row["operator"] not in ENDS]


def figures(rows: list[dict[str, Any]], log: str) -> dict[str, Any]:
    """Sums over the rows, and memory in bytes."""
    memory = {kind: float(kb) * 1024 for kind, kb in MEMORY.findall(log)}
    return {
        "cycles": sum(row["cycles"] for row in rows),
        "read_kb": sum(row["kb"] for row in rows),
        **{f"{kind.lower()}_bytes": round(size) for kind, size in memory.items()},
    }


def run(request: Request) -> None:
    """Compile, and simulate."""
    import numpy as np
    from rknn.api import RKNN

    toolkit: Any = RKNN(verbose=True)
    dataset = request.folder / "dataset.txt"
    if request.quantize:
        listed = []
        for index, item in enumerate(request.calibration()):
            listed.append(str(request.folder / f"calibration{index}.npy"))
            np.save(listed[-1], item[None])
        dataset.write_text("\n".join(listed))
    how = {"do_quantization": True, "dataset": str(dataset)} if request.quantize else {}
    steps = {
        "config": lambda: toolkit.config(target_platform=request.chip, quantized_dtype="w8a8"),
        "load_onnx": lambda: toolkit.load_onnx(model=str(request.file)),
        "build": lambda: toolkit.build(**({"do_quantization": False} | how)),
        "init_runtime": toolkit.init_runtime,
    }
    for name, step in steps.items():
        failed = step() not in (0, None)
        if name == "build":
            rows = operators(request.log())
            if rows:
                request.tell(operators=rows, figures=figures(rows, request.log()))
        if failed:
            raise RuntimeError(f"{name} failed")
    scores = [
        request.joined(
            [
                output.reshape(1, -1)
                for output in toolkit.inference(inputs=[item[None]], data_format=["nchw"])
            ]
        )
        for item in request.inputs()
    ]
    if scores:
        request.tell(scores=np.stack(scores))
