"""Beam search, batched and incremental; with one hypothesis it is greedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PAD, BOS, EOS, UNK = 0, 1, 2, 3
State = dict[str, Tensor]


class Translator(Protocol):
    """A network that translates: a teacher, a student, or a pair of exported files."""

    def start(self, source_BS: Tensor) -> State:
        """What decoding sentences of one length needs; every tensor has a row a sentence."""
        ...

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores (B, V) of what follows ``tokens_B``, and the state with them added."""
        ...


@dataclass(frozen=True)
class SearchOptions:
    """How translations are looked for.

    Args:
        beam: hypotheses kept; 1 is greedy.
        length_penalty: scores are divided by length ** this.
        longest: tokens of a translation, the end mark included; no sentence gets more than
            ten beyond twice its own length either.
    """

    beam: int = 5
    length_penalty: float = 1.0
    longest: int = 128


class Hypothesis(NamedTuple):
    """A translation that was found.

    ``score`` is the log-probability of its tokens and the end mark, over length **
    `SearchOptions.length_penalty`; ``tokens`` are numbers without marks.
    """

    score: float
    tokens: list[int]


def search(model: Translator, source_BS: Tensor, options: SearchOptions) -> list[list[int]]:
    """The best of `hypotheses` of every sentence."""
    return [found[0].tokens for found in hypotheses(model, source_BS, options)]


def hypotheses(
    model: Translator, source_BS: Tensor, options: SearchOptions
) -> list[list[Hypothesis]]:
    """The translations of every sentence that beam search ends with, the best first.

    A hypothesis ends when its end mark is among the ``beam`` best continuations; a sentence is
    done with ``beam`` ended ones. Each step runs one token through the network.

    Args:
        model: what translates.
        source_BS: (B, S) sentences of one length with their end marks, without padding.
        options: see `SearchOptions`.

    Returns:
        For each sentence ``beam`` of them, or fewer where there are no more.
    """
    beam, device = options.beam, source_BS.device
    limit = min(options.longest, 2 * source_BS.shape[1] + 10)
    rows = torch.arange(len(source_BS), device=device).repeat_interleave(beam)
    with torch.inference_mode():
        state = _take(model.start(source_BS), rows)
        alive = list(range(len(source_BS)))
        ended: list[list[Hypothesis]] = [[] for _ in alive]
        tokens_N = torch.full((len(rows),), BOS, device=device)
        # All but one of the equal hypotheses at the start are out.
        total_BK = torch.full((len(alive), beam), -torch.inf, device=device)
        total_BK[:, 0] = 0
        past_BKT = torch.empty(len(alive), beam, 0, dtype=torch.long, device=device)
        for length in range(1, limit + 1):
            scores_NV, state = model.step(tokens_N, state)
            logs_NV = scores_NV.float().log_softmax(-1)
            logs_NV[:, [PAD, BOS, UNK]] = -torch.inf
            if length == limit:  # the end mark is the only way on
                ended_N = logs_NV[:, EOS].clone()
                logs_NV.fill_(-torch.inf)
                logs_NV[:, EOS] = ended_N
            size = logs_NV.shape[1]
            reached = total_BK[:, :, None] + logs_NV.view(len(alive), beam, size)
            best_BJ, place_BJ = reached.flatten(1).topk(2 * beam)
            parent_BJ, token_BJ = place_BJ // size, place_BJ % size
            ends_BJ = token_BJ == EOS
            for row, rank in ends_BJ[:, :beam].nonzero().tolist():
                value = float(best_BJ[row, rank])
                if value > -torch.inf:
                    words = past_BKT[row, parent_BJ[row, rank]].tolist()
                    score = value / length**options.length_penalty
                    ended[alive[row]].append(Hypothesis(score, words))
            going = [row for row, item in enumerate(alive) if len(ended[item]) < beam]
            if length == limit or not going:
                break
            keep = torch.tensor(going, device=device)
            best_BJ = best_BJ.masked_fill(ends_BJ, -torch.inf)[keep]
            total_BK, chosen_BK = best_BJ.topk(beam)
            parent_BK = parent_BJ[keep].gather(1, chosen_BK)
            token_BK = token_BJ[keep].gather(1, chosen_BK)
            past_BKT = torch.cat([past_BKT[keep[:, None], parent_BK], token_BK[:, :, None]], 2)
            alive = [alive[row] for row in going]
            state = _take(state, (keep[:, None] * beam + parent_BK).flatten())
            tokens_N = token_BK.flatten()
    return [sorted(found, reverse=True)[:beam] for found in ended]


def _take(state: State, rows: Tensor) -> State:
    return {name: tensor.index_select(0, rows) for name, tensor in state.items()}


def scores_along(model: Translator, source_BS: Tensor, target_BT: Tensor) -> Tensor:
    """Scores (B, T, V) of what follows each token of given translations, which start with BOS."""
    with torch.inference_mode():
        state, found = model.start(source_BS), []
        for tokens_B in target_BT.unbind(1):
            scores_BV, state = model.step(tokens_B, state)
            found.append(scores_BV)
        return torch.stack(found, 1)
