"""What a network is for: the data it sees and the figure it is judged by."""

from archnet.tasks.classification import ClassificationData
from archnet.tasks.images import TaskError
from archnet.tasks.sampling import StepBatchSampler

__all__ = ["ClassificationData", "StepBatchSampler", "TaskError"]
