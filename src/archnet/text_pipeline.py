"""The conductor's part for translation: from a config to a run folder with a checked translator.

text -> teacher -> its translations of the training sources -> student (converted, norms fitted,
quantized, calibrated) -> distilled -> evaluated -> exported -> audited -> compared with a runtime.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from rich.progress import Progress
from torch import nn

import archnet
from archnet.capture.compare import difference
from archnet.config import Config
from archnet.convert import convert_translator, fit_norms, stepwise
from archnet.deploy import OnnxTranslator, export_translator
from archnet.distill import distill_text
from archnet.hardware import teacher_cost
from archnet.lower import deployed_cost
from archnet.ops import Student, TokenEmbedding
from archnet.ops.scores import changed
from archnet.progress import Lines, in_terminal
from archnet.quant import Quantizer
from archnet.run_device import device_of, set_up
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
from archnet.runs import RunFolder, atomic
from archnet.tasks import EncodedText, Subwords, Tokenizer, TranslationData, scores
from archnet.teachers import (
    MarianTokens,
    TappedTeacher,
    load_marian,
    load_translator,
)
from archnet.translate import (
    SearchOptions,
    StudentTranslator,
    Translator,
    scores_of,
    translate,
)
from archnet.translate import translate_tokens as search_tokens

_log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # folder in a run folder
PARITY_SENTENCES = 200  # that the exported files translate beside the student
# What is kept of that.
PARITY = ("max_abs_diff", "mismatches", "sentences", "tokens_changed", "tokens")
BATCH = 64  # sentences that are translated together
LOOKED_AT = 50  # validation sentences that a teacher is tried on before it is converted
# Fewer pairs a subword leave many that hardly occur; more weights a pair are learned by heart.
PAIRS_A_SUBWORD, WEIGHTS_A_PAIR = 4, 100
SMALL_CORPUS = 10_000  # pairs from which transformer_small learns more than transformer_tiny
EXAMPLE = 16  # tokens of the sentence that costs are given for


@dataclass
class TextRun:
    """What every stage works on."""

    config: Config
    folder: RunFolder
    data: TranslationData
    teacher: nn.Module

    @property
    def search(self) -> SearchOptions:
        return search_options(self.config)

    @property
    def device(self) -> torch.device:
        """Where translating runs."""
        return device_of(self.config.trainer)


def search_options(config: Config) -> SearchOptions:
    """How a run's networks search."""
    text = config.task.text
    return SearchOptions(text.beam, text.length_penalty, text.max_tokens + 1)


def open_run(config: Config, folder: RunFolder) -> TextRun:
    """The text and the trained teacher of a run, made or found."""
    set_up(config.trainer)
    published = None
    if config.teacher.source == "marian":
        published, tokens = load_marian(config.teacher.name, config.task.text.max_tokens + 1)
        data = TranslationData(config.task, config.seed, tokens)
    else:
        data = TranslationData(config.task, config.seed)
        if config.teacher.train and not (folder.path / TOKENIZER).is_dir():
            _compare_sizes(config, data)
    data.setup()
    if not (folder.path / TOKENIZER).is_dir():
        data.tokenizer.save(folder.path / TOKENIZER)
    lightning.seed_everything(config.seed, verbose=False)
    return TextRun(config, folder, data, published or _teacher(config, folder, data))


def _compare_sizes(config: Config, data: TranslationData) -> None:
    """Warn where a corpus is small for the vocabulary and the teacher that are to be learned."""
    pairs, size, teacher = data.text.size("train"), config.task.text.vocabulary, config.teacher
    fitting = max(pairs // PAIRS_A_SUBWORD // 1000 * 1000, 500)
    with torch.device("meta"):
        model = load_translator(
            replace(teacher, weights=None), vocabulary=min(size, fitting), positions=2
        )
    weights = sum(parameter.numel() for parameter in model.parameters())
    advice = []
    if weights > WEIGHTS_A_PAIR * pairs:
        smaller = "transformer_small" if pairs >= SMALL_CORPUS else "transformer_tiny"
        advice += [f"teacher={smaller}"] if smaller != teacher.name else []
    if size > max(pairs // PAIRS_A_SUBWORD, 500):
        advice.append(f"task.text.vocabulary={fitting}")
    if advice:
        _log.warning(
            "%s training pairs are few for teacher=%s and task.text.vocabulary=%s: it would learn "
            "them by heart, and take long. Of a size that suits them: %s",
            f"{pairs:,}",
            teacher.name,
            size,
            " ".join(advice),
        )


def look(this: TextRun) -> dict[str, Any]:
    """Measure the teacher on a few validation sentences and say so; warn where it only guesses.

    Given the reference up to a token, it is asked for that token: one pass, where a translation
    would take minutes.

    Returns:
        ``tokens_right`` in points, and how many ``tokens`` of how many ``sentences``.
    """
    batch = next(iter(this.data.valid_batches()))
    source, target_in, target_out, pad, real = (
        part[:LOOKED_AT]
        for part in (
            batch.source,
            batch.target_in,
            batch.target_out,
            batch.source_pad,
            batch.real,
        )
    )
    with torch.inference_mode():
        guesses = this.teacher.eval()(source, target_in, pad)[real].argmax(1)
    words = target_out[real]
    right = float((guesses == words).double().mean())
    # What always saying the most frequent token would reach.
    chance = float(torch.bincount(words).max()) / len(words)
    _log.info(
        "teacher: %.2f %% of the tokens of %d validation sentences are foreseen", 100 * right,
        len(source),
    )  # fmt: skip
    if right <= chance + 3 * (chance * (1 - chance) / len(words)) ** 0.5:
        text = this.config.task.text
        _log.warning(
            "teacher %s foresees %.2f %% of the tokens, hardly more than one frequent token alone "
            "(%.2f %%): it was trained for other languages than task.text.source=%s and "
            "task.text.target=%s, with another tokenizer, or not at all",
            this.config.teacher.name, 100 * right, 100 * chance, text.source, text.target,
        )  # fmt: skip
    return {
        "tokens_right": round(100 * right, 4),
        "tokens": len(words),
        "sentences": len(source),
    }


def _teacher(config: Config, folder: RunFolder, data: TranslationData) -> nn.Module:
    sizes = {
        "vocabulary": len(data.tokenizer),
        "positions": config.task.text.max_tokens + 1,
    }
    return run_teacher(config, folder, data, lambda source: load_translator(source, **sizes))


def tokenizer_of(folder: RunFolder) -> Subwords:
    """The tokenizer that a run was made with."""
    kept = folder.path / TOKENIZER
    if folder.config().teacher.source == "marian":
        return MarianTokens(kept)
    return Tokenizer(kept / "tokenizer.model")


def teacher_of(folder: RunFolder, vocabulary: int) -> Translator:
    """The teacher of a run, without its text."""
    config = folder.config()
    positions = config.task.text.max_tokens + 1
    if config.teacher.source == "marian":
        return cast(Translator, load_marian(config.teacher.name, positions)[0])
    kept = folder.checkpoints / "teacher.pt"
    teacher = config.teacher
    if kept.is_file():
        teacher = replace(teacher, weights=str(kept))
    return cast(Translator, load_translator(teacher, vocabulary=vocabulary, positions=positions))


def vocabulary_of(student: Student) -> int:
    """Tokens that a student knows."""
    return next(m.tokens for m in student.operators.values() if isinstance(m, TokenEmbedding))


def stages(
    config: Config,
    folder: RunFolder,
    distil: Callable[[TextRun, Student], dict[str, Any]],
) -> dict[str, Any]:
    """Run what is not finished; returns the figures of every stage."""
    this = open_run(config, folder)
    finished: dict[str, Any] = {}

    def write_down() -> dict[str, Any]:
        text = teacher_text(this)
        return {"sentences": len(text), "dropped": text.dropped}

    def prepare() -> dict[str, Any]:
        student, facts = _convert(this)
        save_student(folder, "calibrated", student)
        write_tables(folder, student)
        inexact = sorted({row.rule for row in student.report if not row.exact})
        taps = [tap.path for tap in student.taps]
        return {"taps": taps, "approximate_rules": inexact, **facts}

    def train() -> dict[str, Any]:
        student = load_student(folder, "calibrated")
        result = distil(this, student)
        return {**result, **settle_student(folder, student)}

    finished["look"] = folder.stage("look", lambda: look(this))
    finished["translations"] = folder.stage("translations", write_down, needs=("dropped",))
    finished["convert"] = folder.stage(
        "convert", prepare, needs=("mixed",), intact=lambda _: require_converted(folder)
    )
    finished["distill"] = folder.stage(
        "distill",
        train,
        needs=("sentences_seen", "unlabelled"),
        intact=lambda _: require_trained(folder),
    )
    student = load_student(folder)
    finished["evaluate"] = folder.stage(
        "evaluate",
        lambda: evaluate(this, student),
        needs=("teacher", "student", "agreement", "sentences"),
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
    finished["data"] = {"dropped": this.data.train.dropped}
    return finished


def teacher_text(this: TextRun) -> EncodedText:
    """The training sources with the teacher's translations; cached by teacher and search."""
    digest = hashlib.sha256()
    for name, tensor in sorted(this.teacher.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    settings = (this.search, this.config.task.data.unlabelled, this.config.task.text.max_tokens)
    digest.update(repr(settings).encode())
    model = cast(Translator, this.teacher.to(this.device))

    shown = this.config.trainer.progress
    total = min(this.config.task.data.unlabelled or len(this.data.train), len(this.data.train))
    with Progress(disable=not (shown and in_terminal()), transient=True) as bar:
        row = bar.add_task("teacher translates", total=total)
        lines = Lines("teacher", "sentence", total, this.config.trainer.progress_seconds)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.advance(row, count)
            if shown and not in_terminal() and lines.due():
                lines.tell(done)

        def translated(rows: list[list[int]]) -> list[list[int]]:
            found = search_tokens(
                model,
                rows,
                this.search,
                batch=4 * BATCH,
                device=this.device,
                progress=advance,
            )
            return found

        text = this.data.translated(digest.hexdigest()[:12], translated)
    this.teacher.cpu()
    return text


def _convert(this: TextRun) -> tuple[Student, dict[str, Any]]:
    """The student: converted, norms fitted, quantized and calibrated on unlabelled text.

    Returns:
        The student, how much of each norm is unexplained, and what `run_quant` says of widths.
    """
    config, quant = this.config, this.config.quant
    text = teacher_text(this)
    batches = [
        (batch.source, batch.target_in, batch.source_pad)
        for batch in this.data.calibration_batches(text, quant.calibration_batches)
    ]
    unexplained: dict[str, float] = {}
    learned: dict[str, Quantizer] = {}
    if config.convert.student is not None:
        student, learned = given_student(config)
    else:
        student, norms = convert_translator(this.teacher, config.hardware, seed=config.seed)
        fitting = [
            (batch.source, batch.target_in, batch.source_pad)
            for batch in this.data.step_batches(text, 2 * quant.calibration_batches)
        ]
        tapped = TappedTeacher(this.teacher, [norm.path for norm in norms])
        unexplained = fit_norms(student, norms, lambda *inputs: tapped(*inputs)[0], fitting)
        with torch.no_grad():
            ours, theirs = student(*fitting[0]), tapped(*fitting[0])[1]
        is_token = fitting[0][1] != 0
        student.graph.error = difference(ours[is_token], theirs[is_token])
    widths = run_quant(config, student, batches, learned)
    facts: dict[str, Any] = {"norms_unexplained": unexplained, "mixed": widths}
    # A student that was trained before is no longer what conversion made.
    return student, facts if config.convert.student else {**facts, "error": student.graph.error}


def distil(this: TextRun, student: Student, loggers: Any) -> dict[str, Any]:
    """Train the student in place."""
    config = this.config
    lightning.seed_everything(config.seed, verbose=False)
    return distill_text(
        TappedTeacher(this.teacher, [tap.path for tap in student.taps]),
        student,
        this.data,
        teacher_text(this),
        config.distill,
        trainer=config.trainer,
        folder=this.folder.checkpoints,
        loggers=loggers,
    )


def evaluate(this: TextRun, student: Student) -> dict[str, Any]:
    """Teacher and student on the same test sentences.

    Returns:
        ``teacher`` and ``student`` with BLEU, chrF, the signature and sentences a second,
        ``agreement`` (identical translations, in points), and the number of ``sentences``.
    """
    sources, references = this.data.test_pairs(this.config.trainer.limit_eval)
    student = student.to(this.device).eval()
    networks: dict[str, Translator] = {
        "teacher": cast(Translator, this.teacher.to(this.device).eval()),
        "student": StudentTranslator(stepwise(student)),
    }
    found: dict[str, Any] = {}
    translations = {}
    for name, network in networks.items():
        began = time.monotonic()
        translations[name] = translate(
            network, this.data.tokenizer, sources, this.search, batch=BATCH, device=this.device
        )
        speed = len(sources) / (time.monotonic() - began)
        found[name] = scores(translations[name], references) | {"per_second": round(speed, 2)}
        with atomic(this.folder.path / f"test.{name}.txt") as temporary:
            temporary.write_text("\n".join(translations[name]) + "\n", encoding="utf-8")
    this.teacher.cpu()
    student.cpu()
    same = [a == b for a, b in zip(translations["teacher"], translations["student"], strict=True)]
    found["agreement"] = round(100 * sum(same) / len(same), 2)
    found["sentences"] = len(sources)
    return found


def form(config: Config) -> str:
    """The form in which a run's student is deployed."""
    return "float" if config.quant.method == "none" else "qdq"


def files(folder: RunFolder) -> list[Path]:
    """The exported files of a run."""
    return [folder.path / f"student.{part}.onnx" for part in ("encoder", "decoder")]


def _export(this: TextRun, student: Student) -> dict[str, Any]:
    written = export_translator(stepwise(student), this.folder.path, form(this.config))
    size = sum(path.stat().st_size for path in written)
    return {"bytes": size, "files": this.folder.fingerprints(written)}


def _audit(this: TextRun) -> dict[str, Any]:
    audits = [archnet.audit(path, hardware=this.config.hardware) for path in files(this.folder)]
    lines = [str(line) for audit in audits for line in audit.violations]
    not_judged: Counter[str] = Counter()
    for audit in audits:
        not_judged.update(audit.summary()["not_judged"])
    return {
        "pure": all(audit.pure for audit in audits),
        "violations": lines,
        "not_judged": dict(not_judged),
    }


def _parity(this: TextRun, student: Student) -> dict[str, Any]:
    """The files' translations beside the student's, and both's scores along the student's.

    A sentence changes with one token, and where attention stays in float a value between two
    levels is rounded to either: tokens tell how much of that there is.
    """
    import onnxruntime

    sources, _ = this.data.test_pairs(PARITY_SENTENCES)
    rows = [row[: this.search.longest - 1] for row in this.data.tokenizer.encode(sources)]
    here, there = StudentTranslator(stepwise(student)), OnnxTranslator(this.folder.path)
    words, others = (search_tokens(n, rows, this.search, batch=BATCH) for n in (here, there))
    difference, tokens, tokens_changed = 0.0, 0, 0
    along = (scores_of(network, rows, words) for network in (here, there))
    for both in zip(*along, strict=True):
        expected, found = (scores.numpy() for scores in both)
        difference = float(np.maximum(difference, np.abs(expected - found).max()))
        tokens, tokens_changed = (
            tokens + len(found),
            tokens_changed + int(changed(expected, found, -1).sum()),
        )
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "max_abs_diff": difference,
        "mismatches": sum(a != b for a, b in zip(words, others, strict=True)),
        "sentences": len(sources),
        "tokens_changed": tokens_changed,
        "tokens": tokens,
    }


def _cost(this: TextRun, student: Student) -> dict[str, Any]:
    """Of reading and writing `EXAMPLE` tokens; the teacher as it is, in float.

    The student's embeddings count as the layers on one-hots that they are, the teacher's, which
    are look-ups, as nothing.
    """
    tokens = torch.full((1, EXAMPLE), 5)
    before, after = teacher_cost(this.teacher, (tokens, tokens)), deployed_cost(student)
    return {
        "macs": {"teacher": before.macs, "student": after.macs},
        "bops": {
            "teacher": before.bops,
            "teacher_w8a8": before.macs * 8 * 8,
            "student": after.bops,
        },
        "weight_bytes": {"teacher": before.weight_bytes, "student": after.weight_bytes},
    }
