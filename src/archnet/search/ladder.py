"""Widths from float down to those that are asked for, one operand and one step at a time.

Activations come first and weights after (GPLQ, arXiv 2506.11784): coarse activations are the
larger change of a student's function, and weights of many bits can follow it.
"""

from dataclasses import dataclass

RUNGS = (1, 2, 4, 8)  # widths that a search stops at on its way down


@dataclass(frozen=True)
class Widths:
    """Bits of weights and activations; 32: float."""

    weight_bits: int = 32
    act_bits: int = 32

    @property
    def is_float(self) -> bool:
        return self.weight_bits == self.act_bits == 32

    def __str__(self) -> str:
        return "float" if self.is_float else f"W{self.weight_bits}A{self.act_bits}"

    @classmethod
    def named(cls, name: str) -> "Widths":
        """Widths by what `str` calls them."""
        if name == "float":
            return cls()
        weight_bits, _, act_bits = name.removeprefix("W").partition("A")
        return cls(int(weight_bits), int(act_bits))

    def above(self) -> "Widths | None":
        """The widths from which these are reached by one step; None: float.

        >>> [str(Widths(2, 4)), str(Widths(2, 4).above()), str(Widths(2, 4).above().above())]
        ['W2A4', 'W4A4', 'W8A4']
        """
        if self.weight_bits < 8:
            return Widths(wider(self.weight_bits), self.act_bits)
        if self.act_bits < 8:
            return Widths(self.weight_bits, wider(self.act_bits))
        return None


def wider(bits: int) -> int:
    """The next width of the ladder above ``bits``, which is below 8."""
    return next(rung for rung in RUNGS if rung > bits)
