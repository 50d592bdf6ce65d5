"""Archnet: a trained network becomes a student of five operators, quantized, without labels.

The functions below are imported on first use, so that reading a config loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.api import Comparison, Searched, Verification, compare, distill, search, verify
    from archnet.convert import convert
    from archnet.deploy import audit, export, parity
    from archnet.distill import ArchDistillation
    from archnet.quant import Recipe, quantize, settle

__version__ = "0.1.0"

__all__ = [
    "ArchDistillation",
    "Comparison",
    "Recipe",
    "Searched",
    "Verification",
    "audit",
    "compare",
    "convert",
    "distill",
    "export",
    "parity",
    "quantize",
    "search",
    "settle",
    "verify",
]

_ROOMS = {
    "ArchDistillation": "archnet.distill",
    "Comparison": "archnet.api",
    "Recipe": "archnet.quant",
    "Searched": "archnet.api",
    "Verification": "archnet.api",
    "audit": "archnet.deploy",
    "compare": "archnet.api",
    "convert": "archnet.convert",
    "distill": "archnet.api",
    "export": "archnet.deploy",
    "parity": "archnet.deploy",
    "quantize": "archnet.quant",
    "search": "archnet.api",
    "settle": "archnet.quant",
    "verify": "archnet.api",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'archnet' has no attribute {name!r}")
    function = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = function
    return function


class _Package(ModuleType):
    """Keeps ``archnet.convert`` the function, although a room has the same name.

    The import system binds each imported room on its parent package; for a name that is a
    public function that binding is left out. ``from archnet.convert import ...`` is unaffected.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
