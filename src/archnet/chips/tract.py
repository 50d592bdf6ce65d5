"""tract, a runtime in Rust, on this computer's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "tract"
PACKAGE = "tract"
ACCELERATOR = "CPU"
SUFFIX = ".onnx"


def run(request: Request) -> None:
    """Load and run; it does not tell its operators."""
    import tract

    runnable = tract.onnx().load(str(request.file)).into_model().into_runnable()
    request.run(lambda inputs: [output.to_numpy() for output in runnable.run([inputs])])
