"""A network's own translations, drawn from its distributions: what on-policy training reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archnet.translate.search import BOS, EOS, PAD, UNK, Translator
from archnet.translate.text import groups


def sampled(
    model: Translator,
    rows: Sequence[Sequence[int]],
    longest: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """A translation of each sentence, every token drawn from its distribution.

    Args:
        model: what translates.
        rows: sentences as token numbers without marks, none of them empty.
        longest: tokens of a translation; what has no end mark by then is cut.
        generator: on the CPU; what is drawn follows from it and the model.
        device: where the network is.

    Returns:
        Token numbers without marks.
    """
    found: list[list[int]] = [[] for _ in rows]
    for group in groups(rows, len(rows)):
        source = torch.tensor([[*rows[index], EOS] for index in group], device=device)
        for index, words in zip(group, _drawn(model, source, longest, generator), strict=True):
            found[index] = words
    return found


def _drawn(
    model: Translator, source_BS: Tensor, longest: int, generator: torch.Generator
) -> list[list[int]]:
    words: list[list[int]] = [[] for _ in source_BS]
    alive = set(range(len(source_BS)))
    with torch.no_grad():
        state = model.start(source_BS)
        tokens_B = torch.full((len(source_BS),), BOS, device=source_BS.device)
        for _ in range(longest):
            scores_BV, state = model.step(tokens_B, state)
            scores_BV[:, [PAD, BOS, UNK]] = -torch.inf
            shares_BV = scores_BV.float().softmax(-1).cpu()
            drawn = torch.multinomial(shares_BV, 1, generator=generator)[:, 0]
            for row, token in enumerate(drawn.tolist()):
                if token == EOS:
                    alive.discard(row)
                elif row in alive:
                    words[row].append(token)
            if not alive:
                break
            tokens_B = drawn.to(source_BS.device)
    return words
