"""What a network is for: the data it sees and the figure it is judged by.

The names below are imported on first use: `archnet.tasks.check` looks at data before torch loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.errors import TaskError
    from archnet.tasks.classification import ClassificationData
    from archnet.tasks.corpus import EncodedText, decoded, read_lines
    from archnet.tasks.sampling import StepBatchSampler
    from archnet.tasks.segmentation import SegmentationData
    from archnet.tasks.tokenizer import Subwords, Tokenizer
    from archnet.tasks.translation import TranslationData, scores

__all__ = [
    "ClassificationData",
    "EncodedText",
    "SegmentationData",
    "StepBatchSampler",
    "Subwords",
    "TaskError",
    "Tokenizer",
    "TranslationData",
    "decoded",
    "read_lines",
    "scores",
]

_FILES = {
    "ClassificationData": "archnet.tasks.classification",
    "EncodedText": "archnet.tasks.corpus",
    "SegmentationData": "archnet.tasks.segmentation",
    "StepBatchSampler": "archnet.tasks.sampling",
    "Subwords": "archnet.tasks.tokenizer",
    "TaskError": "archnet.errors",
    "Tokenizer": "archnet.tasks.tokenizer",
    "TranslationData": "archnet.tasks.translation",
    "decoded": "archnet.tasks.corpus",
    "read_lines": "archnet.tasks.corpus",
    "scores": "archnet.tasks.translation",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'archnet.tasks' has no attribute {name!r}")
    value = getattr(import_module(_FILES[name]), name)
    globals()[name] = value
    return value
