"""Piecewise-linear functions: a batch norm and a clip for each segment (exact)."""

import torch

from archnet.lower.draft import Draft, Parts
from archnet.lower.registry import Result, lowering
from archnet.ops import BatchNorm, Segments


@lowering(Segments)
def batch_norms(op: Segments, inputs: tuple[str, ...], draft: Draft) -> Result:
    """A batch norm for each segment, whose bounds are clips."""
    names = []
    for weight, bias in zip(op.weight.detach(), op.bias.detach(), strict=True):
        with torch.device("meta" if draft.is_dry else draft.device):
            norm = BatchNorm(op.channels)
        if not draft.is_dry:
            with torch.no_grad():
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)
                norm.running_var.fill_(1 - norm.eps)
        names.append(draft.emit("bn", norm.requires_grad_(False), *inputs))
    return Parts(tuple(names), 1, tuple(op.heights))
