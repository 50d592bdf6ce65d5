"""One change at a time from ``experiment=cifar10_ablation``, all at one budget of image-steps.

    python benchmarks/ablation.py --image-steps 60000

runs sweeps of the main job (teacher attention and residual adaptation on and off; progressive and
local schedules; DoReFa; a random start) and adds a row a run to ``results/ablation.csv``. Variants
are to be compared by the validation columns; the test figures stand beside them for the record.
With `--dry-run` it only prints the commands.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from record import CONF, ROOT, append, run_row

from archnet.compose import compose

EXPERIMENT = "cifar10_ablation"
# Of the steps of `local`, those that train the whole network at the end.
JOINT_SHARE = 0.25


def sweeps(steps: int) -> Iterator[list[str]]:
    """What each sweep changes from the experiment; the first one holds the experiment itself."""
    yield ["distill.attention=true,false", "distill.adaptation=true,false"]
    yield ["distill=progressive"]
    joint_steps = f"distill.joint_steps={round(JOINT_SHARE * steps)}"
    yield ["distill=local", joint_steps, "distill.inputs=teacher,student"]
    yield ["quant=dorefa"]
    yield ["convert.start=random"]


def main() -> None:
    """Run the sweeps one after another; each run is recorded as soon as its sweep has ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--image-steps", type=int, default=60_000, help="images times steps a row")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("overrides", nargs="*", help="further config keys, for every run")
    options = parser.parse_args()
    base = [f"experiment={EXPERIMENT}", *options.overrides]
    config = compose(CONF, base)
    steps = max(1, round(options.image_steps / config.task.data.batch_size))
    runs = ROOT / config.output_dir / config.task.name
    for changes in sweeps(steps):
        job = ["train.py", "-m", *base, f"distill.steps={steps}", *changes]
        print(" ".join(["python", *job]), flush=True)
        if options.dry_run:
            continue
        before = set(runs.glob("*"))
        ended = subprocess.run([sys.executable, *job], cwd=ROOT, check=False)
        for folder in sorted(_finished(runs) - before):
            append("ablation", run_row(folder))
        if ended.returncode:
            sys.exit(f"a run failed; go on with its folder by python train.py resume={runs}/...")


def _finished(runs: Path) -> set[Path]:
    return {path.parent for path in runs.glob("*/metrics.json")}


if __name__ == "__main__":
    main()
