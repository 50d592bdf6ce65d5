"""From sentences to sentences: one search for teachers, students and exported files."""

from archnet.translate.search import SearchOptions, Translator, search
from archnet.translate.student import StudentTranslator
from archnet.translate.text import translate, translate_tokens

__all__ = [
    "SearchOptions",
    "StudentTranslator",
    "Translator",
    "search",
    "translate",
    "translate_tokens",
]
