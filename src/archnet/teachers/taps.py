"""What a translating teacher gives at the modules that a student is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TappedTeacher(nn.Module):
    """A Transformer that gives the results of some of its modules as well.

    Args:
        teacher: frozen, in eval mode.
        paths: of the modules.
    """

    def __init__(self, teacher: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.teacher, self.paths = teacher, list(paths)

    def forward(
        self, source: Tensor, target: Tensor, pad: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Results by path, and the scores (B, T, V)."""
        found: dict[str, Tensor] = {}

        def keeper(path: str) -> Any:
            return lambda module, inputs, result: found.__setitem__(path, result)

        hooks = [
            self.teacher.get_submodule(path).register_forward_hook(keeper(path))
            for path in self.paths
        ]
        try:
            with torch.no_grad():
                scores = self.teacher(source, target, pad.bool())
        finally:
            for hook in hooks:
                hook.remove()
        return found, scores
