"""A network becomes a list of ATen operators, with paths, values and shapes, and is untouched."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archnet.capture import CaptureError, Ref, capture


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + x


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(Block(), nn.Sequential(Block(), nn.Dropout(0.5)))

    def forward(self, x):
        return self.stage(x).mean((2, 3))


class Rebound(nn.Module):
    """Reads x once more after it was rectified in place through a second name."""

    def forward(self, x):
        y = x * 2
        z = y
        y.relu_()
        return z + x


class TwoResults(nn.Module):
    def forward(self, x):
        return x, x + 1


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_nodes_have_operator_path_arguments_and_shape():
    graph = capture(Nested(), torch.zeros(4, 3, 8, 6))
    assert list(graph.inputs.values()) == [(3, 8, 6)]
    assert [(n.operator.split(".")[1], n.path) for n in graph.nodes] == [
        ("conv2d", "stage.0.conv"),
        ("batch_norm", "stage.0.bn"),
        ("relu", "stage.0"),
        ("add", "stage.0"),
        ("conv2d", "stage.1.0.conv"),
        ("batch_norm", "stage.1.0.bn"),
        ("relu", "stage.1.0"),
        ("add", "stage.1.0"),
        ("dropout", "stage.1.1"),
        ("mean", ""),
    ]
    conv = graph.nodes[0]
    assert conv.shape == (3, 8, 6)
    assert conv.arguments["padding"] == [1, 1]
    assert conv.arguments["groups"] == 1  # the schema's default, which the call left out
    assert isinstance(conv.arguments["weight"], torch.Tensor)
    assert graph.outputs[0] == graph.nodes[-1].name


def test_uses_count_readers_and_the_result():
    graph = capture(Nested(), torch.zeros(1, 3, 8, 8))
    uses = graph.uses()
    (image,) = graph.inputs
    assert uses[image] == 2  # the convolution and the shortcut
    assert uses[graph.outputs[0]] == 1
    assert graph.nodes[3].refs() == [graph.nodes[2].name, image]


def test_an_in_place_operator_rebinds_every_name_of_its_value():
    graph = capture(Rebound(), torch.zeros(1, 3))
    (image,) = graph.inputs
    double, rectified, total = graph.nodes
    assert rectified.operator == "aten.relu.default"
    assert rectified.arguments["self"] == Ref(double.name)
    assert total.arguments["self"] == Ref(rectified.name)
    assert total.arguments["other"] == Ref(image)


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_untouched(training):
    teacher = Nested().train(training)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    capture(teacher, torch.randn(2, 3, 8, 8))
    assert teacher.training is training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("batch", [1, 5])
def test_features_give_values_in_the_order_asked_at_any_batch(batch):
    teacher = Nested().eval()
    graph = capture(teacher, torch.randn(2, 3, 8, 8))
    late, early = graph.nodes[7].name, graph.nodes[0].name
    images = torch.randn(batch, 3, 8, 8)
    second, first, scores = graph.features([late, early])(images)
    torch.testing.assert_close(first, teacher.stage[0].conv(images))
    torch.testing.assert_close(second, teacher.stage(images))
    torch.testing.assert_close(scores, teacher(images))


class Constants(nn.Module):
    """Made of a literal, of an operator, and of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) * torch.tensor([1.0, 2.0]).repeat(2)[:, None, None]
        return x.view(x.shape[0], 2, -1) + torch.arange(2 * x.shape[2] * x.shape[3]).float()


def test_features_are_computed_where_they_are_moved_to():
    features = capture(Constants().eval(), torch.randn(1, 3, 5, 5)).features(["conv2d"])
    conv, result = features.to("meta")(torch.empty(3, 3, 5, 5, device="meta"))
    assert conv.device == result.device == torch.device("meta")
    assert result.shape == (3, 2, 50)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.relu(self.first(x))))


def test_features_that_move_leave_their_graph_where_it_is():
    graph, x = capture(Tied().eval(), torch.zeros(1, 4)), torch.randn(3, 4)
    (first,) = graph.features([])(x)
    moved = graph.features([]).double()
    assert torch.allclose(moved(x.double())[0], first.double(), atol=1e-5)
    assert {value.dtype for value in graph.program.state_dict.values() if value.dim()} == {
        torch.float32
    }
    assert torch.equal(graph.features([])(x)[0], first)
    assert sum(p.numel() for p in moved.parameters()) == 4 * 4 + 4 * (2 + 2)


def test_features_follow_from_maps_with_channels_last():
    teacher, x = Constants().eval(), torch.randn(3, 3, 5, 5)
    features = capture(teacher, x).features([]).to(memory_format=torch.channels_last)
    (result,) = features(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, teacher(x))


def test_a_gated_linear_unit_is_captured_as_its_parts():
    teacher, x = nn.Sequential(nn.Linear(4, 6), nn.GLU()).eval(), torch.randn(5, 4)
    graph = capture(teacher, x)
    assert [node.operator.split(".")[1] for node in graph.nodes if "aten" in node.operator] == [
        *("linear", "chunk", "sigmoid", "mul")
    ]
    assert {node.path for node in graph.nodes} == {"0", "1"}
    (gate,) = [node for node in graph.nodes if "sigmoid" in node.operator]
    found, result = graph.features([gate.name])(x)
    torch.testing.assert_close(found, teacher[0](x)[:, 3:].sigmoid())
    torch.testing.assert_close(result, teacher(x))


class Inside(nn.Module):
    """With a part under a context."""

    def __init__(self, context) -> None:
        super().__init__()
        self.context = context
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context():
            y = self.linear(x)
            z = y.relu()
        return y + self.linear(z)


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)], ids=["grad", "cast"]
)
def test_a_part_without_gradients_or_autocast_is_captured_as_any_other(context):
    teacher, x = Inside(context).eval(), torch.randn(5, 3)
    graph = capture(teacher, x)
    kinds = [node.operator.split(".")[1] for node in graph.nodes]
    assert kinds == ["linear", "relu", "linear", "add"]
    assert [node.path for node in graph.nodes] == ["linear", "", "linear", ""]
    found, result = graph.features([graph.nodes[1].name])(x)
    torch.testing.assert_close(found, teacher.linear(x).relu())
    torch.testing.assert_close(result, teacher(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x @ w[0]).softmax(1)[:, None] @ x,
        lambda x, w: (x @ w.mT).softmax(-1) - 1,
        lambda x, w: (x.mT @ (x * w)).div(2).softmax(-1).mT @ x.mT,
        lambda x, w: x.mT @ torch.bmm(x, x.mT + w[0, 0]).softmax(-1).swapaxes(1, 2),
    ],
    ids=["vector", "constant", "not at the end", "both"],
)
def test_products_around_a_softmax_stay_what_they_are(function):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, self.w)

    teacher, x = Attention().eval(), torch.randn(3, 4, 4)
    (result,) = capture(teacher, x).features([])(x)
    torch.testing.assert_close(result, teacher(x))


def test_a_part_in_another_precision_is_said():
    with pytest.raises(CaptureError, match="wrap_with_autocast"):
        capture(Inside(lambda: torch.autocast("cpu")), torch.zeros(1, 3))


def test_a_feature_that_does_not_exist_is_named():
    graph = capture(Nested(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(CaptureError, match="no node conv2d_9"):
        graph.features(["conv2d_9"])


def test_what_cannot_be_captured_is_said():
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Branching"):
        capture(Branching(), torch.ones(2, 3))


def test_several_results_are_several_outputs():
    graph = capture(TwoResults(), torch.ones(2, 3))
    assert graph.outputs == [*graph.inputs, graph.nodes[-1].name]
    assert graph.names == ["output_0", "output_1"]
    ours, theirs = graph.scores()(torch.ones(2, 3)), TwoResults()(torch.ones(2, 3))
    assert all(map(torch.equal, ours, theirs))
