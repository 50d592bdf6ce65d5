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
    elif _rounds_one_number(model):
        found["opencv"] = (
            "OpenCV 5.0 computes a QuantizeLinear of one number wrongly, without an error: a layer "
            "norm of a single row has its mean there, run such a file with another runtime"
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


def _rounds_one_number(model: onnx.ModelProto) -> bool:
    """Whether a tensor of one number for each sample is rounded."""
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    if not rounded:
        return False
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    for item in alone.graph.input:
        for batch in item.type.tensor_type.shape.dim[:1]:
            batch.dim_value = 1
    try:
        known = onnx.shape_inference.infer_shapes(alone).graph.value_info
    except Exception:  # of a file that is none; whoever loads it says so
        return False
    return any(
        item.name in rounded and all(dim.dim_value == 1 for dim in item.type.tensor_type.shape.dim)
        for item in known
    )
