"""Two networks' translations of the same sentences, beside each other."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sacrebleu
from numpy.typing import NDArray

from archnet.intervals import by_resampling

SHOWN = 12  # disagreements that are kept
LENGTHS = (1, 5, 10, 20, 40)  # words of a source at which a new row of a table begins


def paired(
    translations: Mapping[str, Sequence[str]],
    references: Sequence[str],
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """How far the student's BLEU is from the teacher's, with a paired bootstrap interval.

    Args:
        translations: of ``teacher`` and ``student``, sentence by sentence.
        references: of the same sentences.
        found: of both the figures, ``bleu`` among them.
    """
    theirs, ours = (
        np.array([_matches(*pair) for pair in zip(translations[name], references, strict=True)])
        for name in ("teacher", "student")
    )
    low, high = by_resampling(
        len(references), lambda drawn: _bleu(drawn @ ours) - _bleu(drawn @ theirs)
    )
    bleu = {
        "difference": round(found["student"]["bleu"] - found["teacher"]["bleu"], 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "samples": len(references),
    }
    return {"bleu": bleu}


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
