"""One change at a time from ``experiment=cifar10_ablation``, all at one budget of image-steps.

    python benchmarks/ablation.py --image-steps 10240

runs the main job once per variant (schedule, inputs of the blocks, teacher attention, residual
adaptation, quantizer, start) and adds a row a run to ``results/ablation.csv``. Variants are to be
compared by the validation columns; the test figures stand beside them for the record. Names of
variants run only those; with `--dry-run` it only prints the commands.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from record import CONF, ROOT, append, run_row

from archnet.compose import compose

EXPERIMENT = "cifar10_ablation"
# Of the steps of `local`, those that train the whole network at the end.
JOINT_SHARE = 0.375
ADAPTERS = ["distill.attention=true", "distill.adaptation=true"]
# What each variant changes; the first one is the experiment itself.
VARIANTS: dict[str, list[str]] = {
    "local": [],
    "local-teacher-inputs": ["distill.inputs=teacher"],
    "local-tam": ["distill.attention=true"],
    "local-rfa": ["distill.adaptation=true"],
    "joint": ["distill.schedule=joint"],
    "joint-tam": ["distill.schedule=joint", "distill.attention=true"],
    "joint-rfa": ["distill.schedule=joint", "distill.adaptation=true"],
    "joint-tam-rfa": ["distill.schedule=joint", *ADAPTERS],
    "progressive": ["distill.schedule=progressive"],
    "progressive-tam-rfa": ["distill.schedule=progressive", *ADAPTERS],
    "dorefa": ["quant.method=dorefa"],
    "random": ["convert.start=random"],
}


def main() -> None:
    """Run the variants one after another; each is recorded as soon as it has ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--image-steps", type=int, default=10_240, help="images times steps a row")
    parser.add_argument("--set", action="append", default=[], help="a config key, for every run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(VARIANTS)}")
    base = [f"experiment={EXPERIMENT}", *options.set]
    config = compose(CONF, base)
    steps = max(1, round(options.image_steps / config.task.data.batch_size))
    base += [f"distill.steps={steps}", f"distill.joint_steps={round(JOINT_SHARE * steps)}"]
    for name in options.variants or VARIANTS:
        job = ["train.py", *base, *VARIANTS[name], f"name={name}"]
        print(" ".join(["python", *job]), flush=True)
        if options.dry_run:
            continue
        if subprocess.run([sys.executable, *job], cwd=ROOT, check=False).returncode:
            sys.exit(f"{name} failed; its folder under {config.output_dir} says how far it came")
        append("ablation", run_row(_latest(ROOT / config.output_dir / config.task.name, name)))


def _latest(runs: Path, name: str) -> Path:
    return max(runs.glob(f"*_{name}"))


if __name__ == "__main__":
    main()
