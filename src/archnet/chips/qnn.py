"""Qualcomm's HTP, emulated on x86, as a plug-in of ONNX Runtime: onnxruntime-qnn.

What the HTP takes is one node of its graph, or several, in the optimized graph; all others are
ONNX Runtime's, on the CPU. Figures of time mean nothing: it is an emulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "Qualcomm's HTP, emulated"
PACKAGE = "onnxruntime-qnn"
CHIPS = {"qnn_htp": ("htp",)}
ACCELERATOR = "QNN"
SUFFIX = ".onnx"
QUANTIZES = True  # by the quantizer of ONNX Runtime with its settings for QNN
ERRORS = (r".*(\[E:|MEM_ALLOC)", r"(\w+\.)*\w+(Error|Exception|Fail)\b.*")


def run(request: Request) -> None:
    """Quantize where asked, compile, profile one run, run."""
    import numpy as np
    import onnxruntime
    import onnxruntime_qnn

    file = _quantized(request) if request.quantize else request.file
    onnxruntime.register_execution_provider_library("QNN", onnxruntime_qnn.get_library_path())
    devices = [d for d in onnxruntime.get_ep_devices() if "QNN" in d.ep_name]
    if not devices:
        raise RuntimeError("onnxruntime finds no device of QNN")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(request.folder / "profile")
    options.add_provider_for_devices(
        devices[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    )
    session = onnxruntime.InferenceSession(str(file), options)
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    session.run(None, {given.name: np.zeros(shape, np.float32)})
    request.tell(operators=inner(request.nodes(session.end_profiling())))
    scores = [
        request.joined(session.run(None, {given.name: item[None]})) for item in request.inputs()
    ]
    if scores:
        request.tell(scores=np.stack(scores))


def inner(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes between the first, which rounds the file's floats, and the last, which gives
    floats: whoever feeds the chip with integers needs neither.
    """
    first = 1 if nodes and nodes[0]["operator"] == "QuantizeLinear" else 0
    last = len(nodes) - (1 if nodes and nodes[-1]["operator"] == "DequantizeLinear" else 0)
    return nodes[first:last]


def _quantized(request: Request) -> Path:
    """The float file in QDQ form."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    name = onnx.load(str(request.file)).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{name: item[None]} for item in request.calibration()])

        def get_next(self) -> Any:
            return next(self.items, None)

    made = request.folder / "quantized.onnx"
    quantize(str(request.file), str(made), get_qnn_qdq_config(str(request.file), Reader()))
    return made
