"""Runs the C header of a translator, compiled here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archnet.deploy.c_header import SentenceLayout, translator_to_c
from archnet.deploy.sentences import POSITION, Sentences, embedding_of
from archnet.deploy.writer import ExportError
from archnet.errors import printable
from archnet.ops import Stepwise

FLAGS = ("-std=c99", "-O3", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
# Functions that a header has are known in its own file alone.
_SHOWN = """
#include "student.h"
void encode(const int32_t *tokens, size_t length, uint8_t *memory)
{
    archnet_encode(tokens, length, memory);
}
void decode(
    int32_t token, size_t position, const uint8_t *memory, uint8_t *states, int32_t *scores)
{
    archnet_decode(token, position, memory, states, scores);
}
"""
MEMORY, STATES = "memory", "states"


def c_compiler() -> str | None:
    """The C compiler of this computer; None where it has none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


class CTranslator:
    """Runs a student's C header; `archnet.translate.Translator`.

    Args:
        parts: of a quantized student without attention.
        unit: (V,) value of one unit of each score, as the golden model has it.

    Raises:
        ExportError: there is no C compiler, it refuses the header, or the student has no C form.
    """

    def __init__(self, parts: Stepwise, unit: Any) -> None:
        compiler = c_compiler()
        if compiler is None:
            raise ExportError(f"no C compiler is installed: one of {', '.join(COMPILERS)}")
        text, self.unit = translator_to_c(parts), unit
        layout = SentenceLayout.of(Sentences.of(parts, "arch5", weights=False))
        self._sizes = {
            MEMORY: SentenceLayout.size(layout.memory),
            STATES: SentenceLayout.size(layout.states),
        }
        self._tokens = embedding_of(parts.encoder).tokens
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "student.h").write_text(text, encoding="utf-8")
            (place / "shown.c").write_text(_SHOWN, encoding="utf-8")
            command = [compiler, *FLAGS, "-o", str(place / "student.so"), str(place / "shown.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
                raise ExportError(f"{compiler} refuses the C header: {printable(reason, 300)}")
            self._library = ctypes.CDLL(str(place / "student.so"))

    def start(self, source_BS: Tensor) -> dict[str, Tensor]:
        tokens = np.ascontiguousarray(source_BS.cpu().numpy(), np.int32)
        memory = np.zeros((len(tokens), self._sizes[MEMORY]), np.uint8)
        for row, into in zip(tokens, memory, strict=True):
            self._library.encode(_at(row), ctypes.c_size_t(len(row)), _at(into))
        return {
            MEMORY: torch.from_numpy(memory),
            STATES: torch.zeros(len(tokens), self._sizes[STATES], dtype=torch.uint8),
            POSITION: torch.zeros(len(tokens), 1, dtype=torch.long),
        }

    def integers(
        self, tokens_B: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The accumulators (B, V) of the scores, and the next state."""
        memory, states = state[MEMORY].numpy(), state[STATES].numpy().copy()
        sums = np.zeros((len(tokens_B), self._tokens), np.int32)
        for row, token in enumerate(tokens_B.tolist()):
            self._library.decode(
                ctypes.c_int32(token),
                ctypes.c_size_t(int(state[POSITION][row])),
                _at(memory[row]),
                _at(states[row]),
                _at(sums[row]),
            )
        after = {STATES: torch.from_numpy(states), POSITION: state[POSITION] + 1}
        return sums, {**state, **after}

    def step(self, tokens_B: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        sums, after = self.integers(tokens_B, state)
        return torch.from_numpy((sums * self.unit).astype(np.float32)), after


def _at(row: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(row.ctypes.data)
