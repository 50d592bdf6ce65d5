"""Networks of other packages, as factories for ``teacher.factory``."""

from torch import nn


def efficientnet_lite0() -> nn.Module:
    """The network of the package `efficientnet_lite_pytorch`, with random weights."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    return EfficientNet.from_name("efficientnet-lite0")
