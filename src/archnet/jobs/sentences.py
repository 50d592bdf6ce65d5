"""Every form of a translator against its golden integer model, sentence by sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archnet.convert import stepwise
from archnet.deploy import Check, ExportError, OnnxTranslator, export_translator
from archnet.deploy.c_header import SentenceLayout
from archnet.deploy.c_translator import MEMORY, STATES, CTranslator, c_compiler
from archnet.deploy.integer import Kind
from archnet.deploy.sentences import GoldenTranslator, Sentences, widened
from archnet.deploy.translator import FORMS
from archnet.deploy.verify import Divergence, steps_off
from archnet.ops import Stepwise, Student
from archnet.ops.scores import changed
from archnet.translate import (
    BOS,
    EOS,
    SearchOptions,
    StudentTranslator,
    Translator,
    scores_of,
    translate_tokens,
)

RUNNABLE = ("qdq", "subbyte", "c")
BATCH = 64

# What a state or memory of a translator holds, in integers of the golden model, by its name.
Read = Callable[[str, Mapping[str, Tensor]], NDArray[Any]]


@dataclass(frozen=True)
class _Subject:
    name: str
    runtime: str
    network: Translator
    read: Read


def verify_sentences(
    student: Student,
    rows: Sequence[Sequence[int]],
    options: SearchOptions,
    forms: Sequence[str] | None = None,
    folder: Path | None = None,
    requantization: Kind = "multiplier",
) -> list[Check]:
    """Translate sentences by the golden model, in PyTorch, in ONNX Runtime and in compiled C.

    Besides their translations, scores along the golden model's translations are compared, number
    by number.

    Args:
        student: quantized, trained.
        rows: sentences as token numbers without marks.
        options: of the search, the same for all.
        forms: of `RUNNABLE`; None: all of these.
        folder: with the files that the run exported, also to be run; None: there are none.
        requantization: of the golden model, as the target has it.

    Raises:
        ExportError: an unknown form, or a student that is no integer model.
    """
    forms = RUNNABLE if forms is None else forms
    for form in forms:
        if form not in RUNNABLE:
            what = "is not run here" if form in FORMS else "is no form of a translator"
            raise ExportError(f"form={form} {what}; these are: {', '.join(RUNNABLE)}")
    parts = stepwise(student.cpu().eval())
    sentences = Sentences.of(parts)
    golden = _Golden(GoldenTranslator(sentences, requantization), rows, options)
    found = [golden.check(_in_pytorch(parts, golden))]
    onnxruntime = f"onnxruntime {version('onnxruntime')}"
    if folder is not None:
        network, name = OnnxTranslator(folder), "student.*.onnx"
        if set(parts.memory) <= set(network.facts["zeros"]):
            found.append(golden.check(_in_file(name, onnxruntime, network)))
        else:
            why = "was written by an earlier version of archnet: archnet export writes it again"
            found.append(Check(name, onnxruntime, skipped=why))
    for form in forms:
        if form == "c":
            found.append(_in_c(parts, sentences, golden))
            continue
        with tempfile.TemporaryDirectory() as temporary:
            export_translator(parts, temporary, form)
            network = OnnxTranslator(temporary)
        found.append(golden.check(_in_file(form, onnxruntime, network)))
    if sentences.in_floats:
        hint = (
            f"{', '.join(sentences.in_floats)} are computed in floats, and a value between two "
            "levels is rounded to either (hardware=arch5 has integers alone)"
        )
        found = [check if check.bit_equal == 1 else replace(check, hint=hint) for check in found]
    return found


class _Golden:
    """The golden model's translations, and what is compared with them."""

    def __init__(
        self, model: GoldenTranslator, rows: Sequence[Sequence[int]], options: SearchOptions
    ) -> None:
        self.model, self.rows, self.options = model, rows, options
        self.words = translate_tokens(model, rows, options, batch=BATCH)

    def check(self, subject: _Subject) -> Check:
        words = translate_tokens(subject.network, self.rows, self.options, batch=BATCH)
        others = sum(a != b for a, b in zip(self.words, words, strict=True))
        most, equal, count, wrong, tokens = 0.0, 0, 0, 0, 0
        along = (scores_of(net, self.rows, self.words) for net in (self.model, subject.network))
        for both in zip(*along, strict=True):
            expected, found = (scores.numpy().astype(np.float64) for scores in both)
            off = steps_off(found / self.model.unit, np.rint(expected / self.model.unit))
            most = max(most, float(off.max()))
            equal += int((off == 0).sum())
            count += off.size
            wrong += int(changed(expected, found, -1).sum())
            tokens += len(found)
        return Check(
            subject.name,
            subject.runtime,
            len(self.rows),
            most,
            equal / max(count, 1),
            wrong,
            tokens,
            self._first(subject) if equal < count or others else None,
            sentences_changed=others,
        )

    def _first(self, subject: _Subject) -> Divergence | None:
        """The first value between the calls that differs, on the first sentence where one does."""
        sentences, decoder = self.model.sentences, self.model.decoder
        origins = {
            step.name: step.origin
            for model in (self.model.encoder, decoder)
            for step in model.steps
        }
        joined = {**sentences.parts.states, **{name: name for name in sentences.parts.memory}}
        for row, words in zip(self.rows, self.words, strict=True):
            if not row:
                continue
            source = torch.tensor([[*row, EOS]])
            ours, theirs = self.model.start(source), subject.network.start(source)
            names = list(sentences.parts.memory)
            for token in (None, BOS, *words):
                if token is not None:
                    tokens = torch.tensor([token])
                    expected, ours = self.model.step(tokens, ours)
                    scores, theirs = subject.network.step(tokens, theirs)
                    names = list(sentences.states)
                for name in names:
                    off = steps_off(subject.read(name, theirs), ours[name].numpy())
                    if off.any():
                        origin = origins.get(joined[name], "")
                        return _divergence(name, origin, off)
                if token is not None:
                    unit = self.model.unit
                    off = steps_off(scores.numpy() / unit, np.rint(expected.numpy() / unit))
                    if off.any():
                        return _divergence(sentences.scores, origins[sentences.scores], off)
        return None


def _divergence(name: str, origin: str, off: NDArray[np.float64]) -> Divergence:
    return Divergence(name, origin, int((off > 0).sum()), off.size, float(off.max()))


def _in_pytorch(parts: Stepwise, golden: _Golden) -> _Subject:
    grids, columns = golden.model.decoder.grids, golden.model.sentences.columns

    def read(name: str, state: Mapping[str, Tensor]) -> NDArray[Any]:
        values = state[name].numpy() / grids[name].scale
        return widened(values, columns) if name in parts.memory else values

    network = cast(Translator, StudentTranslator(parts))
    return _Subject("pytorch float32", f"torch {version('torch')}", network, read)


def _in_file(name: str, runtime: str, network: OnnxTranslator) -> _Subject:
    def read(name: str, state: Mapping[str, Tensor]) -> NDArray[Any]:
        return state[name].numpy().astype(np.int64) - network.facts["zeros"][name]

    return _Subject(name, runtime, cast(Translator, network), read)


def _in_c(parts: Stepwise, sentences: Sentences, golden: _Golden) -> Check:
    if sentences.in_floats:
        what = ", ".join(sentences.in_floats)
        reason = f"has integers alone, and {what} of this student are computed in floats"
        return Check("c", "c", skipped=reason)
    compiler = c_compiler()
    if compiler is None:
        return Check("c", "c", skipped="needs a C compiler (cc, gcc or clang)")
    layout = SentenceLayout.of(sentences)
    shapes, grids = sentences.decoder.student.graph.shapes, golden.model.decoder.grids

    def read(name: str, state: Mapping[str, Tensor]) -> NDArray[Any]:
        block = MEMORY if name in layout.memory else STATES
        first, size = (layout.memory if block == MEMORY else layout.states)[name]
        values = state[block].numpy()[:, first : first + size]
        signed = values.view(np.int8) if grids[name].low < 0 else values
        return signed.astype(np.int64).reshape(len(values), *shapes[name])

    network = cast(Translator, CTranslator(parts, golden.model.unit))
    return golden.check(_Subject("c", Path(compiler).name, network, read))
