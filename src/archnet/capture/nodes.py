"""What the passes of this room ask of a node of `torch.export`'s graph."""

from typing import Any

import torch
from torch.fx import Node


def stem(operator: object) -> str:
    """What an operator is called without overload and underscores: ``aten.relu_.default``, relu."""
    return str(operator).removeprefix("aten.").split(".")[0].strip("_")


def named_arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operator by the names in its schema, defaults among them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): item for index, item in enumerate(node.args)}
    named = {item.name: item.default_value for item in schema.arguments}
    named.update(zip(list(named), node.args, strict=False))
    return {**named, **node.kwargs}


def module_path(node: Node) -> str:
    """The path of the module that ran an operator; of the network itself, nothing."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def place(path: str) -> str:
    """Where a message says that an operator of a module is."""
    return f"at '{path}'" if path else "in the network itself"


def is_assertion(node: Node) -> bool:
    """Whether a node checks a tensor's type, as the export has seen it, and computes nothing."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default
