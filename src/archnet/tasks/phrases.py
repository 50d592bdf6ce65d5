"""Parallel phrases out of CLDR, the Unicode locale data inside `babel`: no download.

Dates, durations, quantities, numbers in words' company, names of countries and languages, each
written by the same template in both languages. Small and regular: it serves tests and a first
try, and says nothing of real text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from functools import cached_property

from babel import Locale, UnknownLocaleError, dates, numbers, units

from archnet.errors import TaskError

SIZES = {"train": 6000, "valid": 300, "test": 300}
UNITS = (
    "length-kilometer", "length-meter", "mass-kilogram", "mass-gram", "volume-liter",
    "duration-hour", "duration-minute", "duration-day", "temperature-celsius", "area-hectare",
)  # fmt: skip


class Phrases:
    """Phrases of two languages, drawn by seed; no phrase is in two splits.

    Args:
        languages: two of CLDR's, such as ("en", "de").
        seed: of the draw.

    Raises:
        TaskError: a language that CLDR does not know.
    """

    def __init__(self, languages: tuple[str, str], seed: int) -> None:
        self.languages, self.seed = languages, seed
        try:
            self.locales = [Locale.parse(language) for language in languages]
        except (UnknownLocaleError, ValueError) as error:
            raise TaskError(f"task.text: {error}; CLDR names languages as en, de, pt_BR") from error

    def check(self) -> None:
        """All splits are always there."""

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        return iter(self._drawn[split])

    def size(self, split: str) -> int:
        return SIZES[split]

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256()
        for pair in self._drawn[split]:
            digest.update("\t".join(pair).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _drawn(self) -> dict[str, list[tuple[str, str]]]:
        drawer = random.Random(self.seed)
        kinds: list[Callable[[random.Random], tuple[str, str]]] = [
            self._date, self._date, self._time, self._duration, self._quantity, self._quantity,
            self._number, self._country, self._language, self._joined,
        ]  # fmt: skip
        seen: dict[str, str] = {}
        # Country names run out; the draw does not depend on how often one comes again.
        while len(seen) < sum(SIZES.values()):
            source, target = drawer.choice(kinds)(drawer)
            seen.setdefault(source, target)
        pairs = list(seen.items())
        drawer.shuffle(pairs)
        splits, start = {}, 0
        for split, size in SIZES.items():
            splits[split] = pairs[start : start + size]
            start += size
        return splits

    def _both(self, write: Callable[[Locale], str]) -> tuple[str, str]:
        source, target = (write(locale).replace("\u202f", " ").replace("\xa0", " ")
                          for locale in self.locales)  # fmt: skip
        return source, target

    def _date(self, drawer: random.Random) -> tuple[str, str]:
        day = date(1950, 1, 1) + timedelta(days=drawer.randrange(40000))
        form = drawer.choice(("full", "long", "medium"))
        return self._both(lambda locale: dates.format_date(day, form, locale=locale))

    def _time(self, drawer: random.Random) -> tuple[str, str]:
        hour = time(drawer.randrange(24), drawer.randrange(60))
        return self._both(lambda locale: dates.format_time(hour, "short", locale=locale))

    def _duration(self, drawer: random.Random) -> tuple[str, str]:
        span = timedelta(seconds=drawer.choice((60, 3600, 86400, 604800)) * drawer.randrange(1, 30))
        ahead = drawer.random() < 0.5
        span = span if ahead else -span
        return self._both(
            lambda locale: dates.format_timedelta(span, add_direction=True, locale=locale)
        )

    def _quantity(self, drawer: random.Random) -> tuple[str, str]:
        unit, whole = drawer.choice(UNITS), drawer.randrange(1, 2000)
        amount = whole / 10 if drawer.random() < 0.3 else whole
        return self._both(lambda locale: units.format_unit(amount, unit, "long", locale=locale))

    def _number(self, drawer: random.Random) -> tuple[str, str]:
        amount = drawer.randrange(10 ** drawer.randrange(3, 8)) / 100
        currency = drawer.choice(("EUR", "USD", "CHF", "JPY", "GBP"))
        return self._both(
            lambda locale: numbers.format_currency(
                amount, currency, locale=locale, format_type="name"
            )
        )

    def _country(self, drawer: random.Random) -> tuple[str, str]:
        return self._both(self._territory(drawer))

    def _language(self, drawer: random.Random) -> tuple[str, str]:
        return self._both(self._tongue(drawer))

    def _joined(self, drawer: random.Random) -> tuple[str, str]:
        from babel.lists import format_list

        name = drawer.choice((self._territory, self._tongue))
        names = [name(drawer) for _ in range(drawer.randrange(2, 4))]
        return self._both(
            lambda locale: format_list([write(locale) for write in names], locale=locale)
        )

    def _territory(self, drawer: random.Random) -> Callable[[Locale], str]:
        codes = [code for code in sorted(self.locales[0].territories) if code.isalpha()]
        return self._named("territories", drawer.choice(codes))

    def _tongue(self, drawer: random.Random) -> Callable[[Locale], str]:
        codes = [code for code in sorted(self.locales[0].languages) if len(code) == 2]
        return self._named("languages", drawer.choice(codes))

    def _named(self, kind: str, code: str) -> Callable[[Locale], str]:
        return lambda locale: getattr(locale, kind).get(code, code)
