"""From sentences to sentences: one search for teachers, students and exported files."""

from archnet.translate.search import (
    BOS,
    EOS,
    SearchOptions,
    Translator,
    scores_along,
    search,
)
from archnet.translate.student import StudentTranslator
from archnet.translate.text import translate, translate_tokens

__all__ = [
    "BOS",
    "EOS",
    "SearchOptions",
    "StudentTranslator",
    "Translator",
    "scores_along",
    "search",
    "translate",
    "translate_tokens",
]
