"""LiteRT (TensorFlow Lite) on this computer's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "LiteRT, the runtime of TensorFlow Lite"
PACKAGE = "ai-edge-litert"
ACCELERATOR = "CPU"
SUFFIX = ".tflite"


def run(request: Request) -> None:
    """Load and run; a quantized input is rounded to its grid, a quantized result stands for its
    numbers.
    """
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(model_path=str(request.file), num_threads=1)
    interpreter.allocate_tensors()
    rows = [
        {"name": str(op["index"]), "operator": op["op_name"], "where": "CPU"}
        for op in interpreter._get_ops_details()
    ]
    request.tell(operators=rows)
    (given,), results = interpreter.get_input_details(), interpreter.get_output_details()

    def forward(inputs: Any) -> list[Any]:
        values = inputs
        if len(given["shape"]) == 4 and tuple(given["shape"]) != inputs.shape:
            values = np.moveaxis(values, 1, -1)
        scale, zero = given["quantization"]
        if scale:
            low, high = np.iinfo(given["dtype"]).min, np.iinfo(given["dtype"]).max
            values = np.clip(np.rint(values / np.float32(scale)) + zero, low, high)
        interpreter.set_tensor(given["index"], values.astype(given["dtype"]))
        interpreter.invoke()
        return [read(result) for result in results]

    def read(result: Any) -> Any:
        found = interpreter.get_tensor(result["index"])
        scales = result["quantization_parameters"]
        if not len(scales["scales"]):
            return found
        return (found.astype(np.float64) - scales["zero_points"]) * scales["scales"]

    request.run(forward)
