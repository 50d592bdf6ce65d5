"""How the features of a tap are compared while training; nothing here is deployed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.ops.scores import unexplained


class TeacherAttention(nn.Module):
    """Teacher Attention Mechanism (arXiv 2111.01135, section 3.2): u = a * s, channel by channel.

    a = 2 sigmoid(W2 relu(W1 mean(t))) with a bottleneck of C / 24 channels, from the teacher's
    feature t (B, C, ...) or (B, ..., C). The factor 2 and a W2 of zeros let the gate start at one,
    so that an exact student starts with no loss; the published gate starts near one half.
    """

    def __init__(self, channels: int, channels_last: bool = False) -> None:
        super().__init__()
        narrow = max(4, channels // 24)
        self.reduce, self.expand = nn.Linear(channels, narrow), nn.Linear(narrow, channels)
        self.channels_last = channels_last
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Gate the student's feature; both (B, C, H, W), or (B, T, C) with channels last."""
        axis = -1 if self.channels_last else 1
        axes = [d for d in range(1, teacher.dim()) if d != axis % teacher.dim()]
        gate = 2 * torch.sigmoid(self.expand(F.relu(self.reduce(teacher.mean(axes)))))
        if self.channels_last:
            return student * gate.reshape(len(gate), *[1] * len(axes), -1)
        return student * gate.reshape(*gate.shape, *[1] * len(axes))


class ResidualAdaptation(nn.Module):
    """Residual Feature Adaptation (arXiv 2111.01135, section 3.3): f = g(u) + s.

    g is conv1x1, conv3x3, conv1x1 for maps (B, C, H, W) and three linear layers d, d/16, d/16, d
    for tokens (B, T, d). The inner width is C / 8 (at least 8), so that the layers cost a few per
    cent of a block; the last layer starts at zero, so that f = s at the start.
    """

    def __init__(self, channels: int, channels_last: bool = False) -> None:
        super().__init__()
        narrow = max(8, channels // (16 if channels_last else 8))
        if channels_last:
            layers: list[nn.Module] = [
                nn.Linear(channels, narrow),
                nn.ReLU(),
                nn.Linear(narrow, narrow),
                nn.ReLU(),
                nn.Linear(narrow, channels),
            ]
        else:
            layers = [
                nn.Conv2d(channels, narrow, 1),
                nn.ReLU(),
                nn.Conv2d(narrow, narrow, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(narrow, channels, 1),
            ]
        self.layers = nn.Sequential(*layers)
        last = layers[-1]
        assert isinstance(last, nn.Linear | nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, gated: Tensor, student: Tensor) -> Tensor:
        return self.layers(gated) + student


class TapComparison(nn.Module):
    """The loss of one tap: MSE(f, t) / variance(t).

    Divided by the variance of the teacher's feature, the losses of all taps are shares of
    unexplained variance, whatever the scale of the features; one learning rate serves them all.
    """

    def __init__(self, shape: tuple[int, ...], attention: bool, adaptation: bool) -> None:
        super().__init__()
        channels_last = len(shape) != 3
        channels = shape[-1] if channels_last else shape[0]
        self.attention = TeacherAttention(channels, channels_last) if attention else None
        self.adaptation = ResidualAdaptation(channels, channels_last) if adaptation else None

    def forward(self, student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
        """Scalar loss of features of one shape, (B, C, H, W) or (B, T, C).

        Positions of (B, T, C) where ``real`` (B, T) is false do not count.
        """
        if self.attention is None and self.adaptation is None:
            return unexplained(student, teacher, real)
        if real is not None:
            student, teacher = (x.masked_fill(~real[..., None], 0.0) for x in (student, teacher))
        feature = student if self.attention is None else self.attention(student, teacher)
        if self.adaptation is not None:
            feature = self.adaptation(feature, student)
        return unexplained(feature, teacher, real)
