"""What turns scores into probabilities or a decision is peeled; a softmax elsewhere stays."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archnet
from archnet.capture import capture

HEADS = {
    "softmax": lambda z: z.softmax(1),
    "softmax of the last axis": lambda z: F.softmax(z, -1),
    "log-softmax": lambda z: z.log_softmax(1),
    "logarithm of a softmax": lambda z: z.softmax(1).log(),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda z: z.sigmoid_(),
    "argmax": lambda z: z.argmax(1),
    "argmax of probabilities": lambda z: z.softmax(-1).argmax(-1),
    "argmax that keeps its axis": lambda z: z.argmax(1, keepdim=True).squeeze(1),
    "place of the maximum": lambda z: z.max(1).indices,
    "in double precision": lambda z: z.double().softmax(1),
}


class Headed(nn.Module):
    def __init__(self, classes: int, head) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes)
        )
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 6, 6)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", HEADS)
def test_a_last_softmax_sigmoid_or_argmax_is_peeled_and_said(name, classes, images, caplog):
    teacher = Headed(classes, HEADS[name]).eval()
    graph = capture(teacher, images[:1])
    with caplog.at_level(logging.INFO):
        student = archnet.convert(graph)
    with torch.no_grad():
        scores = teacher.body(images)
        torch.testing.assert_close(student(images), scores)
        torch.testing.assert_close(graph.scores()(images), scores)
        (conv,) = [node.name for node in graph.nodes if "conv" in node.operator]
        *_, found = graph.features([conv])(images)
    torch.testing.assert_close(found, scores)
    peeled = [row for row in student.report if row.rule == "peeled"]
    assert [row.operator for row in peeled] == [node.operator for node in graph.head]
    assert peeled
    assert all(row.exact for row in student.report)
    assert "the student returns the scores" in caplog.text


class Segmenting(nn.Module):
    """Its softmax stands before the last moves."""

    def __init__(self, head) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 1), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    ("head", "scores"),
    [
        (lambda z: z.softmax(1), lambda z: z),
        (lambda z: z.argmax(1), lambda z: z),
        (lambda z: z.mean((2, 3), True).softmax(1).flatten(1), lambda z: z.mean((2, 3))),
        (lambda z: z.mean((2, 3), True).softmax(1)[..., 0].squeeze(-1), None),
        (lambda z: (z.mean((2, 3)) / 2.5).softmax(1), lambda z: z.mean((2, 3)) / 2.5),
        (lambda z: z.mean((2, 3)).softmax(1).unsqueeze(1), lambda z: z.mean((2, 3))[:, None]),
    ],
    ids=["maps", "classes of pixels", "moves behind", "a slice behind", "temperature", "new axis"],
)
def test_heads_on_maps_and_in_front_of_moves(head, scores, images):
    teacher = Segmenting(head).eval()
    if scores is None:
        assert not capture(teacher, images).head
        return
    with torch.no_grad():
        expected = scores(teacher.conv(images))
        student = archnet.convert(teacher, images)
        torch.testing.assert_close(student(images), expected)
        torch.testing.assert_close(capture(teacher, images).scores()(images), expected)


@pytest.mark.parametrize(
    "head",
    [
        lambda z: z.sigmoid(),  # on maps: pixels
        lambda z: z * z.sigmoid(),
        lambda z: z.softmax(1) * 2,
        lambda z: z.softmax(0),  # over the samples
        lambda z: z.max(1).values,
        lambda z: z.relu(),
    ],
    ids=["pixels", "gate", "scaled", "over samples", "maximum", "relu"],
)
def test_what_is_no_head_stays(head, images):
    graph = capture(Segmenting(head).eval(), images)
    assert not graph.head


def test_a_softmax_of_the_input_has_no_scores(images):
    assert not capture(nn.Softmax(1), images).head
