"""Small pictures as text, for pages that are one file."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 96  # pixels of the longer side


def png(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W, C) of 1 or 3 channels, made small, as PNG in base64."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
