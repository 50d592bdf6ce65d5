"""Teacher to graph of ATen operators, each with its module path."""

from archnet.capture.graph import (
    Batch,
    Features,
    Ref,
    TeacherGraph,
    TeacherNode,
    capture,
)
from archnet.capture.nodes import place, stem
from archnet.capture.simplify import CARRIERS
from archnet.capture.unwrap import (
    Inputs,
    answer,
    inputs_of,
    only_result,
    outputs_of,
    unwrap,
)
from archnet.errors import CaptureError

__all__ = [
    "CARRIERS",
    "Batch",
    "CaptureError",
    "Features",
    "Inputs",
    "Ref",
    "TeacherGraph",
    "TeacherNode",
    "answer",
    "capture",
    "inputs_of",
    "only_result",
    "outputs_of",
    "place",
    "stem",
    "unwrap",
]
