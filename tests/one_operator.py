"""ONNX files of one operator between two convolutions, so that a tool says where it runs it."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NAME = "probe"
B, C, H, W = 1, 16, 8, 8
OPSET = 17
OPSETS = {"gelu": 20}  # the first that has it, where that is later

# Operator of a target -> (ONNX operator, attributes, shapes of constant inputs).
PLAIN = {
    "conv": ("Conv", {"kernel_shape": [5, 5], "pads": [2] * 4}, [(C, C, 5, 5)]),
    "conv3x3": ("Conv", {"kernel_shape": [3, 3], "pads": [1] * 4}, [(C, C, 3, 3)]),
    "conv1x1": ("Conv", {"kernel_shape": [1, 1]}, [(C, C, 1, 1)]),
    "depthwise_conv": (
        "Conv",
        {"kernel_shape": [3, 3], "pads": [1] * 4, "group": C},
        [(C, 1, 3, 3)],
    ),
    "conv_transpose": (
        "ConvTranspose",
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        [(C, C, 2, 2)],
    ),
    "maxpool": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}, []),
    "maxpool2x2": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, []),
    "averagepool": ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}, []),
    "mean": ("ReduceMean", {"axes": [2, 3], "keepdims": 1}, []),
    "reduce_max": ("ReduceMax", {"axes": [1], "keepdims": 1}, []),
    "reduce_min": ("ReduceMin", {"axes": [1], "keepdims": 1}, []),
    "reduce_sum": ("ReduceSum", {"keepdims": 1}, []),
    "softmax": ("Softmax", {"axis": 1}, []),
    "add": ("Add", {}, [(1, C, 1, 1)]),
    "sub": ("Sub", {}, [(1, C, 1, 1)]),
    "mul": ("Mul", {}, [(1, C, 1, 1)]),
    "div": ("Div", {}, [(1, C, 1, 1)]),
    "maximum": ("Max", {}, [(1, C, 1, 1)]),
    "minimum": ("Min", {}, [(1, C, 1, 1)]),
    "pow": ("Pow", {}, [()]),
    "exp": ("Exp", {}, []),
    "sqrt": ("Sqrt", {}, []),
    "abs": ("Abs", {}, []),
    "neg": ("Neg", {}, []),
    "gelu": ("Gelu", {"approximate": "none"}, []),
    "floor": ("Floor", {}, []),
    "sin": ("Sin", {}, []),
    "cos": ("Cos", {}, []),
    "sigmoid": ("Sigmoid", {}, []),
    "tanh": ("Tanh", {}, []),
    "hardsigmoid": ("HardSigmoid", {}, []),
    "hardswish": ("HardSwish", {}, []),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.1}, []),
    "prelu": ("PRelu", {}, [(C, 1, 1)]),
    "elu": ("Elu", {}, []),
    "softplus": ("Softplus", {}, []),
    "depth_to_space": ("DepthToSpace", {"blocksize": 2}, []),
    "space_to_depth": ("SpaceToDepth", {"blocksize": 2}, []),
    "instancenorm": ("InstanceNormalization", {}, [(C,), (C,)]),
    "batchnorm": ("BatchNormalization", {}, [(C,), (C,), (C,), (C,)]),
    "lrn": ("LRN", {"size": 3}, []),
}
GELU = "erf"  # stands for GELU as ONNX writes it: compilers know the whole
TOKENS = ("layernorm", "matmul", "fully_connected")  # on (B, H * W, C)


def model(operator: str) -> onnx.ModelProto:
    """(B, C, H, W) -> convolution -> the operator -> convolution, in float32."""
    rng = np.random.default_rng(0)
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    def floats(name: str, shape: tuple[int, ...]) -> str:
        # Positive: variances and divisors are among them.
        return constant(name, rng.uniform(0.1, 0.3, shape).astype(np.float32))

    nodes = [
        helper.make_node("Conv", ["x", floats("first", (C, 3, 1, 1))], ["c"], name="before"),
        helper.make_node("Relu", ["c"], ["m"], name="relu"),
    ]
    source, channels = "m", C
    if operator in TOKENS:
        flat = constant("flat", np.array([B, C, H * W], np.int64))
        square = constant("square", np.array([B, C, H, W], np.int64))
        nodes.append(helper.make_node("Reshape", ["m", flat], ["f"], name="flatten"))
        nodes.append(helper.make_node("Transpose", ["f"], ["t"], name="turn", perm=[0, 2, 1]))
        if operator == "layernorm":
            given = ["t", floats("gain", (C,)), floats("shift", (C,))]
            made = {"axis": -1, "epsilon": 1e-5}  # Rockchip's compiler knows no default of it
            nodes.append(helper.make_node("LayerNormalization", given, ["o"], name=NAME, **made))
        elif operator == "matmul":
            nodes.append(helper.make_node("MatMul", ["t", "f"], ["p"], name=NAME))
            nodes.append(helper.make_node("MatMul", ["p", "t"], ["o"], name=f"{NAME}2"))
        else:
            nodes.append(
                helper.make_node("MatMul", ["t", floats("weight", (C, C))], ["o"], name=NAME)
            )
        nodes.append(helper.make_node("Transpose", ["o"], ["u"], name="back", perm=[0, 2, 1]))
        nodes.append(helper.make_node("Reshape", ["u", square], ["z"], name="unflatten"))
    elif operator == GELU:
        one, half, root = (
            constant(name, np.array(value, np.float32))
            for name, value in (("one", 1), ("half", 0.5), ("root", 2**0.5))
        )
        nodes += [
            helper.make_node("Div", [source, root], ["d"], name=f"{NAME}1"),
            helper.make_node("Erf", ["d"], ["e"], name=NAME),
            helper.make_node("Add", ["e", one], ["a"], name=f"{NAME}2"),
            helper.make_node("Mul", [source, "a"], ["g"], name=f"{NAME}3"),
            helper.make_node("Mul", ["g", half], ["z"], name=f"{NAME}4"),
        ]
    elif operator == "concat":
        nodes.append(helper.make_node("Relu", ["x"], ["r"], name="other"))
        nodes.append(helper.make_node("Concat", [source, "r"], ["z"], name=NAME, axis=1))
        channels = C + 3
    else:
        kind, attributes, shapes = PLAIN[operator]
        given = [floats(f"k{index}", shape) for index, shape in enumerate(shapes)]
        if operator == "reduce_sum":
            given = [constant("axes", np.array([2, 3], np.int64))]
        nodes.append(helper.make_node(kind, [source, *given], ["z"], name=NAME, **attributes))
        channels = {"reduce_max": 1, "reduce_min": 1}.get(operator, C)
        channels = {"depth_to_space": C // 4, "space_to_depth": 4 * C}.get(operator, channels)
    last = floats("last", (4, channels, 1, 1))
    nodes.append(helper.make_node("Conv", ["z", last], ["y"], name="after"))
    graph = helper.make_graph(
        nodes,
        operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, 3, H, W])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opset = OPSETS.get(operator, OPSET)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    onnx.checker.check_model(made, full_check=True)
    return made


ALL = (*PLAIN, *TOKENS, GELU, "concat")
