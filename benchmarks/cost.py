"""What exact students cost at 224x224 under ``arch5``: MACs, bit operations, weight bytes.

    python benchmarks/cost.py

Random weights and batch-norm statistics: cost does not depend on them, and the relative error of
the float student beside its cost shows that it is the same function. Bit operations are those of
W2A4 with 8 bits in the first and the last layer, over the teacher's at W8A8 throughout.
"""

import argparse
from typing import Any

import torch
from record import append

import archnet
from archnet.hardware import teacher_cost
from archnet.lower import deployed_cost
from archnet.quant import Recipe
from archnet.teachers import member, random_network

TEACHERS = ("resnet18", "resnet50", "mobilenet_v2")
IMAGE_SIZE = 224
WEIGHT_BITS, ACT_BITS = 2, 4


def measure(name: str, hardware: str, seed: int) -> dict[str, Any]:
    """The row of one teacher."""
    teacher = random_network(member(name), seed=seed)
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = teacher_cost(teacher, images, weight_bits=8, act_bits=8)
    student = archnet.convert(teacher, images, hardware=hardware)
    with torch.no_grad():
        expected = teacher(images)
        error = (student(images) - expected).norm() / expected.norm()
    after_float = deployed_cost(student)
    archnet.quantize(student, Recipe(WEIGHT_BITS, ACT_BITS, equalize=False), calibration=[images])
    after = deployed_cost(student)
    return {
        "task": f"random images {IMAGE_SIZE}x{IMAGE_SIZE}",
        "teacher": name,
        "hardware": hardware,
        "weight_bits": WEIGHT_BITS,
        "act_bits": ACT_BITS,
        "metric": "none",
        "macs_ratio": round(after.macs / before.macs, 4),
        "bops": after.bops,
        "weight_bytes": after.weight_bytes,
        "seed": seed,
        "command": f"python benchmarks/cost.py {name} --hardware {hardware} --seed {seed}",
        "teacher_macs": before.macs,
        "student_macs": after.macs,
        "teacher_w8a8_bops": before.bops,
        "bops_ratio": round(after.bops / before.bops, 4),
        "teacher_w8a8_weight_bytes": before.weight_bytes,
        "float_weight_bytes": after_float.weight_bytes,
        "relative_error": f"{error.item():.1e}",
        "pure": archnet.audit(student, hardware=hardware).pure,
    }


def main() -> None:
    """Measure and add the rows to ``results/cost.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "teachers", nargs="*", default=TEACHERS, help="names in archnet.teachers.MEMBERS"
    )
    parser.add_argument("--hardware", default="arch5", help="target")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.teachers:
        row = measure(name, options.hardware, options.seed)
        append("cost", row)
        print(f"{name}: {row['macs_ratio']} x MACs, {row['bops_ratio']} x BOPs of W8A8")


if __name__ == "__main__":
    main()
