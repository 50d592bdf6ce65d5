"""The one conductor: from a config to a run folder with a checked student in it.

data -> teacher -> look -> what the job prepares -> student (converted, quantized, calibrated) ->
distilled -> evaluated -> exported -> audited -> compared with a runtime -> costs ->
metrics.json, report.html and a table. Every stage asks the run's job, whatever that is for.
A finished stage leaves a file in the run folder (`archnet.runs`); a resumed run skips it.
"""

import logging
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger

import archnet
from archnet import report
from archnet.config import Config
from archnet.files import full_disk
from archnet.jobs.bench import ledger_of, search
from archnet.jobs.costs import costs
from archnet.jobs.job import Facts, Job
from archnet.jobs.layers import layers
from archnet.jobs.loggers import RunLoggers, require_told, run_loggers
from archnet.jobs.registry import check_data, job_class, runs_code
from archnet.ops import Student
from archnet.quant import Quantizer
from archnet.ranks import LEADER, RUN_FOLDER
from archnet.report.files import EVALUATION, LAYERS
from archnet.runs import RunError, RunFolder, read_json, write_json
from archnet.runs.device import device_name, require_device
from archnet.runs.quant import run_quant
from archnet.runs.student import (
    given_student,
    load_student,
    require_converted,
    require_trained,
    save_student,
    settle_student,
    write_tables,
)
from archnet.sweep import note

_log = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "lightning", "onnx", "onnxruntime", "numpy")
FINDINGS = ("verify", "compile")  # keys of metrics.json that commands add to a finished run


def run(config: Config, overridden: Sequence[str] = (), named: Sequence[str] = ()) -> RunFolder:
    """Run or resume the whole of it.

    Args:
        config: the checked config; ``config.resume`` names a folder to continue.
        overridden: keys and groups given on the command line, which must not contradict the
            config of a resumed folder.
        named: keys and groups that the command line names itself, which a search leaves alone.

    Returns:
        The run folder.

    Raises:
        ArchnetError: whatever a user can mend, in one line.
    """
    if config.resume:
        folder = RunFolder.open(config.resume, trusted=config.trust)
    else:
        require_device(config.trainer)
        check_data(config)
        config = job_class(config.task.kind).completed(config)
        folder = RunFolder.create(config)
        if config.goal.asked:
            ledger_of(folder, named)
    note(folder.path)
    with folder.locked():
        if config.resume:
            stored = folder.config()
            config = _class_of(folder).as_recorded(config, stored)
            config = folder.resumed(config, overridden)
            require_device(config.trainer)
            folder.write_config(config)
        _log.info("run folder: %s", folder.path)
        metrics = _work(config, folder)
    report.show(metrics, folder.path)
    return folder


def _work(config: Config, folder: RunFolder) -> dict[str, Any]:
    """All stages; what interrupts them ends with how to continue."""
    try:
        return _stages(folder)
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns the first Ctrl-C into an exit of its own.
        print(f"\nStopped. Continue: python train.py resume={folder.path}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        caches = (config.teacher.cache_dir, config.task.text.cache_dir)
        places = [folder.path, *(Path(cache).expanduser() for cache in caches)]
        full = full_disk(error, places)
        raise RunError(
            f"{full or error}; {folder.path} keeps all finished stages: "
            f"{'make room' if full else 'fix that'} and continue with resume={folder.path}"
        ) from error


def join(path: Path) -> None:
    """Take part in the distillation of a run that another process leads (DDP)."""
    # The process that leads has asked whether the folder may run what its config names.
    job = opened(RunFolder.open(path, trusted=True))
    with run_loggers(job.config, job.folder) as loggers:
        _distil(job, load_student(job.folder, "calibrated"), loggers.active)


def job_of(folder: RunFolder) -> Job:
    """The job of a run, not opened yet.

    Raises:
        RunError: somebody else has made the folder, and its job would run their code.
    """
    return _class_of(folder)(folder.config(), folder)


def _class_of(folder: RunFolder) -> type[Job]:
    task = folder.config().task
    if foreign := runs_code(task):
        folder.require_trust(foreign)
    return job_class(task.kind)


def opened(folder: RunFolder) -> Job:
    """The job of a run, with its data and its teacher."""
    _hush()
    job = job_of(folder)
    job.open()
    return job


def reopen(folder: RunFolder) -> tuple[Job, Student]:
    """A finished run: its job, opened, and its trained student.

    Raises:
        RunError: the run has not come that far.
    """
    student = load_student(folder)
    return opened(folder), student


def reevaluate(folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished run once more, on the test data of its task."""
    job, student = reopen(folder)
    found = job.evaluate(student)
    found.pop("details", None)
    return found


def _stages(folder: RunFolder) -> dict[str, Any]:
    job = opened(folder)
    with run_loggers(job.config, folder) as loggers:
        return _logged(job, loggers)


def _logged(job: Job, loggers: RunLoggers) -> dict[str, Any]:
    folder = job.folder
    finished: dict[str, Facts] = {}

    def prepare() -> Facts:
        student, facts = _convert(job)
        save_student(folder, "calibrated", student)
        write_tables(folder, student)
        return facts

    def train() -> Facts:
        loggers.begin()
        if job.config.goal.asked:
            student, result = search(job)
        else:
            student = load_student(folder, "calibrated")
            result = _distil(job, student, loggers.active)
        return {**result, **settle_student(folder, student)}

    finished["look"] = folder.stage("look", job.look)
    for name, work in job.preparations().items():
        finished[name] = folder.stage(name, work)
    finished["convert"] = folder.stage(
        "convert", prepare, needs=("mixed",), intact=lambda _: require_converted(folder)
    )
    finished["distill"] = folder.stage(
        "distill",
        train,
        needs=("inputs_seen", "unlabelled"),
        intact=lambda _: require_trained(folder),
    )
    student = load_student(folder)
    finished["evaluate"] = folder.stage(
        "evaluate",
        lambda: _evaluate(job, student),
        needs=("teacher", "student", "agreement", "inputs"),
    )
    finished["layers"] = folder.stage("layers", lambda: _layers(job, student), needs=("layers",))
    finished["export"] = folder.stage(
        "export",
        lambda: _export(job, student),
        intact=lambda done: folder.require_files(done.get("files")),
    )
    finished["audit"] = folder.stage("audit", lambda: _audit(job), needs=("pure", "violations"))
    finished["parity"] = folder.stage(
        "parity",
        lambda: job.parity(student),
        needs=("runtime", "max_abs_diff", "mismatches"),
    )
    finished["cost"] = folder.stage(
        "cost", lambda: costs(job, student), needs=("macs", "bops", "weight_bytes")
    )
    metrics = _write_metrics(job, _metrics(job, student, finished))

    def tell() -> Facts:
        loggers.begin()
        loggers.end(metrics, job.files)
        return {"written": loggers.written}

    folder.stage("log", tell, intact=lambda done: require_told(job.config, done))
    return metrics


def _write_metrics(job: Job, metrics: dict[str, Any]) -> dict[str, Any]:
    folder = job.folder
    if folder.metrics.is_file():
        # What commands found of this student stays when a finished run is opened again.
        try:
            earlier = read_json(folder.metrics, dict)
        except RunError as error:
            _log.warning("%s: written again", error)
        else:
            metrics |= {k: v for k, v in earlier.items() if k in FINDINGS}
    metrics["verdict"] = report.judged(folder.path, metrics, job.config.convert.max_cost)
    write_json(folder.metrics, metrics)
    report.write(folder.path)
    return metrics


def add_finding(folder: RunFolder, command: str, found: Mapping[str, Any]) -> None:
    """Keep what a command found of a finished run's student in its metrics and report.

    Args:
        folder: of the run, finished.
        command: one of `FINDINGS`, the key in ``metrics.json``.
        found: plain data (JSON); entries of earlier calls stay, but for those of the same names.

    Raises:
        RunError: another process works in the folder, or its metrics cannot be read.
    """
    with folder.locked():
        metrics = read_json(folder.metrics, dict)
        earlier = metrics.get(command)
        metrics[command] = {**(earlier if isinstance(earlier, dict) else {}), **found}
        write_json(folder.metrics, metrics)
        report.write(folder.path)


def _hush() -> None:
    """Keep what Lightning and torch say of themselves at every fit out of a run's output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for beginning in (
        "Checkpoint directory .* exists and is not empty",
        "The number of training batches .* is smaller than the logging interval",
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "Grad strides do not match bucket view strides",
        "You.re resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message=beginning)


def _convert(job: Job) -> tuple[Student, Facts]:
    """The student, converted, quantized and calibrated on unlabelled inputs; and what is known."""
    config = job.config
    batches = job.calibration(config.quant.calibration_batches)
    learned: dict[str, Quantizer] = {}
    facts: Facts = {}
    if config.convert.student is not None:
        # A student that was trained before is no longer what conversion made.
        student, learned = given_student(config)
    else:
        student, facts = job.convert(config.convert)
    student.graph.preprocessing = job.preprocessing()
    facts["mixed"] = {}
    if not config.goal.asked:  # else the search quantizes, and for `none` nothing does
        facts["mixed"] = run_quant(config, student, batches, learned)
        job.require_computable(student)
    taps = [tap.path for tap in student.taps]
    return student, {"taps": taps, **facts}


def _inexact(student: Student) -> list[str]:
    """The rules by which it approximates its teacher."""
    return sorted({row.rule for row in student.report if not row.exact})


def _distil(job: Job, student: Student, loggers: Sequence[Logger] = ()) -> Facts:
    """Train the student in place; with several processes, this one starts the others."""
    lightning.seed_everything(job.config.seed, verbose=False)
    several = job.config.trainer.devices > 1
    with _ranks(job.folder) if several else nullcontext():
        return job.distil(student, job.config.distill, job.folder.checkpoints, loggers)


@contextmanager
def _ranks(folder: RunFolder) -> Iterator[None]:
    """Let the processes that Lightning starts find the run, and leave no trace of them.

    What Lightning sets for its group would make the next group, of a sweep, wait for nobody.
    """
    before = dict(os.environ)
    os.environ[RUN_FOLDER] = str(folder.path.resolve())
    os.environ[LEADER] = str(os.getpid())
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in set(os.environ) - set(before):
            del os.environ[name]


def _export(job: Job, student: Student) -> Facts:
    written = job.export(student)
    size = sum(path.stat().st_size for path in written)
    return {"bytes": size, "files": job.folder.fingerprints(written)}


def _evaluate(job: Job, student: Student) -> Facts:
    """Figures are facts; what only the report shows stands in a file of its own."""
    found = job.evaluate(student)
    details = found.pop("details", {})
    write_json(
        job.folder.path / EVALUATION,
        {"classes": job.class_names(), "usage": job.usage(), **details},
    )
    return found


def _layers(job: Job, student: Student) -> Facts:
    """A row for every layer, with its error before and after training."""
    before = job.tap_errors(load_student(job.folder, "calibrated"))
    rows = layers(student, job.sample_cost(student), before, job.tap_errors(student))
    write_json(job.folder.path / LAYERS, rows)
    return {"layers": len(rows)}


def _audit(job: Job) -> Facts:
    audits = [archnet.audit(path, hardware=job.config.hardware) for path in job.files]
    not_judged: Counter[str] = Counter()
    for audit in audits:
        not_judged.update(audit.summary()["not_judged"])
    return {
        "pure": all(audit.pure for audit in audits),
        "violations": [str(line) for audit in audits for line in audit.violations],
        "not_judged": dict(not_judged),
    }


def _metrics(job: Job, student: Student, finished: dict[str, Facts]) -> dict[str, Any]:
    """What ``metrics.json`` says of the run; shares in points, sizes in bytes."""
    config, scores, seconds = job.config, finished["evaluate"], job.folder.seconds()
    parity = {key: value for key, value in finished["parity"].items() if key != "seconds"}
    return {
        "task": config.task.name,
        "teacher": {
            "name": config.teacher.name,
            **scores["teacher"],
            **_trouble(finished["look"]),
        },
        "student": {**scores["student"], "agreement": scores["agreement"]},
        "quant": {
            "method": config.quant.method,
            "weight_bits": config.quant.weight_bits,
            "act_bits": config.quant.act_bits,
            "copies": config.quant.copies,
            **_mixed(config, finished["convert"]),
        },
        **({"goal": finished["distill"]["goal"]} if config.goal.asked else {}),
        "hardware": config.hardware.name,
        "conversion": {
            "approximate_rules": _inexact(student),
            # Of a student that was trained before, there is no error of conversion.
            "error": student.graph.error if config.convert.student is None else None,
        },
        "paired": scores.get("paired", {}),
        "agreement_interval": scores.get("agreement_interval"),
        "cost": {
            key: finished["cost"][key]
            for key in ("sample", "macs", "bops", "weight_bytes", "cycles", "on_target")
            if key in finished["cost"]
        },
        "audit": {key: finished["audit"][key] for key in ("pure", "violations", "not_judged")},
        "parity": parity,
        **({"outputs": scores["outputs"]} if len(scores.get("outputs", ())) > 1 else {}),
        "preprocessing": job.preprocessing(),
        "data": {
            "unit": job.unit,
            "inputs_seen": finished["distill"]["inputs_seen"],
            "unlabelled": finished["distill"]["unlabelled"],
            "evaluated": scores["inputs"],
            **job.data_facts(),
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "device": device_name(config.trainer),
        "versions": {
            "archnet": archnet.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "seed": config.seed,
    }


def _trouble(look: Facts) -> Facts:
    """What a look at the teacher has found wrong with it, if anything."""
    return {"trouble": look["trouble"]} if look.get("trouble") else {}


def _mixed(config: Config, converted: dict[str, Any]) -> dict[str, Any]:
    """What a budget chose; nothing where widths are uniform."""
    if config.quant.budget is None:
        return {}
    budget = {"budget": config.quant.budget, "budget_of": config.quant.budget_of}
    return budget | converted["mixed"]
