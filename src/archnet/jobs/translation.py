"""Sentences of one language to another, judged by BLEU and chrF.

The teacher's own translations of the training sources are what is distilled: no reference is read.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from rich.progress import Progress
from torch import Tensor, nn

from archnet.capture.compare import difference
from archnet.config import Config, ConvertConfig, DistillConfig, TeacherConfig
from archnet.convert import convert_translator, fit_norms, stepwise
from archnet.deploy import Check, OnnxTranslator, export_translator
from archnet.deploy.sentences import Sentences, columns_of, sentence_cost
from archnet.distill import distill_text
from archnet.errors import ArchnetError
from archnet.intervals import wilson
from archnet.jobs.job import Facts, Inputs, Job
from archnet.jobs.on_policy import OwnTranslations
from archnet.jobs.sentences import verify_sentences
from archnet.lower import SampleCost
from archnet.ops import Student, TokenEmbedding
from archnet.ops.scores import changed, decisions, unexplained
from archnet.progress import Lines, in_terminal
from archnet.quant import FLOAT
from archnet.runs import atomic
from archnet.runs.device import set_up
from archnet.runs.student import load_student
from archnet.runs.teacher import run_teacher
from archnet.tasks import EncodedText, Subwords, Tokenizer, TranslationData, scores
from archnet.tasks.sentences import compared, paired
from archnet.teachers import (
    MarianTokens,
    TappedTeacher,
    load_marian,
    load_translator,
    require_marian,
)
from archnet.translate import (
    SearchOptions,
    StudentTranslator,
    Translator,
    hypotheses_of,
    scores_of,
    translate,
)
from archnet.translate import translate_tokens as search_tokens

_log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # folder in a run folder
PARITY_SENTENCES = 200  # that the exported files translate beside the student
BATCH = 64  # sentences that are translated together
LOOKED_AT = 50  # validation sentences that a teacher is tried on before it is converted
# Fewer pairs a subword leave many that hardly occur; more weights a pair are learned by heart.
PAIRS_A_SUBWORD, WEIGHTS_A_PAIR = 4, 100
SMALL_CORPUS = 10_000  # pairs from which transformer_small learns more than transformer_tiny
EXAMPLE = 16  # tokens of the sentence that costs are given for


class Translation(Job):
    """Token numbers of a sentence to scores of the next token, (B, T, K).

    Attributes:
        data: there after `open`, as ``teacher``.
    """

    unit, verified = "sentence", 200
    data: TranslationData

    @classmethod
    def completed(cls, config: Config) -> Config:
        if config.teacher.source == "marian":
            require_marian(config.teacher.name)
        return config

    def open(self) -> None:
        config, kept = self.config, self.folder.path / TOKENIZER
        set_up(config.trainer)
        published = None
        if config.teacher.source == "marian":
            published, tokens = load_marian(config.teacher.name, self._positions)
            self.data = TranslationData(config.task, config.seed, tokens)
        else:
            self.data = TranslationData(config.task, config.seed)
            if config.teacher.train and not kept.is_dir():
                compare_sizes(config, self.data)
        self.data.setup()
        if not kept.is_dir():
            self.data.tokenizer.save(kept)
        lightning.seed_everything(config.seed, verbose=False)
        self.teacher = published or run_teacher(config, self.folder, self.data, self._load)

    @property
    def _positions(self) -> int:
        return self.config.task.text.max_tokens + 1

    def _load(self, source: TeacherConfig) -> nn.Module:
        vocabulary = len(self.data.tokenizer)
        return load_translator(source, vocabulary=vocabulary, positions=self._positions)

    @property
    def search(self) -> SearchOptions:
        """How the run's networks search."""
        text = self.config.task.text
        return SearchOptions(text.beam, text.length_penalty, self._positions)

    def look(self) -> Facts:
        """Measure the teacher on a few validation sentences and say so; warn where it only guesses.

        Given the reference up to a token, it is asked for that token: one pass, where a translation
        would take minutes.

        Returns:
            ``tokens_right`` in points, and how many ``tokens`` of how many ``sentences``.
        """
        batch = next(iter(self.data.valid_batches()))
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
            guesses = decisions(self.teacher.eval()(source, target_in, pad)[real], -1)
        words = target_out[real]
        right = float((guesses == words).double().mean())
        # What always saying the most frequent token would reach.
        chance = float(torch.bincount(words).max()) / len(words)
        _log.info(
            "teacher: predicts %.2f %% of the tokens of %d validation sentences", 100 * right,
            len(source),
        )  # fmt: skip
        if right <= chance + 3 * (chance * (1 - chance) / len(words)) ** 0.5:
            text = self.config.task.text
            _log.warning(
                "teacher %s predicts %.2f %% of the tokens, hardly more than one frequent token "
                "alone (%.2f %%): it was trained for other languages than task.text.source=%s and "
                "task.text.target=%s, with another tokenizer, or not at all",
                self.config.teacher.name, 100 * right, 100 * chance, text.source, text.target,
            )  # fmt: skip
        return {
            "tokens_right": round(100 * right, 4),
            "tokens": len(words),
            "sentences": len(source),
        }

    def preparations(self) -> Mapping[str, Callable[[], Facts]]:
        def write_down() -> Facts:
            text = self.teacher_text()
            return {"sentences": len(text), "dropped": text.dropped}

        return {"translations": write_down}

    def teacher_text(self) -> EncodedText:
        """The training sources with the teacher's translations; cached by teacher and search."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        text = self.config.task.text
        settings: tuple[Any, ...] = (self.search, self.config.task.data.unlabelled, text.max_tokens)
        if text.translations > 1:
            settings += (text.translations,)
        digest.update(repr(settings).encode())
        model = cast(Translator, self.teacher.to(self.device))

        shown = self.config.trainer.progress
        total = min(self.config.task.data.unlabelled or len(self.data.train), len(self.data.train))
        with Progress(disable=not (shown and in_terminal()), transient=True) as bar:
            row = bar.add_task("teacher translates", total=total)
            lines = Lines("teacher", "sentence", total, self.config.trainer.progress_seconds)
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.advance(row, count)
                if shown and not in_terminal() and lines.due():
                    lines.tell(done)

            def translated(rows: list[list[int]]) -> list[list[list[int]]]:
                found = hypotheses_of(
                    model,
                    rows,
                    self.search,
                    batch=4 * BATCH,
                    device=self.device,
                    progress=advance,
                )
                return [[item.tokens for item in items[: text.translations]] for items in found]

            made = self.data.translated(digest.hexdigest()[:12], translated)
        self.teacher.cpu()
        return made

    def convert(self, asked: ConvertConfig) -> tuple[Student, Facts]:
        student, norms = convert_translator(
            self.teacher, self.config.hardware, seed=self.config.seed
        )
        warn_of_columns(student, self.config.task.text.max_tokens)
        batches = self.data.step_batches(
            self.teacher_text(), 2 * self.config.quant.calibration_batches
        )
        fitting = [(batch.source, batch.target_in, batch.source_pad) for batch in batches]
        tapped = TappedTeacher(self.teacher, [norm.path for norm in norms])
        unexplained = fit_norms(student, norms, lambda *inputs: tapped(*inputs)[0], fitting)
        with torch.no_grad():
            ours, theirs = student(*fitting[0]), tapped(*fitting[0])[1]
        is_token = fitting[0][1] != 0
        student.graph.error = difference(ours[is_token], theirs[is_token])
        return student, {"norms_unexplained": unexplained}

    def calibration(self, count: int) -> list[Inputs]:
        batches = self.data.calibration_batches(self.teacher_text(), count)
        return [(batch.source, batch.target_in, batch.source_pad) for batch in batches]

    def require_computable(self, student: Student) -> None:
        """Float parts are not looked at."""
        quant, target = self.config.quant, self.config.hardware
        widths = (quant.weight_bits, quant.act_bits, quant.first_bits, quant.last_bits)
        if quant.method != "none" and FLOAT not in widths:
            sentences = Sentences.of(stepwise(student))
            sentences.integers(cast(Any, target.requantization), target.accumulator_bits)

    def distil(
        self,
        student: Student,
        options: DistillConfig,
        folder: Path,
        loggers: Sequence[Logger] = (),
    ) -> Facts:
        text = self.teacher_text()
        facts = distill_text(
            TappedTeacher(self.teacher, [tap.path for tap in student.taps]),
            student,
            self.data,
            text,
            options,
            trainer=self.config.trainer,
            folder=folder,
            loggers=loggers,
            own=OwnTranslations(self.config.seed) if options.on_policy else None,
        )
        if self.config.task.text.translations > 1:
            facts["unlabelled"] = text.sources()
        return facts

    def validate(self, student: Student, count: int, *, drop: bool) -> Facts:
        """As `Job.validate`: agreement is that of next tokens after the reference so far, and a
        drop that of BLEU.
        """
        networks = [network.to(self.device).eval() for network in (self.teacher, student)]
        equal = tokens = sentences = 0
        with torch.inference_mode():
            for batch in self.data.valid_batches():
                real = batch.real
                given = (batch.source, batch.target_in, batch.source_pad)
                theirs, ours = (
                    decisions(network(*(x.to(self.device) for x in given)).cpu()[real], -1)
                    for network in networks
                )
                equal, tokens = equal + int((theirs == ours).sum()), tokens + len(ours)
                sentences += len(batch.source)
                if sentences >= count:
                    break
        if not tokens:
            raise ArchnetError("the valid split is empty: task.text.valid names its files")
        below = None
        if drop:
            sources, references = self.data.pairs("valid", count)
            network: Translator = StudentTranslator(stepwise(student))
            bleu = scores(self._translated(network, sources), references)["bleu"]
            below = round(self._teacher_bleu(count) - bleu, 4)
        self.teacher.cpu()
        student.cpu()
        share = equal / tokens
        return {
            "agreement": round(100 * share, 4),
            "agreement_error": round(100 * (share * (1 - share) / tokens) ** 0.5, 4),
            "drop": below,
            "drop_error": 0.0,
            "inputs": sentences,
        }

    def _translated(self, network: Translator, sources: list[str]) -> list[str]:
        return translate(
            network, self.data.tokenizer, sources, self.search, batch=BATCH, device=self.device
        )

    @cache  # noqa: B019  # a job lives as long as its run
    def _teacher_bleu(self, count: int) -> float:
        """Of its translations of the first validation sentences."""
        sources, references = self.data.pairs("valid", count)
        found = self._translated(cast(Translator, self.teacher), sources)
        return float(scores(found, references)["bleu"])

    def evaluate(self, student: Student) -> Facts:
        """Teacher and student on the same test sentences.

        Returns:
            ``teacher`` and ``student`` with BLEU, chrF, the signature and sentences a second,
            ``agreement`` (identical translations, in points), and the number of ``inputs``.
        """
        sources, references = self.data.pairs("test", self.config.trainer.limit_eval)
        student = student.to(self.device).eval()
        networks: dict[str, Translator] = {
            "teacher": cast(Translator, self.teacher.to(self.device).eval()),
            "student": StudentTranslator(stepwise(student)),
        }
        found: dict[str, Any] = {}
        translations = {}
        for name, network in networks.items():
            began = time.monotonic()
            translations[name] = self._translated(network, sources)
            speed = len(sources) / (time.monotonic() - began)
            found[name] = scores(translations[name], references) | {"per_second": round(speed, 2)}
            with atomic(self.folder.path / f"test.{name}.txt") as temporary:
                temporary.write_text("\n".join(translations[name]) + "\n", encoding="utf-8")
        self.teacher.cpu()
        student.cpu()
        pairs = zip(translations["teacher"], translations["student"], strict=True)
        same = [theirs == ours for theirs, ours in pairs]
        found["agreement"] = round(100 * sum(same) / len(same), 2)
        low, high = wilson(sum(same), len(same))
        found["agreement_interval"] = [round(100 * low, 4), round(100 * high, 4)]
        found["paired"] = paired(translations, references, found)
        found["inputs"] = len(sources)
        found["details"] = compared(sources, references, translations)
        return found

    def tap_errors(self, student: Student) -> dict[str, float]:
        source, target, pad = self.calibration(1)[0]
        taps = [tap.path for tap in student.taps]
        names = [*(tap.value for tap in student.taps), *student.graph.outputs]
        values = dict(zip(student.graph.inputs, (source, target, pad), strict=True))
        with torch.inference_mode():
            features, scores = TappedTeacher(self.teacher, taps)(source, target, pad)
            ours = student.eval().run(values, names)
        theirs = [*(features[path] for path in taps), scores]
        real = [~pad if path.startswith("encoder") else target != 0 for path in (*taps, "")]
        # Maps of attention have heads in front of positions.
        sides = zip(ours, theirs, real, strict=True)
        return {
            path: float(unexplained(found, expected, known if found.dim() == 3 else None))
            for path, (found, expected, known) in zip((*taps, ""), sides, strict=True)
        }

    def usage(self) -> str:
        return f"""\
# A line in, a line out; --runtime onnxruntime reads the exported files.
printf 'A sentence.\\n' | archnet translate {self.folder.path} --runtime onnxruntime
"""

    @property
    def files(self) -> list[Path]:
        return [self.folder.path / f"student.{part}.onnx" for part in ("encoder", "decoder")]

    def export(self, student: Student) -> list[Path]:
        return export_translator(stepwise(student), self.folder.path, self.form)

    def write(
        self,
        student: Student,
        output: Path | None,
        form: str,
        opset: int | None,
        length: int | None = None,
    ) -> list[Path]:
        if opset is not None:
            raise ArchnetError("opset= is for classifiers: a translator's files have their own")
        return export_translator(
            stepwise(student), output or self.folder.path / f"student_{form}", form, length
        )

    def parity(self, student: Student) -> Facts:
        """The files' translations beside the student's, and both's scores along the student's.

        A sentence changes with one token, and where attention stays in float a value between two
        levels is rounded to either: tokens tell how much of that there is.
        """
        import onnxruntime

        sources, _ = self.data.pairs("test", PARITY_SENTENCES)
        rows = [row[: self.search.longest - 1] for row in self.data.tokenizer.encode(sources)]
        here, there = StudentTranslator(stepwise(student)), OnnxTranslator(self.folder.path)
        words, others = (search_tokens(n, rows, self.search, batch=BATCH) for n in (here, there))
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

    def verify(
        self, student: Student, count: int | None, forms: Sequence[str] | None
    ) -> list[Check]:
        """Test sentences, translated by the golden model and by every form."""
        sources, _ = self.data.pairs("test", count or self.verified)
        rows = [row[: self.search.longest - 1] for row in self.data.tokenizer.encode(sources)]
        folder = self.folder.path if all(path.is_file() for path in self.files) else None
        kind = cast(Any, self.config.hardware.requantization)
        return verify_sentences(student, rows, self.search, forms, folder, kind)

    def example(self) -> tuple[Tensor, Tensor]:
        """Reading and writing `EXAMPLE` tokens.

        In what costs, the student's embeddings count as the layers on one-hots that they are, the
        teacher's, which are look-ups, as nothing.
        """
        tokens = torch.full((1, EXAMPLE), 5)
        return tokens, tokens

    def sample_cost(self, student: Student) -> SampleCost:
        return sentence_cost(stepwise(student), EXAMPLE, EXAMPLE)

    def data_facts(self) -> Facts:
        return {"dropped": self.data.train.dropped, "skipped": []}

    # For `archnet translate` ------------------------------------------------------------------

    def tokenizer(self) -> Subwords:
        """The tokenizer that the run was made with."""
        kept = self.folder.path / TOKENIZER
        if self.config.teacher.source == "marian":
            return MarianTokens(kept)
        return Tokenizer(kept / "tokenizer.model")

    def translator(
        self, network: str, runtime: str, vocabulary: int, threads: int = 0
    ) -> Translator:
        """One of the run's networks, without its text.

        Args:
            network: student or teacher.
            runtime: pytorch, or onnxruntime for the student's files.
            vocabulary: of the run's tokenizer.
            threads: of one operator of onnxruntime; 0: its choice.

        Raises:
            ArchnetError: the network has another vocabulary, or does not run there.
        """
        if network == "teacher":
            if runtime != "pytorch":
                raise ArchnetError("the teacher runs in pytorch: leave --runtime out")
            return self._teacher_alone(vocabulary)
        found: Translator
        if runtime == "onnxruntime":
            exported = OnnxTranslator(self.folder.path, threads)
            found, tokens = cast(Translator, exported), exported.facts["tokens"]
        else:
            student = load_student(self.folder)
            found, tokens = StudentTranslator(stepwise(student)), vocabulary_of(student)
        if tokens != vocabulary:
            raise ArchnetError(
                f"{self.folder.path / TOKENIZER} has {vocabulary} tokens and the student "
                f"{tokens}: they do not belong together; put the run's own tokenizer back"
            )
        return found

    def _teacher_alone(self, vocabulary: int) -> Translator:
        teacher = self.config.teacher
        if teacher.source == "marian":
            return cast(Translator, load_marian(teacher.name, self._positions)[0])
        kept = self.folder.checkpoints / "teacher.pt"
        if kept.is_file():
            teacher = replace(teacher, weights=str(kept))
        found = load_translator(teacher, vocabulary=vocabulary, positions=self._positions)
        return cast(Translator, found)


def compare_sizes(config: Config, data: TranslationData) -> None:
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
            "%s training pairs are few for teacher=%s and task.text.vocabulary=%s: it would "
            "overfit, and take long to train. Sizes that fit the data: %s",
            f"{pairs:,}",
            teacher.name,
            size,
            " ".join(advice),
        )


def warn_of_columns(student: Student, max_tokens: int) -> None:
    """Warn where a decoder without attention computes source positions that no sentence has."""
    columns = columns_of(student)
    if columns is not None and max_tokens + 1 < columns:
        _log.warning(
            "a decoder without attention computes a power of two of source positions at every "
            "token: task.text.max_tokens=%d and the end mark take %d, as %d would; %d take half",
            max_tokens, columns, columns - 1, columns // 2 - 1,
        )  # fmt: skip


def vocabulary_of(student: Student) -> int:
    """Tokens that a student knows."""
    return next(m.tokens for m in student.operators.values() if isinstance(m, TokenEmbedding))
