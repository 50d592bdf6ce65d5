"""Two networks' translations of the same sentences, beside each other."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sacrebleu
from numpy.typing import NDArray
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from archnet.intervals import by_resampling

Count = Callable[[str, str], list[int]]  # of a translation and its reference, to be added
Score = Callable[[NDArray[np.int64]], float]  # of such sums

SHOWN = 12  # disagreements that are kept
LENGTHS = (1, 5, 10, 20, 40)  # words of a source at which a new row of a table begins


def paired(
    translations: Mapping[str, Sequence[str]],
    references: Sequence[str],
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """How far the student's BLEU and chrF are from the teacher's, with paired bootstrap intervals.

    Args:
        translations: of ``teacher`` and ``student``, sentence by sentence.
        references: of the same sentences.
        found: of both the figures, ``bleu`` and ``chrf`` among them.
    """
    counted: dict[str, tuple[Count, Score]] = {
        "bleu": (_matches, _bleu),
        "chrf": (_characters, _chrf),
    }
    result = {}
    for key, (count, score) in counted.items():
        theirs, ours = (
            np.array([count(*pair) for pair in zip(translations[name], references, strict=True)])
            for name in ("teacher", "student")
        )
        low, high = by_resampling(
            len(references),
            lambda drawn, ours=ours, theirs=theirs, score=score: (  # type: ignore[misc]
                score(drawn @ ours) - score(drawn @ theirs)
            ),
        )
        result[key] = {
            "difference": round(found["student"][key] - found["teacher"][key], 2),
            "low": round(low, 2),
            "high": round(high, 2),
            "samples": len(references),
        }
    return result


# As for a sentence: with fewer than four words there are no n-grams of four.
_BLEU, _CHRF = sacrebleu.BLEU(effective_order=True), sacrebleu.CHRF()


def _matches(translation: str, reference: str) -> list[int]:
    """Matches and n-grams of each order, and both lengths: they add over sentences."""
    found = _BLEU.sentence_score(translation, [reference])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu(sums: NDArray[np.int64]) -> float:
    matches, ngrams = sums[:4].tolist(), sums[4:8].tolist()
    lengths = int(sums[8]), int(sums[9])
    return sacrebleu.BLEU.compute_bleu(matches, ngrams, *lengths, smooth_method="exp").score


def _characters(translation: str, reference: str) -> list[int]:
    """Character n-grams of each order in the translation, the reference and both: they add.

    Those of an order that the reference has none of do not count, as in sacreBLEU.
    """
    ours, theirs = (
        extract_all_char_ngrams(text, _CHRF.char_order, include_whitespace=False)
        for text in (translation, reference)
    )
    return [
        count
        for mine, known in zip(ours, theirs, strict=True)
        for count in (mine.total() if known else 0, known.total(), (mine & known).total())
    ]


def _chrf(sums: NDArray[np.int64]) -> float:
    """Popovic 2015: F2 of the mean precision and recall over the orders that both texts have."""
    rows = sums.reshape(-1, 3)
    rows = rows[(rows[:, :2] > 0).all(1)]
    if not rows[:, 2].any():
        return 0.0
    precision, recall = (rows[:, 2] / rows[:, 0]).mean(), (rows[:, 2] / rows[:, 1]).mean()
    weight = _CHRF.beta**2
    return float(100 * (1 + weight) * precision * recall / (weight * precision + recall))


def compared(
    sources: Sequence[str],
    references: Sequence[str],
    translations: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """For the report: sentences on which the student loses most, and chrF by length of the source.

    Returns:
        ``disagreements``, those of the greatest loss in chrF first; ``disagreeing``, how many
        there are; ``by_length``: from how many words, how many sentences, chrF of both.
    """
    theirs, ours = translations["teacher"], translations["student"]
    differ = [i for i in range(len(sources)) if theirs[i] != ours[i]]

    def loss(i: int) -> float:
        scored = (_CHRF.sentence_score(text[i], [references[i]]).score for text in (theirs, ours))
        return float(np.subtract(*scored))

    worst = sorted(differ, key=loss, reverse=True)[:SHOWN]
    bounds, rows = [*LENGTHS, None], []
    words = [len(source.split()) for source in sources]
    for low, high in itertools.pairwise(bounds):
        assert low is not None
        chosen = [i for i, n in enumerate(words) if n >= low and (high is None or n < high)]
        if chosen:
            known = [references[i] for i in chosen]
            scored = {
                name: round(_CHRF.corpus_score([text[i] for i in chosen], [known]).score, 2)
                for name, text in translations.items()
            }
            rows.append({"words": low, "below": high, "sentences": len(chosen), **scored})
    return {
        "disagreements": [
            {
                "index": i,
                "source": sources[i],
                "reference": references[i],
                "teacher": theirs[i],
                "student": ours[i],
            }
            for i in worst
        ],
        "disagreeing": len(differ),
        "by_length": rows,
    }
