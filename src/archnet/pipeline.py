"""The one conductor: from a config to a run folder with a checked student in it.

data -> teacher -> student (converted, quantized, calibrated) -> distilled -> evaluated ->
exported -> audited -> compared with a runtime -> metrics.json, report.html and a table.
A finished stage leaves a file in the run folder (`archnet.runs`); a resumed run skips it.
"""

import errno
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

import archnet
from archnet import report, text_pipeline
from archnet.capture import capture
from archnet.config import Config, LoggerConfig
from archnet.convert import Approximation
from archnet.deploy import lower
from archnet.distill import distill
from archnet.errors import ArchnetError
from archnet.hardware import student_cost, teacher_cost
from archnet.ops import Student
from archnet.quant import FLOAT, Quantizer
from archnet.run_device import device_name, device_of, require_device, set_up
from archnet.run_quant import run_quant
from archnet.run_student import given_student, load_student, save_student, settle_student
from archnet.run_teacher import run_teacher
from archnet.runs import RunError, RunFolder, read_json, write_json
from archnet.tasks import ClassificationData, TranslationData
from archnet.teachers import load_teacher

_log = logging.getLogger(__name__)

# Inputs on which the exported file is compared with the student.
PARITY_INPUTS = 500
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
        folder = RunFolder.open(config.resume)
        config = folder.resumed(config, overridden)
        require_device(config.trainer)
        folder.write_config(config)
    else:
        require_device(config.trainer)
        if config.task.kind == "translation":
            TranslationData(config.task, config.seed).text.check()
        folder = RunFolder.create(config)
    _log.info("run folder: %s", folder.path)
    try:
        metrics = _stages(config, folder)
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns the first Ctrl-C into an exit of its own.
        print(f"\nStopped. Continue: python train.py resume={folder.path}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunError(
            f"the disk is full; {folder.path} keeps all that was finished: "
            f"make room and continue with resume={folder.path}"
        ) from error
    report.show(metrics, folder.path)
    return folder


def join(path: Path) -> None:
    """Take part in the distillation of a run that another process leads (DDP)."""
    folder = RunFolder.open(path)
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
    return _open(folder.config(), folder), load_student(folder)


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
    this = text_pipeline.open_run(folder.config(), folder)
    return text_pipeline.evaluate(this, load_student(folder))


def evaluate(this: Run, student: Student) -> dict[str, Any]:
    """Teacher and student on the same test images.

    Returns:
        ``teacher`` and ``student`` accuracy and their ``agreement``, in points (0 to 100), and
        the number of ``images``.
    """
    networks = this.teacher.to(this.device).eval(), student.to(this.device).eval()
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
    for net in networks:
        net.cpu()
    limit = this.config.trainer.limit_eval
    (teacher_N, student_N), label_N = torch.cat(guesses, 1)[:, :limit], torch.cat(labels)[:limit]
    return {
        "teacher": _points(teacher_N == label_N),
        "student": _points(student_N == label_N),
        "agreement": _points(teacher_N == student_N),
        "images": len(label_N),
    }


def form(config: Config) -> str:
    """The form in which a run's student is deployed."""
    return "float" if config.quant.method == "none" else "qcdq"


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

    def prepare() -> dict[str, Any]:
        student, widths = _convert(this)
        save_student(folder, "calibrated", student)
        rows = [asdict(row) for row in student.report]
        write_json(folder.path / "conversion.json", rows)
        if student.graph.refinements:
            write_json(folder.path / "forms.json", list(map(asdict, student.graph.refinements)))
        inexact = sorted({row["rule"] for row in rows if not row["exact"]})
        taps = [tap.path for tap in student.taps]
        return {"taps": taps, "approximate_rules": inexact, "mixed": widths}

    def train() -> dict[str, Any]:
        student = load_student(folder, "calibrated")
        result = _distil(this, student)
        return {**result, **settle_student(folder, student)}

    finished["convert"] = folder.stage("convert", prepare)
    finished["distill"] = folder.stage("distill", train)
    student = load_student(folder)
    finished["evaluate"] = folder.stage("evaluate", lambda: evaluate(this, student))
    finished["export"] = folder.stage("export", lambda: _export(this, student))
    finished["audit"] = folder.stage("audit", lambda: _audit(this))
    finished["parity"] = folder.stage("parity", lambda: _parity(this, student))
    finished["cost"] = folder.stage("cost", lambda: _cost(this, student))
    return _write_metrics(folder, _metrics(this, finished))


def _write_metrics(folder: RunFolder, metrics: dict[str, Any]) -> dict[str, Any]:
    if folder.metrics.is_file():
        # What `archnet verify` found of this student stays when a finished run is opened again.
        metrics |= {k: v for k, v in read_json(folder.metrics).items() if k == "verify"}
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
    task = {
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": data.image_size,
    }
    return run_teacher(config, folder, data, lambda source: load_teacher(source, **task))


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
        lower(student, cast(Any, target.requantization), target.accumulator_bits)


def _distil(this: Run, student: Student) -> dict[str, Any]:
    """Train the student in place; with several processes, this one starts the others."""
    config = this.config
    lightning.seed_everything(config.seed, verbose=False)
    loggers = _loggers(config.logger, this.folder)
    # The captured teacher gives its features at the taps, by the nodes that conversion named.
    graph = capture(this.teacher, this.data.calibration_batches(1)[0][:1])
    features = graph.features([tap.node for tap in student.taps])
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
    os.environ["ARCHNET_RUN_FOLDER"] = str(folder.path.resolve())
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
    return {"bytes": this.folder.onnx.stat().st_size}


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
    before, after = teacher_cost(this.teacher, example), student_cost(student)
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
        **_common_metrics(config, this.folder, finished, ("max_abs_diff", "mismatches")),
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
    keys = ("max_abs_diff", "mismatches", "sentences", "tokens_changed", "tokens")
    return {
        "task": config.task.name,
        "teacher": {"name": config.teacher.name, **scores["teacher"]},
        "student": {**scores["student"], "agreement": scores["agreement"]},
        **_common_metrics(config, folder, finished, keys),
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
