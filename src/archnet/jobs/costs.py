"""What a run's student costs beside its teacher, for one sample."""

from __future__ import annotations

from archnet.config import HardwareConfig
from archnet.hardware import teacher_cost
from archnet.jobs.job import Facts, Job
from archnet.lower import SampleCost
from archnet.ops import Student


def costs(job: Job, student: Student) -> Facts:
    """On one sample; the teacher as it is, in float, and its bit operations at W8A8 as well."""
    before, deployed = teacher_cost(job.teacher, job.example()), job.sample_cost(student)
    after = deployed.cost
    return {
        **({"sample": deployed.about} if deployed.about else {}),
        "macs": {"teacher": before.macs, "student": after.macs},
        "bops": {
            "teacher": before.bops,
            "teacher_w8a8": before.macs * 8 * 8,
            "student": after.bops,
        },
        "weight_bytes": {"teacher": before.weight_bytes, "student": after.weight_bytes},
        **_on_target(job, student, before.macs, deployed),
    }


def cost_ratio(job: Job, student: Student) -> tuple[float, str]:
    """What a student costs on the target, as a multiple of its teacher, and by which measure."""
    macs = teacher_cost(job.teacher, job.example()).macs
    found = _on_target(job, student, macs, job.sample_cost(student))["on_target"]
    return found["student"] / found["teacher"], found["measure"]


def _on_target(job: Job, student: Student, macs: int, deployed: SampleCost) -> Facts:
    """What the target would take for teacher and student, at the width of the teacher there.

    Bit operations count where activations below 8 bits are computed with; elsewhere fewer bits
    save no work, and the target's own cycles count.
    """
    target = job.config.hardware
    bits = [min((w for w in of if w >= 8), default=max(of)) for of in _widths(target)]
    cycles = {
        "teacher": None if (native := job.teacher_cycles()) is None else round(native),
        "student": round(sum(deployed.cycles.values())),
    }
    teacher = macs * bits[0] * bits[1]
    found: Facts = {"measure": "bops", "teacher": teacher, "student": deployed.cost.bops}
    if min(target.act_bits) >= 8 and cycles["teacher"]:
        found = {"measure": "cycles", **cycles}
    found["teacher_bits"] = bits
    found["runs_teacher"] = all(row.exact and not row.written for row in student.report)
    return {"cycles": cycles, "on_target": found}


def _widths(target: HardwareConfig) -> tuple[list[int], list[int]]:
    return target.weight_bits, target.act_bits
