"""The hardware target: what it runs, what a network costs on it, and whether a file is pure."""

from archnet.hardware.target import Target

__all__ = ["Target"]
