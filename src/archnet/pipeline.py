"""The one conductor: from a config to a run folder with a checked student in it.

data -> teacher -> student (converted, quantized, calibrated) -> distilled -> evaluated ->
exported -> audited -> compared with a runtime -> metrics.json, report.html and a table.
A finished stage leaves a file in the run folder (`archnet.runs`); a resumed run skips it.
"""

import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

import archnet
from archnet import report, text_pipeline
from archnet.capture import TeacherGraph, capture
from archnet.config import Config, LoggerConfig, TeacherConfig
from archnet.convert import Approximation
from archnet.deploy import to_integers
from archnet.distill import train as distill
from archnet.errors import ArchnetError
from archnet.files import full_disk
from archnet.hardware import teacher_cost
from archnet.lower import deployed_cost
from archnet.ops import Student
from archnet.quant import FLOAT, Quantizer
from archnet.ranks import LEADER, RUN_FOLDER
from archnet.run_device import device_name, device_of, require_device, set_up
from archnet.run_images import as_recorded, with_preprocessing
from archnet.run_look import look
from archnet.run_quant import run_quant
from archnet.run_student import (
    given_student,
    load_student,
    require_converted,
    require_trained,
    save_student,
    settle_student,
    write_tables,
)
from archnet.run_teacher import run_teacher
from archnet.runs import RunError, RunFolder, read_json, write_json
from archnet.tasks import ClassificationData, check_data
from archnet.teachers import load_teacher, require_marian
from archnet.teachers.preprocessing import class_names_of

_log = logging.getLogger(__name__)

# Inputs on which the exported file is compared with the student.
PARITY_INPUTS = 500
PARITY = ("max_abs_diff", "mismatches")  # what is kept of that
_PACKAGES = ("torch", "torchvision", "lightning", "onnx", "onnxruntime", "numpy")


@dataclass
class Run:
    """What every stage works on."""

    config: Config
    folder: RunFolder
    data: ClassificationData
    teacher: nn.Module

    @property
    def device(self) -> torch.device:
        """Where evaluation runs."""
        return device_of(self.config.trainer)

    def captured(self) -> TeacherGraph:
        """The teacher as it is compared with the student: up to its scores."""
        return capture(self.teacher, self.data.calibration_batches(1)[0][:1])


def run(config: Config, overridden: Sequence[str] = ()) -> RunFolder:
    """Run or resume the whole of it.

    Args:
        config: the checked config; ``config.resume`` names a folder to continue.
        overridden: keys and groups given on the command line, which must not contradict the
            config of a resumed folder.

    Returns:
        The run folder.

    Raises:
        ArchnetError: whatever a user can mend, in one line.
    """
    if config.resume:
        folder = RunFolder.open(config.resume, trusted=config.trust)
    else:
        require_device(config.trainer)
        check_data(config.task, config.teacher.train)
        if config.teacher.source == "marian":
            require_marian(config.teacher.name)
        config = with_preprocessing(config)
        folder = RunFolder.create(config)
    with folder.locked():
        if config.resume:
            config = folder.resumed(as_recorded(config, folder.config()), overridden)
            require_device(config.trainer)
            folder.write_config(config)
        _log.info("run folder: %s", folder.path)
        metrics = _work(config, folder)
    report.show(metrics, folder.path)
    return folder


def _work(config: Config, folder: RunFolder) -> dict[str, Any]:
    """All stages; what interrupts them ends with how to continue."""
    try:
        return _stages(config, folder)
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns the first Ctrl-C into an exit of its own.
        print(f"\nStopped. Continue: python train.py resume={folder.path}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        caches = (config.teacher.cache_dir, config.task.text.cache_dir)
        places = [folder.path, *(Path(cache).expanduser() for cache in caches)]
        full = full_disk(error, places)
        raise RunError(
            f"{full or error}; {folder.path} keeps all that was finished: "
            f"{'make room' if full else 'mend that'} and continue with resume={folder.path}"
        ) from error


def join(path: Path) -> None:
    """Take part in the distillation of a run that another process leads (DDP)."""
    # The process that leads has asked whether the folder may run what its config names.
    folder = RunFolder.open(path, trusted=True)
    student = load_student(folder, "calibrated")
    if folder.config().task.kind == "translation":
        _hush()
        _distil_text(text_pipeline.open_run(folder.config(), folder), student)
    else:
        _distil(_open(folder.config(), folder), student)


def reopen(folder: RunFolder) -> tuple[Run, Student]:
    """A finished run: its task, teacher and trained student.

    Raises:
        RunError: the run has not come that far, or is no classifier's.
    """
    require_classifier(folder)
    student = load_student(folder)
    return _open(folder.config(), folder), student


def require_classifier(folder: RunFolder) -> None:
    """Raise `RunError` where a run's student translates."""
    if is_translation(folder):
        raise RunError(
            f"{folder.path} holds a translator, and this command is for classifiers: what there is "
            "for translators are translate, evaluate, export and audit"
        )


def is_translation(folder: RunFolder) -> bool:
    """Whether a run's student translates."""
    return folder.config().task.kind == "translation"


def reevaluate(folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished run once more, on the test data of its task."""
    if not is_translation(folder):
        return evaluate(*reopen(folder))
    _hush()
    student = load_student(folder)
    this = text_pipeline.open_run(folder.config(), folder)
    return text_pipeline.evaluate(this, student)


def evaluate(this: Run, student: Student) -> dict[str, Any]:
    """Teacher and student on the same test images.

    Returns:
        ``teacher`` and ``student`` accuracy (None where the images have no labels) and their
        ``agreement``, in points (0 to 100), and the number of ``images``.
    """
    scores = this.captured().scores()
    networks = scores.to(this.device), student.to(this.device).eval()
    guesses, labels = [], []
    with torch.inference_mode():
        for images_BCHW, labels_B in this.data.test_dataloader():
            x_BCHW = images_BCHW.to(this.device)
            guesses.append(torch.stack([net(x_BCHW).argmax(1).cpu() for net in networks]))
            labels.append(labels_B)
            if sum(map(len, labels)) >= (this.config.trainer.limit_eval or math.inf):
                break
    if not labels:
        raise ArchnetError("the test split is empty: set task.data.test_fraction above zero")
    student.cpu()
    limit = this.config.trainer.limit_eval
    (teacher_N, student_N), label_N = torch.cat(guesses, 1)[:, :limit], torch.cat(labels)[:limit]
    labelled = bool((label_N >= 0).all())
    return {
        "teacher": _points(teacher_N == label_N) if labelled else None,
        "student": _points(student_N == label_N) if labelled else None,
        "agreement": _points(teacher_N == student_N),
        "images": len(label_N),
    }


def form(config: Config) -> str:
    """The form in which a run's student is deployed."""
    return "float" if config.quant.method == "none" else "qdq"


def test_images(data: ClassificationData, count: int) -> Tensor:
    """The first ``count`` images of the test split, (count, C, H, W); fewer if it has fewer."""
    batches, found = [], 0
    for images, _ in data.test_dataloader():
        batches.append(images)
        found += len(images)
        if found >= count:
            break
    return torch.cat(batches)[:count]


def _points(hits_N: Tensor) -> float:
    return round(100 * hits_N.double().mean().item(), 4)


def _stages(config: Config, folder: RunFolder) -> dict[str, Any]:
    if config.task.kind == "translation":
        _hush()
        done = text_pipeline.stages(config, folder, _distil_text)
        return _write_metrics(folder, _text_metrics(config, folder, done))
    this = _open(config, folder)
    finished = {}

    def look_at_teacher() -> dict[str, Any]:
        names = class_names_of(config.teacher, this.teacher)
        return look(config, this.data, this.captured().scores(), this.device, names)

    def prepare() -> dict[str, Any]:
        student, widths = _convert(this)
        save_student(folder, "calibrated", student)
        write_tables(folder, student)
        inexact = sorted({row.rule for row in student.report if not row.exact})
        taps = [tap.path for tap in student.taps]
        found = {"taps": taps, "approximate_rules": inexact, "mixed": widths}
        # A student that was trained before is no longer what conversion made.
        return found if config.convert.student else {**found, "error": student.graph.error}

    def train() -> dict[str, Any]:
        student = load_student(folder, "calibrated")
        result = _distil(this, student)
        return {**result, **settle_student(folder, student)}

    finished["look"] = folder.stage("look", look_at_teacher)
    finished["convert"] = folder.stage(
        "convert", prepare, needs=("mixed",), intact=lambda _: require_converted(folder)
    )
    finished["distill"] = folder.stage(
        "distill",
        train,
        needs=("images_seen", "unlabelled"),
        intact=lambda _: require_trained(folder),
    )
    student = load_student(folder)
    finished["evaluate"] = folder.stage(
        "evaluate",
        lambda: evaluate(this, student),
        needs=("teacher", "student", "agreement", "images"),
    )
    finished["export"] = folder.stage(
        "export",
        lambda: _export(this, student),
        intact=lambda done: folder.require_files(done.get("files")),
    )
    finished["audit"] = folder.stage("audit", lambda: _audit(this), needs=("pure", "violations"))
    finished["parity"] = folder.stage(
        "parity", lambda: _parity(this, student), needs=("runtime", *PARITY)
    )
    finished["cost"] = folder.stage(
        "cost", lambda: _cost(this, student), needs=("macs", "bops", "weight_bytes")
    )
    return _write_metrics(folder, _metrics(this, finished))


def _write_metrics(folder: RunFolder, metrics: dict[str, Any]) -> dict[str, Any]:
    if folder.metrics.is_file():
        # What `archnet verify` found of this student stays when a finished run is opened again.
        try:
            earlier = read_json(folder.metrics, dict)
        except RunError as error:
            _log.warning("%s: written again", error)
        else:
            metrics |= {k: v for k, v in earlier.items() if k == "verify"}
    write_json(folder.metrics, metrics)
    report.write(folder.path)
    return metrics


def _open(config: Config, folder: RunFolder) -> Run:
    _hush()
    set_up(config.trainer)
    data = ClassificationData(config.task, config.seed)
    data.prepare_data()
    data.setup()
    # A teacher without weights is the same one whenever the run is opened again.
    lightning.seed_everything(config.seed, verbose=False)
    return Run(config, folder, data, _teacher(config, folder, data))


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


def _teacher(config: Config, folder: RunFolder, data: ClassificationData) -> nn.Module:
    """The trained teacher; one trained for this run is kept in its folder."""

    def load(source: TeacherConfig) -> nn.Module:
        return load_teacher(
            source,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
        )

    return run_teacher(config, folder, data, load)


def _convert(this: Run) -> tuple[Student, dict[str, Any]]:
    """The student: converted, quantized and calibrated on unlabelled images.

    Returns:
        The student, and what `run_quant` says of its widths.
    """
    config, quant, asked = this.config, this.config.quant, this.config.convert
    batches = this.data.calibration_batches(quant.calibration_batches)
    learned: dict[str, Quantizer] = {}
    if asked.student is not None:
        student, learned = given_student(config)
    else:
        student = archnet.convert(
            this.teacher,
            batches[0][:1],
            hardware=config.hardware,
            start=asked.start,
            taps=asked.taps,
            inner_taps=asked.inner_taps,
            seed=config.seed,
            calibration=this.data.calibration_inputs(asked.calibration),
            approximation=Approximation(
                asked.attention,
                asked.attention_hinges,
                asked.hinges,
                asked.norm_hinges,
                asked.gate_hinges,
                asked.min_gain,
                asked.max_macs,
                asked.max_cost,
            ),
        )
    widths = run_quant(config, student, batches, learned)
    if quant.method != "none":
        _check_integers(this, student)
    return student, widths


def _check_integers(this: Run, student: Student) -> None:
    """Refuse a student that the target's arithmetic cannot hold; float parts are not looked at."""
    quant, target = this.config.quant, this.config.hardware
    widths = (quant.weight_bits, quant.act_bits, quant.first_bits, quant.last_bits)
    if FLOAT not in widths:
        to_integers(student, cast(Any, target.requantization), target.accumulator_bits)


def _distil(this: Run, student: Student) -> dict[str, Any]:
    """Train the student in place; with several processes, this one starts the others."""
    config = this.config
    lightning.seed_everything(config.seed, verbose=False)
    loggers = _loggers(config.logger, this.folder)
    # The captured teacher gives its features at the taps, by the nodes that conversion named.
    features = this.captured().features([tap.node for tap in student.taps])
    several = config.trainer.devices > 1
    with _closing(loggers), _ranks(this.folder) if several else nullcontext():
        return distill(
            features,
            student,
            this.data,
            config.distill,
            trainer=config.trainer,
            folder=this.folder.checkpoints,
            loggers=loggers,
        )


def _distil_text(this: text_pipeline.TextRun, student: Student) -> dict[str, Any]:
    """As `_distil`, for translation."""
    loggers = _loggers(this.config.logger, this.folder)
    several = this.config.trainer.devices > 1
    with _closing(loggers), _ranks(this.folder) if several else nullcontext():
        return text_pipeline.distil(this, student, loggers)


@contextmanager
def _closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Finish W&B's, else the next run of a sweep would write to it."""
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()


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


def _loggers(config: LoggerConfig, folder: RunFolder) -> list[Logger]:
    logs, loggers = folder.path / "logs", list[Logger]()
    if config.csv:
        # Lightning empties the folder of an earlier session, which a resumed run must not.
        session = len(list((logs / "csv").glob("*")))
        loggers.append(CSVLogger(logs, name="csv", version=f"{session:03d}"))
    if config.tensorboard:
        loggers.append(TensorBoardLogger(logs, name="tensorboard", version=""))
    if config.wandb.enabled and config.wandb.mode != "disabled":
        online = config.wandb.mode == "online" or (
            config.wandb.mode == "auto" and "WANDB_API_KEY" in os.environ
        )
        wandb = WandbLogger(
            name=folder.path.name,
            id=folder.path.name,
            save_dir=logs,
            offline=not online,
            project=config.wandb.project,
            resume="allow" if online else None,
        )
        loggers.append(wandb)
    return loggers


def _export(this: Run, student: Student) -> dict[str, Any]:
    if this.config.quant.method != "none":
        _check_integers(this, student)
    archnet.export(student, this.folder.onnx, form=form(this.config))
    files = this.folder.fingerprints([this.folder.onnx])
    return {"bytes": this.folder.onnx.stat().st_size, "files": files}


def _audit(this: Run) -> dict[str, Any]:
    audit = archnet.audit(this.folder.onnx, hardware=this.config.hardware)
    return {
        "pure": audit.pure,
        "violations": [str(line) for line in audit.violations],
        "not_judged": audit.summary()["not_judged"],
    }


def _parity(this: Run, student: Student) -> dict[str, Any]:
    parity = archnet.parity(student, this.folder.onnx, test_images(this.data, PARITY_INPUTS))
    return {
        "runtime": parity.runtime,
        "max_abs_diff": parity.max_abs_diff,
        "mismatches": parity.mismatches,
    }


def _cost(this: Run, student: Student) -> dict[str, Any]:
    """On one sample; the teacher as it is, in float, and its bit operations at W8A8 as well."""
    example = this.data.calibration_batches(1)[0][:1]
    before, after = teacher_cost(this.teacher, example), deployed_cost(student)
    return {
        "macs": {"teacher": before.macs, "student": after.macs},
        "bops": {
            "teacher": before.bops,
            "teacher_w8a8": before.macs * 8 * 8,
            "student": after.bops,
        },
        "weight_bytes": {"teacher": before.weight_bytes, "student": after.weight_bytes},
    }


def _metrics(this: Run, finished: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``metrics.json`` says of the run; accuracies in points, sizes in bytes."""
    config, scores = this.config, finished["evaluate"]
    return {
        "task": config.task.name,
        "teacher": {"name": config.teacher.name, "accuracy": scores["teacher"]},
        "student": {"accuracy": scores["student"], "agreement": scores["agreement"]},
        **_common_metrics(config, this.folder, finished, PARITY),
        "data": {
            "images_seen": finished["distill"]["images_seen"],
            "unlabelled": finished["distill"]["unlabelled"],
            "evaluated": scores["images"],
            "skipped": this.data.skipped,
        },
    }


def _text_metrics(
    config: Config, folder: RunFolder, finished: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """As `_metrics`, for translation; BLEU and chrF in points."""
    scores = finished["evaluate"]
    return {
        "task": config.task.name,
        "teacher": {"name": config.teacher.name, **scores["teacher"]},
        "student": {**scores["student"], "agreement": scores["agreement"]},
        **_common_metrics(config, folder, finished, text_pipeline.PARITY),
        "data": {
            "sentences_seen": finished["distill"]["sentences_seen"],
            "unlabelled": finished["distill"]["unlabelled"],
            "evaluated": scores["sentences"],
            "dropped": finished["data"]["dropped"],
            "skipped": [],
        },
    }


def _mixed(config: Config, converted: dict[str, Any]) -> dict[str, Any]:
    """What a budget chose; nothing where widths are uniform."""
    if config.quant.budget is None:
        return {}
    budget = {"budget": config.quant.budget, "budget_of": config.quant.budget_of}
    return budget | converted["mixed"]


def _common_metrics(
    config: Config, folder: RunFolder, finished: dict[str, dict[str, Any]], parity: Sequence[str]
) -> dict[str, Any]:
    seconds = folder.seconds()
    return {
        "quant": {
            "method": config.quant.method,
            "weight_bits": config.quant.weight_bits,
            "act_bits": config.quant.act_bits,
            "copies": config.quant.copies,
            **_mixed(config, finished["convert"]),
        },
        "hardware": config.hardware.name,
        "conversion": {
            "approximate_rules": finished["convert"]["approximate_rules"],
            "error": finished["convert"].get("error"),
        },
        "cost": {key: finished["cost"][key] for key in ("macs", "bops", "weight_bytes")},
        # A run that was audited by an older version knows nothing of the last.
        "audit": {
            **{key: finished["audit"][key] for key in ("pure", "violations")},
            "not_judged": finished["audit"].get("not_judged", {}),
        },
        "parity": {key: finished["parity"][key] for key in ("runtime", *parity)},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "device": device_name(config.trainer),
        "versions": {
            "archnet": archnet.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "seed": config.seed,
    }
