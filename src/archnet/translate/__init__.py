"""From sentences to sentences: one search for teachers, students and exported files."""

from archnet.translate.search import (
    BOS,
    EOS,
    SearchOptions,
    Translator,
    search,
)
from archnet.translate.student import StudentTranslator
from archnet.translate.text import scores_of, translate, translate_tokens, unknown

__all__ = [
    "BOS",
    "EOS",
    "SearchOptions",
    "StudentTranslator",
    "Translator",
    "scores_of",
    "search",
    "translate",
    "translate_tokens",
    "unknown",
]
