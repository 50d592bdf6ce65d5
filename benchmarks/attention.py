"""What attention may become within five operators: forms side by side, on a teacher's attention.

    python benchmarks/attention.py outputs/cifar10/<run>

takes the teacher and the unlabelled images of a finished run, and for every attention of the
teacher what goes in and what comes out. Each form is fitted to a part of the images, then trained
on the same part by as many steps of Adam; its error |form - attention| / |attention| is taken on
images that had no part in either. A row a form, over all the teacher's attentions, goes to
``results/attention.csv``.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from record import append
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.convert import Approximation, convert
from archnet.convert.fit import attended, mixing, relative_error, ridge, rows
from archnet.runs import RunFolder
from archnet.runs.teacher import run_teacher
from archnet.tasks import ClassificationData
from archnet.teachers import load_teacher

HELD_OUT = 0.2  # share of the images that errors are taken on
HIDDEN = 32  # of the relation's features for each head; more take memory for every pair of tokens

Products = tuple[Tensor, Tensor, Tensor, Tensor]  # Q, K, V and Y of one attention: (B, H, N, d)


def listen(teacher: nn.Module, images: Tensor) -> list[Products]:
    """What every attention of the teacher is given on some images, and what it gives."""
    heard: list[Products] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = given(query, key, value, *args, **kwargs)
        heard.append((query, key, value, result))
        return result

    given = F.scaled_dot_product_attention
    # Without this nn.MultiheadAttention is one call that shows neither queries nor keys.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), patch.object(F, "scaled_dot_product_attention", attention):
        teacher(images)
    return heard


class Form(nn.Module):
    """A form of one attention, each head by itself; ``macs`` for one image."""

    def __init__(self, data: Products) -> None:
        super().__init__()
        value, wanted = data[2], data[3]
        self.heads, self.tokens, self.width = value.shape[1:]
        self.over_tokens = self.of_heads(
            [mixing(value[:, head], wanted[:, head]) for head in range(self.heads)]
        )
        self.macs = self.heads * self.tokens**2 * self.width

    def of_heads(self, matrices: Sequence[Tensor]) -> nn.Parameter:
        return nn.Parameter(torch.stack([matrix.float() for matrix in matrices]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.over_tokens @ value


class Mixing(Form):
    """y = A V: `convert.attention=mixing`."""


class Rectified(Form):
    """y = P [A V; A max([Q; K], 0)]: what tokens say of themselves, mixed as the values are."""

    def __init__(self, data: Products) -> None:
        super().__init__(data)
        with torch.no_grad():
            both = self.features(*data[:3])
        self.project = self.of_heads(
            [
                ridge(
                    rows(both[:, head], -1),
                    rows(data[3][:, head], -1),
                    torch.eye(self.width, both.shape[-1]),
                    1e-3,
                )
                for head in range(self.heads)
            ]
        )
        self.macs += self.heads * self.tokens * (2 * self.tokens + 3 * self.width) * self.width

    def features(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.over_tokens @ torch.cat([value, query.relu(), key.relu()], -1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.features(query, key, value) @ self.project.mT


class Relation(Form):
    """y = P [A V; max_j (U q_i + W [k_j; v_j])]: the translation student's, beside the mixing."""

    def __init__(self, data: Products) -> None:
        super().__init__(data)
        scale = 1 / math.sqrt(self.width)
        self.asks = nn.Parameter(torch.randn(self.heads, HIDDEN, self.width) * scale)
        self.offers = nn.Parameter(torch.randn(self.heads, HIDDEN, 2 * self.width) * scale)
        start = torch.eye(self.width, self.width + HIDDEN)
        self.project = nn.Parameter(start.repeat(self.heads, 1, 1))
        # Adding the two sides of a pair is not a multiplication.
        size = 3 * self.width * HIDDEN + (self.width + HIDDEN) * self.width
        self.macs += self.heads * self.tokens * size

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asks = query @ self.asks.mT
        offers = torch.cat([key, value], -1) @ self.offers.mT
        best = (asks[:, :, :, None] + offers[:, :, None]).amax(3)
        return torch.cat([self.over_tokens @ value, best], -1) @ self.project.mT


class Context(Form):
    """`convert.attention=context` (`archnet.convert.fit.attended`)."""

    def __init__(self, data: Products) -> None:
        super().__init__(data)
        fitted = [attended(*(x[:, head] for x in data)) for head in range(self.heads)]
        self.over_tokens = self.of_heads([head.weights for head in fitted])
        for name in ("offer", "answer", "result"):
            layers = [getattr(head, name) for head in fitted]
            setattr(self, name, self.of_heads([weight for weight, _ in layers]))
            setattr(self, f"{name}_bias", self.of_heads([bias[None] for _, bias in layers]))
        self.macs += self.heads * self.tokens * (self.tokens + 13 * self.width) * self.width

    def _layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        return cast(Tensor, x @ weight.mT + bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        offered = self._layer("offer", torch.cat([key, value], -1)).relu()
        received = torch.cat([self.over_tokens @ value, self.over_tokens @ offered, query], -1)
        answered = self._layer("answer", received).relu()
        return self._layer("result", torch.cat([received, answered], -1))


class Attention(nn.Module):
    """Attention alone, as a teacher."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Pairs(Form):
    """`convert.attention=pairs`, all of it constants (`archnet.convert.rules.pairs`)."""

    def __init__(self, data: Products) -> None:
        super().__init__(data)
        given = data[:3]
        form = Approximation("pairs")
        examples = tuple(x[:1] for x in given)
        self.student = convert(Attention(), examples, calibration=given, approximation=form)
        self.macs = sum(row.macs_after for row in self.student.report)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat(
            [
                self.student(*part)
                for part in zip(*(x.split(32) for x in (query, key, value)), strict=True)
            ]
        )


FORMS: dict[str, type[Form]] = {
    "mixing": Mixing,
    "rectified": Rectified,
    "relation": Relation,
    "context": Context,
    "pairs": Pairs,
}
FIXED = ("pairs",)  # without anything that is trained


def error(form: Form, data: Products) -> float:
    """On held-out images."""
    with torch.no_grad():
        return relative_error(form(*data[:3]), data[3])


def train(form: Form, data: Products, steps: int, seed: int) -> None:
    """Adam on the squared error, 32 images a step."""
    optimizer = torch.optim.Adam(form.parameters(), 3e-3)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(0, len(data[0]), (32,), generator=generator)
        query, key, value, wanted = (x[chosen] for x in data)
        loss = F.mse_loss(form(query, key, value), wanted) / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.step()


def main() -> None:
    """Measure every form and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, help="folder of a finished classification run")
    parser.add_argument("--images", type=int, default=1920, help="unlabelled, of the run's task")
    parser.add_argument("--steps", type=int, default=300, help="of each form of each attention")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = RunFolder.open(options.run)
    config = run.config()
    data = ClassificationData(config.task, config.seed)
    data.setup()
    task = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    teacher = run_teacher(
        config, run, data, lambda source: load_teacher(source, image_size=data.image_size, **task)
    )
    heard = listen(teacher, data.calibration_inputs(options.images))
    kept = round(options.images * (1 - HELD_OUT))
    for name in options.forms:
        kind = FORMS[name]
        began, fitted, trained, macs = time.monotonic(), [], [], 0
        for place, found in enumerate(heard):
            torch.manual_seed(place)
            part, rest = tuple(x[:kept] for x in found), tuple(x[kept:] for x in found)
            form = kind(cast(Products, part))
            fitted.append(error(form, cast(Products, rest)))
            if name not in FIXED:
                train(form, cast(Products, part), options.steps, place)
            trained.append(error(form, cast(Products, rest)))
            macs += form.macs
        row = {
            "task": config.task.name,
            "teacher": config.teacher.name,
            "metric": "relative_error",
            "form": name,
            "attentions": len(fitted),
            "macs": macs,
            "fitted": round(sum(fitted) / len(fitted), 3),
            "student_value": round(sum(trained) / len(trained), 3),
            "inputs_seen": 0 if name in FIXED else 32 * options.steps,
            "minutes": round((time.monotonic() - began) / 60, 2),
            "seed": config.seed,
            "command": shlex.join(["python", *sys.argv]),
        }
        print(append("attention", row), row)


if __name__ == "__main__":
    main()
