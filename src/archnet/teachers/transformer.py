"""The Transformer (Vaswani et al. 2017, arXiv 1706.03762), for translation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


class Embedding(nn.Module):
    """Token vectors times sqrt(dim), plus sinusoidal positions, then dropout.

    Args:
        tokens: the table, shared by source, target and output projection.
        positions: how many there are.
    """

    positions: Tensor

    def __init__(self, tokens: nn.Embedding, positions: int, dropout: float) -> None:
        super().__init__()
        # In a tuple, so that the one table is not registered here again.
        self._tokens = (tokens,)
        self.dropout = nn.Dropout(dropout)
        dim = tokens.embedding_dim
        self.scale = math.sqrt(dim)
        self.register_buffer("positions", sinusoids(positions, dim), persistent=False)

    @property
    def tokens(self) -> nn.Embedding:
        """The shared table."""
        return self._tokens[0]

    def forward(self, tokens_BT: Tensor, first: int = 0) -> Tensor:
        """(B, T, D); ``first`` is the position of the first token."""
        vectors = self.tokens(tokens_BT) * self.scale
        return self.dropout(vectors + self.positions[first : first + tokens_BT.shape[1]])


def sinusoids(positions: int, dim: int) -> Tensor:
    """(positions, dim): sines in the first half, cosines in the second."""
    rate = torch.exp(torch.arange((dim + 1) // 2) * (-2 * math.log(10000.0) / dim))
    angle = torch.arange(positions)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()[:, : dim // 2]], 1)


class Projection(nn.Module):
    """Scores of all tokens: the product with the shared table, and a bias."""

    def __init__(self, tokens: nn.Embedding) -> None:
        super().__init__()
        self._tokens = (tokens,)
        self.out_features, self.in_features = tokens.weight.shape
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    @property
    def weight(self) -> Tensor:
        """The shared table, (V, D)."""
        return self._tokens[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention; ``weights`` passes the attention map (B, H, T, S) through, as a tap."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.weights = nn.Identity()

    def split(self, x_BTD: Tensor) -> Tensor:
        """(B, H, T, D / H)."""
        return x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def memory(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to."""
        return self.split(self.key(x_BSD)), self.split(self.value(x_BSD))

    def forward(
        self, x_BTD: Tensor, memory: tuple[Tensor, Tensor], hidden: Tensor | None = None
    ) -> Tensor:
        """Attend to ``memory``; ``hidden`` (broadcasts to B, H, T, S) is true where nobody may."""
        keys, values = memory
        query = self.split(self.query(x_BTD)) * (keys.shape[-1] ** -0.5)
        scores = query @ keys.transpose(2, 3)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        mixed = self.weights(scores.softmax(-1)) @ values
        return self.output(mixed.transpose(1, 2).flatten(2))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, dim: int, inner: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.expand, self.reduce = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.dropout(ACTIVATIONS[self.activation](self.expand(x))))


class Layer(nn.Module):
    """Self-attention, in the decoder attention to the source, and a feed-forward part.

    Each sub-layer f with its own norm: ``norm(x + f(x))`` (post) or ``x + f(norm(x))`` (pre). What
    comes of it passes through ``<sub-layer>_result``, as a tap.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: int,
        dropout: float,
        norm: str,
        activation: str,
        decoder: bool,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = Attention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention_result = nn.Identity()
        if decoder:
            self.cross = Attention(dim, heads)
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_result = nn.Identity()
        self.feed = FeedForward(dim, inner, dropout, activation)
        self.feed_norm = nn.LayerNorm(dim)
        self.feed_result = nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def part(self, name: str, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """A sub-layer by its name, with its norm and the addition."""
        norm = getattr(self, f"{name}_norm")
        result = x + self.dropout(run(norm(x) if self.pre else x))
        return getattr(self, f"{name}_result")(result if self.pre else norm(result))

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None,
        memory: Tensor | None = None,
        memory_hidden: Tensor | None = None,
    ) -> Tensor:
        x = self.part("attention", x, lambda y: self.attention(y, self.attention.memory(y), hidden))
        if memory is not None:
            seen = self.cross.memory(memory)
            x = self.part("cross", x, lambda y: self.cross(y, seen, memory_hidden))
        return self.part("feed", x, self.feed)


class Stack(nn.Module):
    """Embedding, layers and, where norms are before sub-layers, a last norm."""

    def __init__(self, embed: Embedding, layers: list[Layer], norm: str) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        dim = embed.tokens.embedding_dim
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()


class Transformer(nn.Module):
    """Encoder and decoder; one table of token vectors serves source, target and output.

    Args:
        vocabulary: tokens.
        positions: longest sentence, marks included.
        dim, heads, inner: width of the network, heads of its attention, width inside the
            feed-forward parts.
        encoder_layers, decoder_layers: how many.
        dropout: on embeddings, sub-layers and inside the feed-forward parts.
        norm: "post" as published, or "pre" (Xiong et al. 2020, arXiv 2002.04745).
        activation: inside the feed-forward parts: "relu", "silu" or "gelu".
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        dim: int = 512,
        heads: int = 8,
        inner: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dropout: float = 0.1,
        norm: Literal["pre", "post"] = "post",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm={norm}: choose pre or post")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation}: choose one of {', '.join(ACTIVATIONS)}")
        if dim % heads:
            raise ValueError(f"dim={dim} is no multiple of heads={heads}")
        self.positions = positions
        self.tokens = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)

        def stack(layers: int, decoder: bool) -> Stack:
            made = [
                Layer(dim, heads, inner, dropout, norm, activation, decoder) for _ in range(layers)
            ]
            return Stack(Embedding(self.tokens, positions, dropout), made, norm)

        self.encoder = stack(encoder_layers, False)
        self.decoder = stack(decoder_layers, True)
        self.projection = Projection(self.tokens)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not name.startswith("tokens"):
                nn.init.xavier_uniform_(weight)

    def encode(self, source_BS: Tensor, pad_BS: Tensor | None = None) -> Tensor:
        """(B, S, D) of token numbers; ``pad_BS`` is true at padding."""
        hidden = None if pad_BS is None else pad_BS[:, None, None]
        x = self.encoder.embed(source_BS)
        for layer in self.encoder.layers:
            x = layer(x, hidden)
        return self.encoder.norm(x)

    def forward(self, source_BS: Tensor, target_BT: Tensor, pad_BS: Tensor | None = None) -> Tensor:
        """Scores (B, T, V) of the token that follows each target position."""
        memory = self.encode(source_BS, pad_BS)
        memory_hidden = None if pad_BS is None else pad_BS[:, None, None]
        length = target_BT.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=memory.device).triu(1)
        x = self.decoder.embed(target_BT)
        for layer in self.decoder.layers:
            x = layer(x, future, memory, memory_hidden)
        return self.projection(self.decoder.norm(x))

    def start(self, source_BS: Tensor) -> State:
        """What decoding needs of sentences of one length; each row is a sentence."""
        memory, state = self.encode(source_BS), State()
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, Layer)
            keys, values = layer.cross.memory(memory)
            empty = keys[:, :, :0]
            state |= {
                f"{index}.cross.keys": keys,
                f"{index}.cross.values": values,
                f"{index}.keys": empty,
                f"{index}.values": empty,
            }
        return state

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores (B, V) of the next token after ``tokens_B``, and the state with it added."""
        state = dict(state)
        x = self.decoder.embed(tokens_B[:, None], state["0.keys"].shape[2])
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, Layer)
            x = self._step(index, layer, x, state)
        return self.projection(self.decoder.norm(x))[:, 0], state

    def _step(self, index: int, layer: Layer, x: Tensor, state: State) -> Tensor:
        def attend(y: Tensor) -> Tensor:
            for name, new in zip(("keys", "values"), layer.attention.memory(y), strict=True):
                state[f"{index}.{name}"] = torch.cat([state[f"{index}.{name}"], new], 2)
            past = state[f"{index}.keys"], state[f"{index}.values"]
            return layer.attention(y, past)

        seen = state[f"{index}.cross.keys"], state[f"{index}.cross.values"]
        x = layer.part("attention", x, attend)
        x = layer.part("cross", x, lambda y: layer.cross(y, seen))
        return layer.part("feed", x, layer.feed)
