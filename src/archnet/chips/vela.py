"""Arm's compiler for Ethos-U chips, ethos-u-vela: estimates alone, nothing is run."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "Arm's compiler for Ethos-U"
PACKAGE = "ethos-u-vela"
CHIPS = {  # family and multiply-accumulates a cycle
    "ethos_u55": ("ethos-u55-128", "ethos-u55-32", "ethos-u55-64", "ethos-u55-256"),
    "ethos_u85": (
        "ethos-u85-256",
        *(f"ethos-u85-{macs}" for macs in (128, 512, 1024, 2048)),
    ),
    "ethos_u65": ("ethos-u65-256", "ethos-u65-512"),
}
ACCELERATOR = "NPU"
SUFFIX = ".tflite"
ERRORS = (r"Error: ", r"(\w+\.)*\w+(Error|Exception): ", r"(?i).*error")

# "Warning (supported operators) operator: STRIDED_SLICE, ofm: 'name'", then lines that say why.
WARNED = re.compile(
    r"^Warning \([\w ]+\) operator: \w+, ofm: '(?P<name>[^'\n]*)'[ ]*\n"
    r"(?P<why>(?:(?!Warning|#)[^\n]*\S[^\n]*\n)*)",
    re.MULTILINE,
)
COUNTED = re.compile(r"^(CPU|NPU) operators = (\d+)", re.MULTILINE)


def operators(layers: list[dict[str, str]], printed: str) -> list[dict[str, Any]]:
    """The rows of its table of layers, with its reason for those that it leaves to the CPU."""
    why = {
        match["name"]: " ".join(line.strip() for line in match["why"].splitlines())
        for match in WARNED.finditer(printed)
    }
    return [
        {
            "name": row["Name"],
            "operator": row["Original Operator"],
            "where": row["Target"],
            "cycles": round(float(row["Op Cycles"])),
            "why": why.get(row["Name"], "").removeprefix("Reason: "),
        }
        for row in layers
    ]


def figures(row: dict[str, str], printed: str) -> dict[str, Any]:
    """A row of its summary, whose memories are in KiB, and its count of operators.

    Raises:
        RuntimeError: it has printed no such count.
    """
    counts = {where: int(count) for where, count in COUNTED.findall(printed)}
    if not counts:
        raise RuntimeError("Vela printed no count of operators")

    def total(*keys: str) -> int:
        return round(sum(float(row[f"{key}_memory_used"]) for key in keys) * 1024)

    return {
        "cycles": int(float(row["cycles_total"])),
        "inferences_per_second": float(row["inferences_per_second"]),
        "macs": int(float(row["nn_macs"])),
        "sram_bytes": total("sram"),
        "flash_bytes": total("on_chip_flash", "off_chip_flash", "dram"),
        "weight_bytes": int(float(row["total_original_weights"])),
        "encoded_weight_bytes": int(float(row["total_npu_encoded_weights"])),
        "clock_mhz": float(row["core_clock"]) / 1e6,
        "npu_operators": counts["NPU"],
        "cpu_operators": counts["CPU"],
        "memory": f"{row['system_config']}, {row['memory_mode']}",
    }


def run(request: Request) -> None:
    """Compile."""
    from ethosu.vela.vela import main

    out = request.folder / "out"
    main(
        [
            str(request.file),
            "--accelerator-config",
            request.chip,
            "--output-dir",
            str(out),
            "--show-cpu-operations",
            "--verbose-performance",
        ]
    )
    (layers,) = out.glob("*_per-layer.csv")
    (summary,) = out.glob("*_summary_*.csv")
    printed = request.log()
    with layers.open(newline="") as file:
        rows = operators(list(csv.DictReader(file)), printed)
    with summary.open(newline="") as file:
        (row,) = csv.DictReader(file)
    request.tell(operators=rows, figures=figures(row, printed))
