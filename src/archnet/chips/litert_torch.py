"""Google's converter from torch to TensorFlow Lite, litert-torch, and its quantizer to int8.

It makes files for the tools that take TensorFlow Lite. A program of torch.export goes in, a file
with its input's channels last comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "Google's converter from torch"
PACKAGE = "litert-torch"
ACCELERATOR = "CPU"
SUFFIX = ".pt2"
MAKES = ".tflite"
QUANTIZES = True
TORCH = True


def run(request: Request) -> None:
    """Convert, and quantize on the calibration inputs."""
    import litert_torch
    import torch
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    inputs = request.calibration()
    if inputs.ndim == 4:
        inputs = inputs.transpose(0, 2, 3, 1)
    network: Any = torch.export.load(str(request.file)).module()
    if inputs.ndim == 4:
        network = litert_torch.to_channel_last_io(network, args=[0])
    example = torch.from_numpy(inputs[:1].copy())
    floating = str(request.folder / "float.tflite")
    litert_torch.convert(network, (example,)).export(floating)
    (key, signature), *_ = Interpreter(floating).get_signature_list().items()
    (name,) = signature["inputs"]
    quantized = quantizer.Quantizer(floating)
    quantized.load_quantization_recipe(recipe.static_wi8_ai8())
    seen = quantized.calibrate({key: [{name: item[None]} for item in inputs]})
    quantized.quantize(seen).export_model(str(request.folder / "made"))
