"""A look at the teacher before anything is made of it: a wrong teacher makes a wrong student."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from archnet.config import Config
from archnet.errors import printable
from archnet.ops.scores import decisions
from archnet.tasks import ClassificationData

_log = logging.getLogger(__name__)

# Enough to tell a teacher from a guess, and a moment's work.
MOST_IMAGES = 1000
# Images a class from which another order of the classes is told from chance.
_PER_CLASS = 10


def look(
    config: Config,
    data: ClassificationData,
    teacher: nn.Module,
    device: torch.device,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the teacher on validation images and say so.

    A warning says where it is near chance, or its classes are named otherwise than the data's.

    Args:
        config: of the run.
        data: the task.
        teacher: gives class scores, (B, K); in eval mode.
        device: where it runs.
        names: of the teacher's classes in the order of its scores; empty: not known.

    Returns:
        ``accuracy`` in points, None without labels, how many ``images`` of which ``split``, and
        ``trouble``, what is wrong with the teacher's answers (None: nothing).
    """
    if difference := _named_otherwise(data.class_names, names):
        _log.warning("teacher %s: %s", config.teacher.name, difference)
    most = min(MOST_IMAGES, config.trainer.limit_eval or MOST_IMAGES)
    split, loader = data.look_loader()
    teacher = teacher.to(device)
    answers, labels, count = [], [], 0
    with torch.inference_mode():
        for images_BCHW, labels_B in loader:
            answers.append(teacher(images_BCHW.to(device)).cpu())
            labels.append(labels_B)
            count += len(labels_B)
            if count >= most:
                break
    teacher.cpu()
    scores_NC, labels_N = torch.cat(answers)[:most], torch.cat(labels)[:most]
    guesses_N, classes = decisions(scores_NC, 1), scores_NC.shape[1]
    labelled = bool((labels_N >= 0).all())
    facts: dict[str, Any] = {
        "accuracy": None,
        "images": len(labels_N),
        "split": split,
        "trouble": None,
    }
    if labelled and len(labels_N):
        facts["accuracy"] = round(100 * (guesses_N == labels_N).double().mean().item(), 4)
        _log.info(
            "teacher: accuracy %.2f %% on %s %s images (guessing: %.2f %%)",
            facts["accuracy"], f"{len(labels_N):,}", split, 100 / classes,
        )  # fmt: skip
    elif len(labels_N):
        _log.info(
            "teacher: its accuracy is not measured, because the %s images have no labels; the "
            "result will be how often the student agrees with it", split,
        )  # fmt: skip
    if trouble := _trouble(guesses_N, labels_N if labelled else None, classes, data.class_names):
        shown, facts["trouble"] = config.task.data, trouble
        _log.warning(
            "teacher %s %s. Images were made with task.data.image_size=%s, task.data.resize=%s, "
            "task.data.interpolation=%s, task.data.mean=%s, task.data.std=%s",
            config.teacher.name, trouble, shown.image_size, shown.resize,
            shown.interpolation or "bilinear", shown.mean, shown.std,
        )  # fmt: skip
    return facts


def _trouble(
    guesses_N: Tensor, labels_N: Tensor | None, classes: int, names: tuple[str, ...]
) -> str | None:
    """What is wrong with a teacher's answers, if anything is."""
    count = len(guesses_N)
    often, times = _often(guesses_N)
    if labels_N is None:
        if count >= 50 and times > 0.95 * count:
            return (
                f"predicts class {often} for {times} of {count} images: they may be prepared "
                "otherwise than in its training"
            )
        return None
    if not count:
        return None
    right = int((guesses_N == labels_N).sum())
    shares = [torch.bincount(x, minlength=classes)[:classes] / count for x in (guesses_N, labels_N)]
    # Of answers that know nothing of the image; more than 1 / classes where some are frequent.
    chance = max(1 / classes, float((shares[0] * shares[1]).sum()))
    margin = 3 * math.sqrt(chance * (1 - chance) / count)
    order = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "0, 1, ..."
    if (best := _reordered(guesses_N, labels_N, classes)) > right + 0.2 * count:
        return (
            f"is right on {right} of {count} images, and would be on {best} if its classes had "
            f"another order than those of the data ({order})"
        )
    if right / count > chance + margin:
        return None
    return (
        f"is right on {right} of {count} images, hardly more than guessing ({100 * chance:.2f} %): "
        "its training prepared images otherwise, its weights are not trained, or its classes "
        f"have another order than those of the data ({order})"
    )


def _named_otherwise(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """How the names of a teacher's classes contradict those of the data, if they do.

    Names of two vocabularies, such as words and WordNet numbers, say nothing of each other.
    """
    if not ours or not theirs:
        return None
    if len(ours) != len(theirs):
        return f"the data name {len(ours):,} classes and it names {len(theirs):,}"
    data, teacher = ([_plain(name) for name in names] for names in (ours, theirs))
    shared = set(data) & set(teacher)
    if 2 * len(shared) < len(data):
        return None
    moved = [i for i, name in enumerate(data) if name in shared and teacher[i] != name]
    if not moved:
        return None
    first = moved[0]
    return (
        f"numbers {len(moved):,} of {len(ours):,} classes otherwise than the data: class {first} "
        f"is {printable(ours[first], 60)} in the data and {printable(theirs[first], 60)} in the "
        "teacher; name the folders or labels so that their order is the teacher's"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _often(guesses_N: Tensor) -> tuple[int, int]:
    """The class that is given most often, and how often."""
    if not len(guesses_N):
        return 0, 0
    times = torch.bincount(guesses_N)
    return int(times.argmax()), int(times.max())


def _reordered(guesses_N: Tensor, labels_N: Tensor, classes: int) -> int:
    """How many images are right under the best order of the classes; 0 where too few tell."""
    if len(labels_N) < _PER_CLASS * classes or int(labels_N.max()) >= classes:
        return 0
    table = torch.bincount(labels_N * classes + guesses_N, minlength=classes * classes)
    square = table.view(classes, classes).numpy()
    return int(square[linear_sum_assignment(square, maximize=True)].sum())
