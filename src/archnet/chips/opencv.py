"""OpenCV's dnn module, on this computer's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "OpenCV's dnn module"
PACKAGE = "opencv-python-headless"
ACCELERATOR = "CPU"
SUFFIX = ".onnx"
ERRORS = (r".*error: \(", r"(\w+\.)*\w+(Error|Exception): ", r"(?i).*\berror\b")


def run(request: Request) -> None:
    """Load in the default engine and run; its layers are those of the file."""
    import cv2

    cv2.setNumThreads(1)
    network = cv2.dnn.readNetFromONNX(str(request.file))
    if network.empty():
        raise RuntimeError("readNetFromONNX gives an empty network")

    def forward(inputs):  # type: ignore[no-untyped-def]  # arrays of a package that is not here
        network.setInput(inputs)
        return network.forward(request.outputs)

    request.run(forward)
