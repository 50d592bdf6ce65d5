"""Arm's compiler for Ethos-U chips: what an int8 file costs there, and what the chip leaves over.

`ethos-u-vela` is an extra; it runs in a process of its own, because it prints, and leaves files.
"""

import csv
import difflib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from archnet.deploy.writer import ExportError

ACCELERATOR = "ethos-u55-128"
# What `vela --accelerator-config` knows: family and MACs a cycle.
ACCELERATORS = (
    *(f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)),
    *(f"ethos-u65-{macs}" for macs in (256, 512)),
    *(f"ethos-u85-{macs}" for macs in (128, 256, 512, 1024, 2048)),
)
MINUTES = 30  # a large network takes one or two


@dataclass(frozen=True)
class VelaReport:
    """What the compiler says of one network; figures are its estimates, nothing was run.

    Args:
        accelerator: the chip.
        memory: the compiler's choice of clock and memories, as it names them.
        clock: MHz.
        npu_operators, cpu_operators: how many run where; operators as the compiler counts them.
        on_cpu: "operator = name" for those on the CPU.
        inferences_per_second: batches of one.
        cycles: in all.
        macs: multiply-accumulates, as the compiler counts them.
        sram_bytes: largest use of the memory that holds activations.
        flash_bytes: weights and commands, where they are stored.
        weight_bytes, encoded_weight_bytes: weights and biases before and after compression.
        versions: of the compiler.
    """

    accelerator: str
    memory: str
    clock: float
    npu_operators: int
    cpu_operators: int
    on_cpu: tuple[str, ...]
    inferences_per_second: float
    cycles: int
    macs: int
    sram_bytes: int
    flash_bytes: int
    weight_bytes: int
    encoded_weight_bytes: int
    versions: str


def check_accelerator(name: str) -> str:
    """The name, if it is one of `ACCELERATORS`.

    Raises:
        ExportError: it is none; the message names the nearest.
    """
    if name not in ACCELERATORS:
        near = difflib.get_close_matches(name, ACCELERATORS, 1, 0.0)[0]
        raise ExportError(
            f"accelerator={name} is not one of {', '.join(ACCELERATORS)}; nearest: {near}"
        )
    return name


def compile_vela(content: bytes, accelerator: str = ACCELERATOR) -> VelaReport:
    """Compile a TensorFlow Lite file for an Ethos-U chip.

    Args:
        content: of the file; see `archnet.deploy.tflite.to_tflite`.
        accelerator: one of `ACCELERATORS`.

    Returns:
        The compiler's estimates.

    Raises:
        ExportError: an unknown accelerator, the extra is missing, or the compiler fails.
    """
    check_accelerator(accelerator)
    if importlib.util.find_spec("ethosu") is None:
        raise ExportError("Vela needs the extra: pip install 'archnet[vela]'")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.tflite"
        path.write_bytes(content)
        printed = _vela(
            [
                str(path),
                "--accelerator-config",
                accelerator,
                "--output-dir",
                folder,
                "--show-cpu-operations",
            ]
        )
        (summary,) = Path(folder).glob("student_summary_*.csv")
        with summary.open(newline="") as file:
            (row,) = csv.DictReader(file)
    compiler = f"ethos-u-vela {importlib.metadata.version('ethos-u-vela')}"
    return _report(row, printed, accelerator, compiler)


def _vela(arguments: list[str]) -> str:
    """What the compiler prints."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ethosu.vela", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=MINUTES * 60,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"Vela took more than {MINUTES} minutes") from error
    if done.returncode != 0:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in told if "error" in line.lower()]
        last = (errors or told or [f"exit code {done.returncode}"])[-1]
        raise ExportError(f"Vela cannot compile the file: {last.strip()}")
    return done.stdout


def _report(row: dict[str, str], printed: str, accelerator: str, compiler: str) -> VelaReport:
    """A row of the compiler's summary, whose memories are in KiB, and its list of operators."""
    counts = dict(re.findall(r"^(CPU|NPU) operators = (\d+)", printed, re.MULTILINE))
    if not counts:
        raise ExportError("Vela printed no count of operators: use ethos-u-vela 5.2")

    def total(*keys: str) -> float:
        return sum(float(row[f"{key}_memory_used"]) for key in keys) * 1024

    return VelaReport(
        accelerator=accelerator,
        memory=f"{row['system_config']}, {row['memory_mode']}",
        clock=float(row["core_clock"]) / 1e6,
        npu_operators=int(counts["NPU"]),
        cpu_operators=int(counts["CPU"]),
        on_cpu=tuple(re.findall(r"^\s+CPU: (.+?) \(outputs", printed, re.MULTILINE)),
        inferences_per_second=float(row["inferences_per_second"]),
        cycles=int(float(row["cycles_total"])),
        macs=int(float(row["nn_macs"])),
        sram_bytes=round(total("sram")),
        flash_bytes=round(total("on_chip_flash", "off_chip_flash", "dram")),
        weight_bytes=int(float(row["total_original_weights"])),
        encoded_weight_bytes=int(float(row["total_npu_encoded_weights"])),
        versions=compiler,
    )
