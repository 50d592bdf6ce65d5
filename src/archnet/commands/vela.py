"""`archnet vela`: a finished run's student compiled for an Arm Ethos-U chip."""

import argparse
from typing import TYPE_CHECKING

from archnet.commands.folder import folder_arguments, open_folder

if TYPE_CHECKING:
    from archnet.deploy.vela import VelaReport

HELP = "a run's student compiled for an Arm Ethos-U chip: speed, memory, what it cannot run"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)
    parser.add_argument("--accelerator", help="see archnet.deploy.vela (default: ethos-u55-128)")


def run(options: argparse.Namespace) -> int:
    """Print the compiler's estimates; 1 if operators are left to the CPU."""
    from rich.table import Table

    from archnet import pipeline
    from archnet.deploy.export import of_five
    from archnet.deploy.tflite import to_tflite
    from archnet.deploy.vela import ACCELERATOR, check_accelerator, compile_vela
    from archnet.report.table import plain_console

    accelerator = check_accelerator(options.accelerator or ACCELERATOR)
    folder = open_folder(options)
    pipeline.require_classifier(folder)
    model = of_five(pipeline.load_student(folder), "tflite")
    report = compile_vela(to_tflite(model), accelerator)
    table = Table(title=f"{report.accelerator}, {report.memory}", title_justify="left")
    table.add_column("")
    table.add_column("student", justify="right")
    for line in _rows(report):
        table.add_row(*line)
    plain_console().print(table)
    for operator in report.on_cpu:
        print(f"on the CPU: {operator}")
    return 1 if report.cpu_operators else 0


def _rows(report: "VelaReport") -> list[tuple[str, str]]:
    return [
        ("operators on the chip", f"{report.npu_operators:,}"),
        ("operators on the CPU", f"{report.cpu_operators:,}"),
        ("inferences a second", f"{report.inferences_per_second:,.1f}"),
        (f"cycles at {report.clock:,.0f} MHz", f"{report.cycles:,}"),
        ("multiply-accumulates", f"{report.macs:,}"),
        ("SRAM", f"{report.sram_bytes:,} B"),
        ("flash", f"{report.flash_bytes:,} B"),
        ("weights as int8", f"{report.weight_bytes:,} B"),
        ("weights, compressed", f"{report.encoded_weight_bytes:,} B"),
        ("estimated by", report.versions),
    ]
