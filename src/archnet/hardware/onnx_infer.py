"""What is known of the values of an ONNX graph before it runs: shapes, types and small constants.

Shapes come from ONNX's own inference, node by node. Arithmetic on sizes is computed beside it (by
ONNX's reference implementation), as the inference looks at the values of some inputs, such as the
bounds of a Pad or the shape of a Reshape, and computes only a few of them itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, TypeProto, defs, helper, numpy_helper, shape_inference

from archnet.hardware.onnx_file import AuditError
from archnet.hardware.onnx_inputs import Shape, check_size, check_type

# Values of more elements are not computed: they are weights, not sizes.
MAX_VALUES, MAX_FLOATS = 2**16, 64
# Stands in a value for a size that only a run knows; fits into INT32.
UNKNOWN = -2_000_000_011
# These copy numbers and compute none, so that an unknown size may be among them.
# fmt: off
_COPIES = frozenset((
    "Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze",
))
_ARITHMETIC = _COPIES | frozenset((
    "Abs", "Add", "And", "Ceil", "ConstantOfShape", "CumSum", "Div", "Equal", "Expand",
    "Flatten", "Floor", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Pad", "Pow",
    "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "ScatterElements", "ScatterND",
    "Sign", "Sqrt", "Sub", "Tile", "Transpose", "Trilu", "Where", "Xor",
))
# fmt: on
QUANT_DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
MICROSOFT = "com.microsoft"
# Operators of ONNX Runtime whose result has the shape of one of ONNX's, on some of their inputs.
_LIKE: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "FusedConv": ("Conv", (0, 1, 2)),
    "FusedGemm": ("Gemm", (0, 1, 2)),
    "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "QGemm": ("Gemm", (0, 3)),
    "QuantizeLinear": ("QuantizeLinear", (0, 1, 2)),
    "DequantizeLinear": ("DequantizeLinear", (0, 1, 2)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearSigmoid": ("Identity", (0,)),
    "QLinearLeakyRelu": ("Identity", (0,)),
    "QLinearSoftmax": ("Identity", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "Gelu": ("Identity", (0,)),
    "FastGelu": ("Identity", (0,)),
    "QuickGelu": ("Identity", (0,)),
    "BiasGelu": ("Identity", (0,)),
}


class Inference:
    """Types and small constants of values, as nodes are shown to it in the order of the graph.

    Attributes:
        types: of every value that has one.
        values: of small constants, by name; `UNKNOWN` where a size is not known.
        problems: why nothing is known of a node's results, by its first output.
    """

    def __init__(self, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
        self.opsets = [item for item in opsets if item.domain not in ("", "ai.onnx")]
        version = max(
            (item.version for item in opsets if item.domain in ("", "ai.onnx")), default=1
        )
        self.opsets.append(helper.make_opsetid("", version))
        self._versions = {item.domain: item.version for item in self.opsets}
        self.types: dict[str, TypeProto] = {}
        self.values: dict[str, NDArray[Any]] = {}
        self.partial: set[str] = set()
        self.problems: dict[str, str] = {}
        self._data: dict[str, TensorProto] = {}
        self._evaluators: dict[Any, Any] = {}
        self._schemas: dict[tuple[str, str], defs.OpSchema | None] = {}

    def declare(self, name: str, element_type: int, shape: Shape | None) -> None:
        """State what a value is."""
        check_type(name, element_type)
        check_size(name, shape or ())
        self.types[name] = helper.make_tensor_type_proto(element_type, shape)

    def constant(self, tensor: TensorProto, name: str = "") -> None:
        """Take in a stored tensor, and its numbers where they are few and in the file."""
        name = name or tensor.name
        dims = tuple(tensor.dims)
        self.declare(name, tensor.data_type, dims)
        if math.prod(dims) > MAX_VALUES or tensor.data_location == TensorProto.EXTERNAL:
            return
        try:
            value = np.asarray(numpy_helper.to_array(tensor))
        except Exception:  # Whatever NumPy says of data that does not fit its type.
            self.problems.setdefault(name, "its data do not fit its shape")
            return
        self._know(name, value)

    def shape(self, name: str) -> Shape | None:
        """The shape of a value; None where its rank is not known."""
        found = self.types.get(name)
        if found is None or not found.tensor_type.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in found.tensor_type.shape.dim
        )

    def element_type(self, name: str) -> int:
        """The element type of a value; 0 where it is not known."""
        found = self.types.get(name)
        return found.tensor_type.elem_type if found is not None else 0

    def visit(self, node: onnx.NodeProto) -> None:
        """Learn what a node's results are."""
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            self._constant_node(node)
            return
        for name, found in self._infer(node).items():
            if not name:
                continue
            if found.HasField("tensor_type"):
                check_type(name, found.tensor_type.elem_type)
            self.types[name] = found
            self._checked(node, name)
        self._reshape_partly(node)
        self._evaluate(node)

    def merge(self, node: onnx.NodeProto, branches: Sequence[Sequence[str]]) -> None:
        """State the results of an If: what its branches, which give these values, agree in."""
        for output, *names in zip(node.output, *branches, strict=False):
            if not output or not all(name in self.types for name in names):
                continue
            shapes = [self.shape(name) for name in names]
            kinds = {self.element_type(name) for name in names}
            if len(kinds) != 1 or any(shape is None for shape in shapes):
                continue
            if len({len(shape or ()) for shape in shapes}) == 1:
                sizes = zip(*(shape or () for shape in shapes), strict=True)
                agreed = tuple(some[0] if len(set(some)) == 1 else None for some in sizes)
                self.declare(output, kinds.pop(), agreed)

    def _checked(self, node: onnx.NodeProto, name: str) -> None:
        try:
            check_size("its result", self.shape(name) or ())
        except AuditError as error:
            raise AuditError(
                f"node {node.name or name} ({node.op_type}): {error}: "
                "the inputs are too small or too large for it"
            ) from None

    def _constant_node(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        for item in node.attribute:
            if item.type == onnx.AttributeProto.TENSOR:
                self.constant(item.t, name)
            elif item.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
                single = item.type == onnx.AttributeProto.FLOAT
                self._store(name, np.array(item.f if single else item.floats, np.float32))
            elif item.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
                single = item.type == onnx.AttributeProto.INT
                self._store(name, np.array(item.i if single else item.ints, np.int64))
            elif item.type == onnx.AttributeProto.SPARSE_TENSOR:
                kind = item.sparse_tensor.values.data_type
                self.declare(name, kind, tuple(item.sparse_tensor.dims))

    def _store(self, name: str, value: NDArray[Any]) -> None:
        self.declare(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        self._know(name, value)

    def _know(self, name: str, value: NDArray[Any]) -> None:
        most = MAX_FLOATS if value.dtype.kind == "f" else MAX_VALUES
        if value.dtype.kind in "iufb" and value.size <= most:
            self.values[name] = value

    def _tensor(self, name: str) -> TensorProto | None:
        """A known value as the inference takes it."""
        if name in self.partial or name not in self.values:
            return None
        if name not in self._data:
            self._data[name] = numpy_helper.from_array(self.values[name], name)
        return self._data[name]

    def _schema(self, operator: str, domain: str, version: int) -> defs.OpSchema | None:
        key = operator, domain
        if key not in self._schemas:
            try:
                self._schemas[key] = defs.get_schema(operator, version, domain)
            except defs.SchemaError:
                self._schemas[key] = None
        return self._schemas[key]

    def _infer(self, node: onnx.NodeProto) -> dict[str, TypeProto]:
        if any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute):
            return {}
        standard = node.domain in ("", "ai.onnx")
        domain = "" if standard else node.domain
        if not standard and not (node.input and node.output):
            return {}
        if node.domain in QUANT_DOMAINS:
            found = self.types.get(node.input[0])
            return {node.output[0]: found} if found is not None else {}
        if domain == MICROSOFT:
            return self._infer_like(node)
        if domain not in self._versions:
            return {}
        schema = self._schema(node.op_type, domain, self._versions[domain])
        return self._call(schema, node, node.output[0]) if schema is not None else {}

    def _infer_like(self, node: onnx.NodeProto) -> dict[str, TypeProto]:
        """Results of an operator of ONNX Runtime."""
        stated = {item.name: item for item in node.attribute}
        if node.op_type == "MatMulNBits" and {"K", "N"} <= set(stated):
            shape = self.shape(node.input[0])
            if not shape:
                return {}
            kind = self.element_type(node.input[0])
            sizes = (*shape[:-1], stated["N"].i)
            return {node.output[0]: helper.make_tensor_type_proto(kind, sizes)}
        if node.op_type in ("FusedMatMul", "TransposeMatMul"):
            return self._fused_matmul(node)
        if node.op_type not in _LIKE:
            return {}
        operator, places = _LIKE[node.op_type]
        schema = defs.get_schema(operator)
        names = [node.input[place] for place in places if place < len(node.input)]
        like = helper.make_node(operator, names, node.output[:1])
        like.attribute.extend(item for name, item in stated.items() if name in schema.attributes)
        return self._call(schema, like, node.output[0])

    def _fused_matmul(self, node: onnx.NodeProto) -> dict[str, TypeProto]:
        stated = {item.name: item.i for item in node.attribute}
        if stated.get("transBatchA") or stated.get("transBatchB") or len(node.input) < 2:
            return {}
        operands = []
        for index, key in enumerate(("transA", "transB")):
            shape = self.shape(node.input[index])
            if shape is None:
                return {}
            if stated.get(key) and len(shape) > 1:
                shape = (*shape[:-2], shape[-1], shape[-2])
            operands.append(shape)
        kind = self.element_type(node.input[0])
        types = {
            name: helper.make_tensor_type_proto(kind, shape)
            for name, shape in zip("ab", operands, strict=True)
        }
        like = helper.make_node("MatMul", ["a", "b"], node.output[:1])
        return self._call(defs.get_schema("MatMul"), like, node.output[0], types)

    def _call(
        self,
        schema: defs.OpSchema,
        node: onnx.NodeProto,
        label: str,
        types: Mapping[str, TypeProto] | None = None,
    ) -> dict[str, TypeProto]:
        if types is None:
            # Of another domain's results nothing is known; most of them are floats.
            guess = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
            types = {name: self.types.get(name, guess) for name in node.input if name}
        data = {name: item for name in node.input if name and (item := self._tensor(name))}
        if not _fits(node, self.shape(node.input[0]) if node.input else None):
            self.problems[label] = "its axis is beyond its input"
            return {}
        try:
            return shape_inference.infer_node_outputs(
                schema, node, dict(types), data, None, self.opsets
            )
        except Exception as error:  # Those of onnx and of protobuf have no common base.
            self.problems[label] = (str(error).strip().splitlines() or ["it does not fit"])[0]
            return {}

    def _reshape_partly(self, node: onnx.NodeProto) -> None:
        """The shape of a Reshape to sizes of which some are not known."""
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            return
        target = self.values.get(node.input[1])
        if target is None or node.input[1] not in self.partial or target.ndim != 1:
            return
        before = self.shape(node.input[0])
        sizes: list[int | None] = []
        for index, size in enumerate(target.tolist()):
            if size == 0 and before is not None and index < len(before):
                sizes.append(before[index])
            else:
                sizes.append(size if size > 0 else None)
        kind = self.element_type(node.input[0]) or TensorProto.FLOAT
        self.declare(node.output[0], kind, tuple(sizes))

    def _evaluate(self, node: onnx.NodeProto) -> None:
        """Compute a node on known values, where that gives few numbers."""
        if node.domain not in ("", "ai.onnx"):
            return
        if node.op_type in ("Shape", "Size"):
            self._measure(node)
            return
        names = [name for name in node.input if name]
        if node.op_type not in _ARITHMETIC or not names:
            return
        if not all(name in self.values for name in names):
            return
        partial = any(name in self.partial for name in names)
        if partial and (node.op_type not in _COPIES or not self._stays_integer(node)):
            return
        # NonZero gives no more numbers than it reads; the rest must be known to be small.
        if node.op_type != "NonZero":
            for name in node.output:
                shape = self.shape(name)
                if shape is None or None in shape:
                    return
                if math.prod(size or 0 for size in shape) > MAX_VALUES:
                    return
        try:
            with np.errstate(all="ignore"):
                found = self._evaluator(node).run(
                    None,
                    {f"i{index}": self.values[name] for index, name in enumerate(names)},
                )
        except Exception:  # It is written in Python, and says what it likes of odd values.
            return
        for name, value in zip(filter(None, node.output), found, strict=False):
            array = np.asarray(value)
            if node.op_type == "NonZero":
                self._store(name, array)
            elif self.shape(name) == array.shape:
                self._know(name, array)
                if partial:
                    self.partial.add(name)

    def _stays_integer(self, node: onnx.NodeProto) -> bool:
        kinds = (TensorProto.INT32, TensorProto.INT64)
        return all(self.element_type(name) in kinds for name in node.output)

    def _measure(self, node: onnx.NodeProto) -> None:
        shape = self.shape(node.input[0])
        if shape is None:
            return
        if node.op_type == "Size":
            if None not in shape:
                self._store(node.output[0], np.array(math.prod(s or 0 for s in shape), np.int64))
            return
        stated = {item.name: item.i for item in node.attribute}
        part = shape[stated.get("start", 0) : stated.get("end", len(shape))]
        sizes = [UNKNOWN if size is None else size for size in part]
        self._store(node.output[0], np.array(sizes, np.int64))
        if None in part:
            self.partial.add(node.output[0])

    def _evaluator(self, node: onnx.NodeProto) -> Any:
        from onnx.reference import ReferenceEvaluator

        stated = b"".join(
            item.SerializeToString() for item in sorted(node.attribute, key=lambda item: item.name)
        )
        key = (node.op_type, tuple(map(bool, node.input)), len(node.output), stated)
        if key not in self._evaluators:
            places = iter(range(len(node.input)))
            names = [f"i{next(places)}" if name else "" for name in node.input]
            outputs = [f"o{index}" if name else "" for index, name in enumerate(node.output)]
            copy = helper.make_node(node.op_type, names, outputs)
            copy.attribute.extend(node.attribute)
            graph = helper.make_graph(
                [copy],
                "sizes",
                [onnx.ValueInfoProto(name=name) for name in names if name],
                [onnx.ValueInfoProto(name=name) for name in outputs if name],
            )
            self._evaluators[key] = ReferenceEvaluator(graph, opsets={"": self._versions[""]})
        return self._evaluators[key]


def _fits(node: onnx.NodeProto, shape: Shape | None) -> bool:
    """Whether an axis lies within the first input; the native code writes past its end if not."""
    if node.op_type not in ("LayerNormalization", "RMSNormalization") or shape is None:
        return True
    axis = next((item.i for item in node.attribute if item.name == "axis"), -1)
    return -len(shape) <= axis < len(shape)
