"""OpenVINO on this computer's CPU, in float32 where the file is float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "OpenVINO"
PACKAGE = "openvino"
ACCELERATOR = "CPU"
SUFFIX = ".onnx"

NO_LAYERS = ("Input", "Output", "Const", "Parameter", "Result", "Constant")


def run(request: Request) -> None:
    """Compile and run."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled: Any = core.compile_model(core.read_model(str(request.file)), "CPU", options)
    rows = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind = about["layerType"].astype(str) if "layerType" in about else node.get_type_name()
        if kind not in NO_LAYERS:
            names = (
                about["originalLayersNames"].astype(str) if "originalLayersNames" in about else ""
            )
            rows.append(
                {"name": names or node.get_friendly_name(), "operator": kind, "where": "CPU"}
            )
    request.tell(operators=rows)

    def forward(inputs: Any) -> list[Any]:
        found = compiled([inputs])
        return [found[output] for output in compiled.outputs]

    request.run(forward)
