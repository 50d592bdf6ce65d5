"""Sony's converter for the IMX500: imx500-converter, which needs Java 17 or newer.

The chip has no processor for what its converter does not take: such a layer ends the conversion.
Files hold the quantizer nodes of Sony's toolkit (mct-quantizers). A float network gets them here,
with the toolkit's plainest rule: thresholds of the largest magnitude, a power of two for maps. What
is run are these nodes in ONNX Runtime, not the chip's arithmetic.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from archnet.chips.serve import Request

ABOUT = "Sony's converter for the IMX500"
PACKAGE = "imx500-converter"
CHIPS = {"imx500": ("imx500",)}
ACCELERATOR = "IMX500"
SUFFIX = ".onnx"
FORM = "mct"
IR = 10
QUANTIZES = True
ERRORS = (
    r".*ERROR ?: CODE: \[\w+\] [^ \[](?!ailure in conversion)",
    r"(\w+\.)*\w+(Error|Exception): ",
    r".*\bERROR\b",
)
MARK = r"^.*?ERROR ?: (CODE: \[\w+\] )?| \[/\S+\]$"

DOMAIN = "mct_quantizers"
# A refused layer, with its reasons in the lines below, each "... reason: <why>".
REFUSED = re.compile(
    r"^(?:.*\[INVOP\].*\n)?Node \[[\w.]+\] op: (?P<operator>\w+), id: (?P<name>[^,\n]+),.*errors:\n"
    r"(?P<why>(?:[ \t]+[^\n]*\n?)*)",
    re.MULTILINE,
)
UNQUANTIZED = re.compile(r"Layer (?P<operator>\w+): (?P<name>\S+) (?P<why>is not quantized)")
NO_LAYERS = ("Const", "Placeholder", "Transform", "Output")
# Operators that hand values on, and those that are one layer with what stands in front of them.
MOVES = ("Reshape", "Flatten", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Identity")
FUSED = {"Relu", "Clip", "BatchNormalization"}
# Operators whose second input, where it is constant, is a weight, and the axis of its channels;
# others of two inputs, of which either may be constant.
WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": -1}
BOTH = ("Add", "Sub", "Mul", "Div", "Max", "Min")
BITS = 8
FLOAT = 1  # ONNX's number of the type
VERSION = "1.7.0"  # of mct-quantizers, which every node names


def operators(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a converted network, from its file of insights."""
    return [
        {"name": node["id"], "operator": node["op"], "where": ACCELERATOR}
        for node in model["nodes"]
        if node["op"] not in NO_LAYERS
    ]


def refused(printed: str) -> list[dict[str, Any]]:
    """The layers that the converter names when it refuses a network."""
    found = []
    for match in (*REFUSED.finditer(printed), *UNQUANTIZED.finditer(printed)):
        reasons = [line.rpartition("reason: ")[2].strip() for line in match["why"].splitlines()]
        why = re.sub(r" \[/\S+\]$", "", "; ".join(reasons))
        row = {"name": match["name"].strip(), "operator": match["operator"], "why": why}
        found.append({**row, "where": "refused"})
    return found


def figures(model: dict[str, Any]) -> dict[str, Any]:
    """Bytes of memory on the chip, from the file of insights."""
    memory = model["metadata"]["memory"]
    fits = "enough" if memory["totalRequiredMemory"] <= memory["availableMemory"] else "too few"
    return {
        "internal_bytes": memory["runtimeMemory"],
        "weight_bytes": memory["staticMemory"],
        "sram_bytes": memory["totalRequiredMemory"],
        "memory": f"{memory['availableMemory']:,} bytes on the chip, {fits}",
    }


def run(request: Request) -> None:
    """Add quantizer nodes where asked, convert, run the nodes."""
    import mct_quantizers
    import onnxruntime
    from imx500_converter.main_pt import main

    if shutil.which("java") is None:
        raise RuntimeError("the converter needs Java 17 or newer: there is no program java")
    file = quantized(request) if request.quantize else request.file
    out = request.folder / "out"
    asked = ["-i", str(file), "-o", str(out), "--model-insight", "--no-input-persistency"]
    try:
        failed = main(asked)
    except SystemExit as ended:
        failed = ended.code
    found = sorted(out.glob("*_ModelForInsights.json"))
    rows = refused(request.log())
    if found:
        model = json.loads(found[0].read_text(encoding="utf-8"))
        rows = operators(model) + rows
        request.tell(figures=figures(model))
    if rows:
        request.tell(operators=rows)
    if failed or not found:
        raise RuntimeError("the converter refuses the network")
    options = mct_quantizers.get_ort_session_options()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    scores = [request.joined(session.run(None, {name: item[None]})) for item in request.inputs()]
    if scores:
        request.tell(scores=scores)


def quantized(request: Request) -> Path:
    """The float file with quantizer nodes behind its maps and weights, unless it has some."""
    import onnx

    model = onnx.load(str(request.file))
    if any(node.domain == DOMAIN for node in model.graph.node):
        return request.file
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        values = onnx.numpy_helper.to_array(node.attribute[0].t)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    model = onnx.shape_inference.infer_shapes(model)
    made = request.folder / "quantized.onnx"
    with_quantizers(model, ranges(model, rounded(model.graph), request.calibration()))
    onnx.save(model, str(made))
    return made


def rounded(graph: Any) -> list[str]:
    """The maps that are rounded: all but those that are moved, or read by what is one layer with
    the layer that writes them.
    """
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    kinds = types(graph)
    found = [item.name for item in graph.input]
    for node in graph.node:
        with_next = node.op_type in (*WEIGHTED, *BOTH, "BatchNormalization")
        for name in node.output if node.op_type not in MOVES else ():
            if not (with_next and readers.get(name, {""}) <= FUSED):
                found.append(name)
    return [name for name in found if kinds[name].elem_type == FLOAT]


def types(graph: Any) -> dict[str, Any]:
    """Type and shape of every map."""
    items = (*graph.input, *graph.value_info, *graph.output)
    return {item.name: item.type.tensor_type for item in items}


def ranges(model: Any, maps: list[str], inputs: Any) -> dict[str, tuple[float, float, Any]]:
    """The least and the largest number of every map, and its shape."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    given = probe.graph.input[0].name
    asked = [name for name in maps if name != given]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = {given: (float(inputs.min()), float(inputs.max()), inputs[:1].shape)}
    for item in inputs:
        for name, values in zip(asked, session.run(asked, {given: item[None]}), strict=True):
            low, high, _ = found.get(name, (0.0, 0.0, None))
            ends = min(low, float(values.min())), max(high, float(values.max()))
            found[name] = *ends, values.shape
    return found


def with_quantizers(model: Any, ends: dict[str, tuple[float, float, Any]]) -> None:
    """Put a quantizer node behind every map that has ends, and behind every weight."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes: list[Any] = []
    renamed: dict[str, str] = {}

    def quantizer(operator: str, inputs: list[str], shape: Any, **attributes: Any) -> str:
        # A name with a colon, as torch's "onnx::Conv_21", ends in 'For input string: ""'.
        output = f"quantizer_{len(nodes)}"
        attributes = {"num_bits": BITS, "mctq_version": VERSION, **attributes}
        made = helper.make_node(operator, inputs, [output], output, domain=DOMAIN, **attributes)
        nodes.append(made)
        graph.value_info.append(helper.make_tensor_value_info(output, FLOAT, shape))
        return output

    def map_of(name: str) -> None:
        low, high, shape = ends[name]
        threshold = 2.0 ** math.ceil(math.log2(max(-low, high) or 1.0))
        asked = {"threshold": threshold, "signed": int(low < 0)}
        renamed[name] = quantizer("ActivationPOTQuantizer", [name], shape, **asked)

    def weight_of(node: Any, name: str) -> str:
        values = constants[name]
        axis = channels(node, values.ndim)
        others = tuple(place for place in range(values.ndim) if place != axis)
        largest = np.maximum(np.abs(values).max(others), 1e-6).reshape(-1)
        threshold = largest * 2 ** (BITS - 1) / (2 ** (BITS - 1) - 1)
        stored = numpy_helper.from_array(threshold.astype(np.float32), f"{node.output[0]}_{name}")
        graph.initializer.append(stored)
        asked = {"signed": 1, "per_channel": int(axis is not None), "channel_axis": axis or 0}
        inputs = [name, stored.name]
        return quantizer("WeightsSymmetricQuantizer", inputs, values.shape, **asked)

    for item in graph.input:
        map_of(item.name)
    for index, node in enumerate(graph.node):
        node.name = node.name.replace(":", "_") or f"{node.op_type}_{index}"
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
            is_weight = node.op_type in (*WEIGHTED, *BOTH) and name in constants and place < 2
            if is_weight and constants[name].dtype == np.float32:
                node.input[place] = weight_of(node, name)
        nodes.append(node)
        for name in node.output:
            if name in ends:
                map_of(name)
    for item in graph.output:
        item.name = renamed.get(item.name, item.name)
    ordered = list(nodes)
    del graph.node[:]
    graph.node.extend(ordered)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.producer_name, model.producer_version = "pytorch", "2.0.0"  # it reads no others


def channels(node: Any, rank: int) -> int | None:
    """The axis of a weight's output channels; None where one threshold serves all."""
    if node.op_type == "Gemm":
        return int(not any(item.name == "transB" and item.i for item in node.attribute))
    axis = WEIGHTED.get(node.op_type)
    return None if axis is None or rank < 2 else axis % rank
