"""From sentences to sentences: one search for teachers, students and exported files."""

from archnet.translate.sample import sampled
from archnet.translate.search import (
    BOS,
    EOS,
    Hypothesis,
    SearchOptions,
    Translator,
    hypotheses,
    search,
)
from archnet.translate.student import StudentTranslator
from archnet.translate.text import (
    hypotheses_of,
    scores_of,
    translate,
    translate_tokens,
    translations,
    unknown,
)

__all__ = [
    "BOS",
    "EOS",
    "Hypothesis",
    "SearchOptions",
    "StudentTranslator",
    "Translator",
    "hypotheses",
    "hypotheses_of",
    "sampled",
    "scores_of",
    "search",
    "translate",
    "translate_tokens",
    "translations",
    "unknown",
]
