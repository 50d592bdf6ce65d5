"""What a run's student costs beside its teacher, for one sample."""

from __future__ import annotations

from archnet.config import HardwareConfig
from archnet.hardware import teacher_cost
from archnet.jobs.job import Facts, Job
from archnet.lower import deployed_cost, lower
from archnet.ops import Student


def costs(job: Job, student: Student) -> Facts:
    """On one sample; the teacher as it is, in float, and its bit operations at W8A8 as well."""
    before, after = teacher_cost(job.teacher, job.example()), deployed_cost(student)
    return {
        "macs": {"teacher": before.macs, "student": after.macs},
        "bops": {
            "teacher": before.bops,
            "teacher_w8a8": before.macs * 8 * 8,
            "student": after.bops,
        },
        "weight_bytes": {"teacher": before.weight_bytes, "student": after.weight_bytes},
        **on_target(job, student, before.macs, after.bops),
    }


def on_target(
    job: Job, student: Student, macs: int | None = None, bops: int | None = None
) -> Facts:
    """What the target would take for teacher and student, at the width of the teacher there.

    Bit operations count where activations below 8 bits are computed with; elsewhere fewer bits
    save no work, and the target's own cycles count.

    Args:
        job: with its teacher.
        student: of the run.
        macs: of the teacher, bops: of the student; None: counted here.
    """
    target = job.config.hardware
    macs = teacher_cost(job.teacher, job.example()).macs if macs is None else macs
    bops = deployed_cost(student).bops if bops is None else bops
    bits = [min((w for w in of if w >= 8), default=max(of)) for of in _widths(target)]
    cycles = {
        "teacher": None if (native := job.teacher_cycles()) is None else round(native),
        "student": round(sum(lower(student, weights=False).cycles.values())),
    }
    found: Facts = {"measure": "bops", "teacher": macs * bits[0] * bits[1], "student": bops}
    if min(target.act_bits) >= 8 and cycles["teacher"]:
        found = {"measure": "cycles", **cycles}
    found["teacher_bits"] = bits
    found["runs_teacher"] = all(row.exact and not row.written for row in student.report)
    return {"cycles": cycles, "on_target": found}


def _widths(target: HardwareConfig) -> tuple[list[int], list[int]]:
    return target.weight_bits, target.act_bits
