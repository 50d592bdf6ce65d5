"""What a network is for: the data it sees and the figure it is judged by."""

from archnet.tasks.classification import ClassificationData
from archnet.tasks.corpus import EncodedText, decoded, read_lines
from archnet.tasks.images import TaskError
from archnet.tasks.sampling import StepBatchSampler
from archnet.tasks.tokenizer import Subwords, Tokenizer
from archnet.tasks.translation import TranslationData, scores

__all__ = [
    "ClassificationData",
    "EncodedText",
    "StepBatchSampler",
    "Subwords",
    "TaskError",
    "Tokenizer",
    "TranslationData",
    "decoded",
    "read_lines",
    "scores",
]
