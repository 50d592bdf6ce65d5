"""A translating student as it is used: in two parts."""

from dataclasses import dataclass

from archnet.ops.student import Student


@dataclass(frozen=True)
class Stepwise:
    """Encoder and decoder of a translating student.

    Args:
        encoder: reads ``source`` (B, S), one length a call; gives the values ``memory``.
        decoder: reads the token ``target`` (B, 1), its ``position`` (B, 1), ``memory`` and the
            states; gives scores (B, 1, V).
        memory: names of values, results of the encoder and inputs of the decoder.
        states: input of the decoder -> the value that it has at the next token.
    """

    encoder: Student
    decoder: Student
    memory: tuple[str, ...]
    states: dict[str, str]
