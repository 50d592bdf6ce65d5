"""Vendors' compilers and runtimes, each run by an interpreter of its own through a bridge."""

from archnet.chips.host import Bridge, ChipError, Compiled, Placed, bridge, tool_of, tools

__all__ = ["Bridge", "ChipError", "Compiled", "Placed", "bridge", "tool_of", "tools"]
