"""Marian and OPUS-MT models of `transformers`, as `Transformer`s (an extra: archnet[marian])."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from archnet.teachers.load import TeacherError
from archnet.teachers.transformer import Transformer

# Where our modules are in a layer there.
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
_PARTS = {"attention": "self_attn", "cross": "encoder_attn"}
_ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu"}


class MarianTokens:
    """A Marian tokenizer with our marks: padding 0, begin 1, end 2, unknown 3, then all others.

    Args:
        source: hub name or folder.

    Raises:
        TeacherError: the extra is missing, or there is no such tokenizer.
    """

    def __init__(self, source: str | Path) -> None:
        transformers = _transformers()
        try:
            self._model = transformers.MarianTokenizer.from_pretrained(str(source))
        except (OSError, ValueError, TypeError) as error:
            raise TeacherError(f"{source} holds no Marian tokenizer: {_line(error)}") from error
        marks = [self._model.pad_token_id, self._model.eos_token_id, self._model.unk_token_id]
        pad, end, unknown = marks
        others = [number for number in range(len(self._model)) if number not in marks]
        # Marian begins a translation with its padding.
        self.order: list[int] = [pad, pad, end, unknown, *others]
        self._ours = {theirs: ours for ours, theirs in enumerate(self.order) if ours != 1}

    def __len__(self) -> int:
        return len(self.order)

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token numbers of each sentence, without marks."""
        if not sentences:
            return []
        rows = self._model(list(sentences), add_special_tokens=False)["input_ids"]
        return [[self._ours[number] for number in row] for row in rows]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Text of each list of token numbers; marks are left out."""
        rows = [[self.order[number] for number in row if number > 2] for row in tokens]
        return [self._model.decode(row, skip_special_tokens=True) for row in rows]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self._model.save_pretrained(str(folder))

    @property
    def identity(self) -> str:
        """What tells this vocabulary from others."""
        vocabulary = sorted(self._model.get_vocab().items(), key=lambda item: item[1])
        return "marian " + " ".join(piece for piece, _ in vocabulary)


def load_marian(source: str | Path, positions: int) -> tuple[Transformer, MarianTokens]:
    """A published translator with its tokenizer, in eval mode, frozen.

    Args:
        source: hub name, such as Helsinki-NLP/opus-mt-en-de, or a local folder.
        positions: longest sentence of the task, in tokens with the end mark.

    Raises:
        TeacherError: the extra is missing, there is no such model, or it is of another kind.
    """
    require_marian(source)
    transformers = _transformers()
    tokens = MarianTokens(source)
    try:
        theirs = transformers.MarianMTModel.from_pretrained(str(source)).eval()
    except (OSError, ValueError) as error:
        raise TeacherError(f"{source} holds no Marian model: {_line(error)}") from error
    return from_marian(theirs, tokens.order, positions), tokens


def require_marian(source: str | Path) -> None:
    """Look at a model's settings before anything of it is loaded; a folder without any passes.

    Raises:
        TeacherError: the model is of another type, or its settings cannot be read.
    """
    path = Path(source) / "config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TeacherError(f"{path} cannot be read: {_line(error)}") from error
    elif Path(source).exists():
        return
    else:
        try:
            settings, _ = _transformers().PretrainedConfig.get_config_dict(str(source))
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"teacher.name={source} is no folder, and no model of that name can be fetched "
                f"({_line(error)})"
            ) from error
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != "marian":
        raise TeacherError(
            f"teacher.name={source} is a model of type {found}, and teacher=marian reads type "
            "marian alone (Marian and OPUS-MT translators): name one of those"
        )


def from_marian(theirs: Any, order: Sequence[int], positions: int) -> Transformer:
    """A `MarianMTModel` as a `Transformer`: the same scores for the tokens in ``order``.

    Raises:
        TeacherError: the model is built otherwise, naming the setting.
    """
    config = theirs.config
    if config.activation_function not in _ACTIVATIONS:
        raise TeacherError(
            f"activation_function={config.activation_function} of the Marian model is not one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    for name in ("share_encoder_decoder_embeddings", "tie_word_embeddings"):
        if not getattr(config, name, True):
            raise TeacherError(f"{name}=false: only Marian models with one shared table are read")
    if not config.scale_embedding:
        raise TeacherError("scale_embedding=false: only Marian models that scale are read")
    if config.encoder_ffn_dim != config.decoder_ffn_dim or (
        config.encoder_attention_heads != config.decoder_attention_heads
    ):
        raise TeacherError("encoder and decoder of the Marian model have other widths or heads")
    model = Transformer(
        len(order),
        positions,
        dim=config.d_model,
        heads=config.encoder_attention_heads,
        inner=config.encoder_ffn_dim,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        dropout=0.0,
        activation=_ACTIVATIONS[config.activation_function],
    )
    given = theirs.state_dict()
    table = given["model.shared.weight"]
    state: dict[str, Tensor] = {
        "tokens.weight": table[list(order)],
        "projection.bias": given["final_logits_bias"][0, list(order)],
    }
    for name in model.state_dict():
        side, *inner = name.split(".")
        if inner and inner[0] == "layers":
            state[name] = given[f"model.{side}.layers.{inner[1]}.{_named(inner[2:])}"]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _named(parts: Sequence[str]) -> str:
    """Our name within a layer as Marian's."""
    part, *rest = parts
    if part in _PARTS:
        return ".".join([_PARTS[part], _ATTENTION[rest[0]], *rest[1:]])
    if part == "feed":
        return ".".join([{"expand": "fc1", "reduce": "fc2"}[rest[0]], *rest[1:]])
    norms = {
        "attention_norm": "self_attn_layer_norm",
        "cross_norm": "encoder_attn_layer_norm",
        "feed_norm": "final_layer_norm",
    }
    return ".".join([norms[part], *rest])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TeacherError(
            "teacher=marian needs the extra: pip install 'archnet[marian]'"
        ) from error
    return transformers


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
