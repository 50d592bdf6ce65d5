"""Files that a tool takes and computes wrongly, without a word."""

from collections.abc import Mapping

import onnx

# Types of 2 and 4 bits, by their numbers in ONNX.
_NARROW = {getattr(onnx.TensorProto, name) for name in ("INT2", "UINT2", "INT4", "UINT4")}
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_LAYERS = ("Conv", "Gemm", "MatMul")


def doubts(model: onnx.ModelProto) -> Mapping[str, str]:
    """What tools are known to compute wrongly in a file: tool -> one line, what avoids it included.

    The tools are named as their bridges are. A tool that is not named may be wrong all the same.
    """
    found = {}
    graph = model.graph
    kinds = {item.name: item.data_type for item in graph.initializer}
    if any(
        kinds.get(name) in _NARROW
        for node in graph.node
        if node.op_type in _QUANTIZERS
        for name in node.input
    ):
        found["qnn"] = (
            "onnxruntime-qnn 2.7.0 computes types of 2 and 4 bits wrongly, without an error: "
            "export with form=qdq or form=subbyte"
        )
    writers = {name: node.op_type for node in graph.node for name in node.output}
    # It reads no types of 2 and 4 bits.
    if not _NARROW & set(kinds.values()) and any(
        writers.get(node.input[0]) in _LAYERS
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    ):
        found["opencv"] = (
            "OpenCV 5.0 computes a layer whose consumer is a QuantizeLinear wrongly, without an "
            "error: export with hardware.dialect.clip=always"
        )
    if any(
        writers.get(node.input[0]) == "DequantizeLinear"
        for node in graph.node
        if node.op_type == "ReduceMean"
    ):
        found["openvino"] = (
            "OpenVINO 2026.4 computes a ReduceMean whose producer is a DequantizeLinear wrongly, "
            "without an error: convert for a target without mean, or compile with "
            "LP_TRANSFORMS_MODE=NO"
        )
    return found
