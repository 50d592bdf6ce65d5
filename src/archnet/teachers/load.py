"""Where a trained teacher comes from: torchvision, timm, our own networks, anybody's factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from archnet.capture import CaptureError, answer, capture, only_result, unwrap
from archnet.errors import ArchnetError
from archnet.plugins import current_folder, first_line, imported
from archnet.teachers.nets import NETS
from archnet.teachers.transformer import Transformer
from archnet.tensors import DamagedError, read_tensors

# Keys under which training scripts nest the state dict, and prefixes that wrappers add to its
# names.
_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN_MISMATCHES = 5


Answers = Literal["classes", "pixels", "anything"]


class TeacherError(ArchnetError):
    """A teacher that cannot be built, filled with its weights, or trained."""


class TeacherSource(Protocol):
    """What is read of `teacher` to build it; `archnet.config.TeacherConfig` explains each key."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def factory(self) -> str | None: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...


def load_teacher(
    config: TeacherSource,
    *,
    num_classes: int | None,
    in_channels: int,
    image_size: int | tuple[int, int],
    answers: Answers = "classes",
) -> nn.Module:
    """The teacher in eval mode, its parameters frozen.

    Args:
        config: `teacher.name` of `teacher.source`, built with `teacher.kwargs` and filled with
            `teacher.weights`.
        num_classes: logits that the task expects; None: as many as the teacher has.
        in_channels: channels of the task's images.
        image_size: their side, or height and width, in pixels; one blank image is passed through
            to check all three.
        answers: what the task judges: scores of classes (B, K), of classes for every pixel
            (B, K, H, W), or anything.

    Raises:
        TeacherError: an unknown name, weights that do not fit (the first five mismatches are named)
            or cannot be read without executing code, weights or statistics that are not finite, or
            a result of another shape.
    """
    model = _build(config, num_classes, in_channels)
    if config.weights not in (None, "published"):
        fill(model, read_weights(Path(config.weights).expanduser()), config.weights)
    model.eval().requires_grad_(False)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_result(config.name, model, num_classes, (1, in_channels, height, width), answers)
    return model


def load_network(
    config: TeacherSource, example: Tensor, *, num_classes: int | None = None
) -> nn.Module:
    """A teacher with any inputs and results, in eval mode, its parameters frozen.

    Args:
        config: as of `load_teacher`.
        example: a batch of inputs (B, ...), which is passed through.
        num_classes: of a network that is built for a number of classes.

    Raises:
        TeacherError: as of `load_teacher`, or the network does not take the example.
    """
    channels = example.shape[1] if example.dim() > 1 else 1
    model = _build(config, num_classes, channels)
    if config.weights not in (None, "published"):
        fill(model, read_weights(Path(config.weights).expanduser()), config.weights)
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:  # whatever code of others raises
        raise TeacherError(
            f"teacher {config.name} does not accept the task's inputs, {tuple(example.shape)} with "
            f"the batch: {first_line(error)}"
        ) from error
    require_finite(config.name, model)
    return model


def load_translator(config: TeacherSource, *, vocabulary: int, positions: int) -> Transformer:
    """A translating teacher in eval mode, its parameters frozen.

    Args:
        config: `teacher`, with the arguments of `Transformer` in `teacher.kwargs`.
        vocabulary: tokens of the task's tokenizer.
        positions: longest sentence of the task, in tokens with the end mark.

    Raises:
        TeacherError: arguments that do not suit, or weights that do not fit.
    """
    if config.source != "archnet":
        raise TeacherError(
            f"teacher={config.name} does not translate: take transformer_base, transformer_small "
            "or transformer_tiny"
        )
    try:
        model = Transformer(vocabulary=vocabulary, positions=positions, **config.kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise TeacherError(
            f"teacher.kwargs={config.kwargs} do not suit {config.name}: {error}"
        ) from error
    if config.weights not in (None, "published"):
        fill(model, read_weights(Path(config.weights).expanduser()), config.weights)
        require_finite(config.name, model)
    return model.eval().requires_grad_(False)


def _build(config: TeacherSource, num_classes: int | None, in_channels: int) -> nn.Module:
    published = config.weights == "published"
    if config.source != "custom" and not published and num_classes is None:
        raise TeacherError(
            f"teacher={config.name} is built for a number of classes, and no image has a label: "
            "set task.num_classes"
        )
    if config.source == "torchvision":
        return _from_torchvision(config, published, num_classes)
    if config.source == "timm":
        return _from_timm(config, published, num_classes, in_channels)
    if published:
        raise TeacherError(
            f"teacher.weights=published: source {config.source} publishes none; "
            "name a file, or set teacher.train=true"
        )
    if config.source == "custom":
        return from_factory(config.factory or "", config.kwargs)
    if config.name not in NETS:
        raise TeacherError(
            f"teacher.name={config.name} is not among archnet's own: {', '.join(NETS)}"
        )
    try:
        return NETS[config.name](num_classes=num_classes, in_channels=in_channels, **config.kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise TeacherError(
            f"teacher.kwargs={config.kwargs} do not suit {config.name}: {error}"
        ) from error


def _from_torchvision(config: TeacherSource, published: bool, num_classes: int | None) -> nn.Module:
    from torchvision import models

    segmenters = models.list_models(module=models.segmentation)
    if config.name not in (*models.list_models(module=models), *segmenters):
        raise TeacherError(
            f"teacher.name={config.name} is no classifier and no segmenter of torchvision.models"
        )
    kwargs: dict[str, Any] = (
        {"weights": "DEFAULT"} if published else {"weights": None, "num_classes": num_classes}
    )
    if config.name in segmenters and not published:
        kwargs["weights_backbone"] = None  # which would be downloaded
    try:
        return models.get_model(config.name, **{**kwargs, **config.kwargs})
    except (URLError, OSError) as error:
        raise TeacherError(
            f"the published weights of {config.name} could not be downloaded ({error}): "
            "name a file that holds them, teacher.weights=<file>"
        ) from error


def _from_timm(
    config: TeacherSource, published: bool, num_classes: int | None, in_channels: int
) -> nn.Module:
    timm = import_timm()
    shape = {} if published else {"num_classes": num_classes, "in_chans": in_channels}
    try:
        return timm.create_model(config.name, pretrained=published, **{**shape, **config.kwargs})
    except (RuntimeError, OSError) as error:
        raise TeacherError(f"timm could not make {config.name}: {error}") from error


def import_timm() -> Any:
    """Import timm, which is an extra.

    Raises:
        TeacherError: it is missing.
    """
    try:
        import timm
    except ImportError as error:
        raise TeacherError(
            "teacher.source=timm needs the extra: pip install 'archnet[timm]'"
        ) from error
    return timm


def from_factory(
    factory: str, kwargs: Mapping[str, Any], key: str = "teacher.factory"
) -> nn.Module:
    """Build a network: call ``package.module:callable`` with ``kwargs``.

    As for `python -m`, modules in the folder that the command is called in can be imported.

    Args:
        factory: where the callable is.
        kwargs: its arguments.
        key: the option that named it, for errors.

    Raises:
        TeacherError: it cannot be imported, fails, or returns no network.
    """
    function = imported(factory, key, TeacherError)
    with current_folder():
        # Whatever code of others raises; its traceback is chained for who debugs it.
        try:
            model = function(**kwargs)
        except Exception as error:
            raise TeacherError(
                f"{key}={factory} failed for {kwargs}: {first_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise TeacherError(
            f"{key}={factory} returned {type(model).__name__}, not a torch.nn.Module"
        )
    return unwrap(model)


def _check_result(
    name: str,
    model: nn.Module,
    num_classes: int | None,
    shape: tuple[int, ...],
    answers: Answers,
) -> None:
    try:
        with torch.no_grad():
            logits = model(torch.zeros(shape))
    except Exception as error:  # whatever code of others raises
        raise TeacherError(
            f"teacher {name} does not accept the task's images, "
            f"{shape} (batch, channels, height, width): {first_line(error)}"
        ) from error
    try:
        scores = answer(logits)
        if scores is not logits and not isinstance(model, torch.jit.ScriptModule):
            model.register_forward_hook(only_result)
        if not scores.is_floating_point():
            # It ends with a decision; its scores are known to the captured network alone.
            scores = capture(model, torch.zeros(shape)).scores()(torch.zeros(shape))
    except CaptureError as error:
        raise TeacherError(f"teacher {name}: {error}") from error
    if not bool(scores.isfinite().all()):
        require_finite(name, model)
    found = tuple(scores.shape)
    pixels = shape[2:] if answers == "pixels" else ()
    classes = num_classes or (found[1] if len(found) > 1 and found[1] > 1 else "number of classes")
    wanted = ", ".join(map(str, (1, classes, *pixels)))
    if answers == "anything" or found == (1, classes, *pixels):
        return
    if answers == "pixels":
        raise TeacherError(
            f"teacher {name} answers {found} to one image of {pixels[0]}x{pixels[1]} pixels, and a "
            f"segmenter answers ({wanted}) logits: choose one with the task's classes, and let its "
            "forward scale its scores up to the image"
        )
    if num_classes is None:
        raise TeacherError(
            f"teacher {name} answers {found} to one image, and a classifier answers ({wanted}) "
            "logits"
        )
    raise TeacherError(
        f"teacher {name} answers {found} to one image, but the task needs ({wanted}) logits: "
        "choose one with the task's classes; where folders or a column are no classes, "
        "task.data.labels=ignore"
    )


def require_finite(name: str, model: nn.Module) -> None:
    """Refuse a network with a weight that is nan or infinite, or a variance below zero.

    Raises:
        TeacherError: naming the first tensor of that kind.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise TeacherError(
                f"teacher {name}: {key} has {bad:,} of {tensor.numel():,} values that are not "
                "finite (nan or inf): load the weights of another checkpoint"
            )
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise TeacherError(
                f"teacher {name}: {key} has a variance of {float(tensor.min()):.4g}, which no "
                "batch has: load the weights of another checkpoint"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in one that torch saved (.pt, .pth, .th).

    It may be nested under `state_dict`, `model_state_dict` or `model`, and its names may carry the
    prefix `module.` (data parallel) or `_orig_mod.` (compiled). Pickled code is never executed.

    Raises:
        TeacherError: a file that is missing or damaged, holds pickled objects, or holds no state
        dict.
    """
    if not path.is_file():
        raise TeacherError(f"teacher.weights={path} is not a file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    except DamagedError as error:
        raise TeacherError(
            f"teacher.weights={error}: save model.state_dict(), best as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise TeacherError(
            f"teacher.weights={path} cannot be read ({error}): fetch or save it again"
        ) from error
    return _unwrapped(content, path)


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    nest = next(
        (
            key
            for key in _NESTS
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ),
        None,
    )
    state = content[nest] if nest is not None else content
    if not isinstance(state, Mapping) or not any(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise TeacherError(f"teacher.weights={path} holds no state dict: save model.state_dict()")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fill(model: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Load a state dict whose names and shapes must be those of the network.

    Only batch counters, which inference never reads, may be missing.

    Raises:
        TeacherError: naming the first five tensors that are missing, unexpected or of another
        shape.
    """
    expected = model.state_dict()
    mismatches = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        if name in state
        else f"{name}: missing in the file"
        for name, tensor in expected.items()
        if (
            state[name].shape != tensor.shape
            if name in state
            else not name.endswith("num_batches_tracked")
        )
    ]
    mismatches += [f"{name}: not in the network" for name in state if name not in expected]
    if mismatches:
        shown = "; ".join(mismatches[:_SHOWN_MISMATCHES])
        raise TeacherError(
            f"teacher.weights={origin} do not fit the network, {len(mismatches)} mismatches: "
            f"{shown}: check teacher.name, teacher.kwargs and the number of classes"
        )
    model.load_state_dict(state, strict=False)
