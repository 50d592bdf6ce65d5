"""`archnet verify` of finished runs, one row each.

    python benchmarks/verify.py outputs/cifar10/<run> ...

compares every form of the students with their golden integer models on 2,000 inputs and adds a row
a run to ``results/verify.csv``.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import append, run_row

from archnet.cli import main as archnet
from archnet.runs import RunFolder, read_json

# Of a run's row, what says which student was looked at.
STUDENT = ("task", "teacher", "hardware", "weight_bits", "act_bits", "bops", "weight_bytes", "seed")


def cell(check: Mapping[str, Any]) -> str:
    """What was found of a form, in one cell: ``equal``, or outputs and predictions that are not."""
    if "skipped" in check:
        return "not run"
    if check["bit_equal"] == 1:
        return "equal"
    return f"{min(99.99, 100 * check['bit_equal']):.2f} % equal, {check['changed']} changed"


def row(path: Path, inputs: int, minutes: float) -> dict[str, Any]:
    """The row of a run that `archnet verify` has seen."""
    run, checks = run_row(path), read_json(RunFolder.open(path).metrics)["verify"]["checks"]
    ran = {name: check for name, check in checks.items() if "skipped" not in check}
    return {
        **{key: run[key] for key in STUDENT},
        "metric": "share of outputs that are the golden integer model's, in qdq",
        "student_value": ran["qdq"]["bit_equal"],
        "minutes": round(minutes, 2),
        "command": f"python benchmarks/verify.py {path} --inputs {inputs}",
        "run": run["command"],
        "inputs": inputs,
        "changed": max(ran[name]["changed"] for name in ("pytorch float32", "qdq", "subbyte")),
        "runtimes": "; ".join(dict.fromkeys(check["runtime"] for check in ran.values())),
        **{name: cell(check) for name, check in checks.items()},
    }


def main() -> None:
    """Verify and add the rows; a run with changed predictions is recorded as any other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="run", help="finished run folder")
    parser.add_argument("--inputs", type=int, default=2000, help="images (default: 2000)")
    options = parser.parse_args()
    for path in options.runs:
        start = time.monotonic()
        if archnet(["verify", str(path), "--inputs", str(options.inputs)]) > 1:
            sys.exit(2)  # it has said why
        append("verify", row(path, options.inputs, (time.monotonic() - start) / 60))


if __name__ == "__main__":
    main()
