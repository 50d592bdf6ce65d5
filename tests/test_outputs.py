"""Networks with several results, and results of every kind, from capture to the files."""

from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import archnet
from archnet.capture import capture
from archnet.convert import ConversionError
from archnet.deploy import parity, to_integers, verify
from archnet.distill import ArchDistillation, train
from archnet.errors import ArchnetError
from archnet.ops import Student
from archnet.ops.scores import loss
from archnet.quant import Recipe, quantize, settle, unquantize
from archnet.quant.attach import pack, unpack
from archnet.quant.sensitivity import sensitivity
from test_c_header import assert_same, needs_gcc
from test_distill import TRAINER, Data, Images, options
from test_tflite import differences


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Backbone(nn.Module):
    """Features of an image of 12 x 12 at half its size, and a head that makes results of them."""

    def __init__(self, head, **layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        )
        self.layers, self.head = nn.ModuleDict(layers), head

    def forward(self, x: torch.Tensor):
        return self.head(self.layers, self.stem(x))


class Tokens(nn.Module):
    """A class for every token (B, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


def two():
    """Class scores and a map of them."""
    return Backbone(
        lambda m, y: {"scores": m["fc"](y.mean((2, 3))), "map": m["conv"](y)},
        fc=nn.Linear(8, 5),
        conv=nn.Conv2d(8, 4, 1),
    )


def pixels():
    return Backbone(lambda m, y: OrderedDict(out=m["conv"](y)), conv=nn.Conv2d(8, 4, 3, 1, 1))


def detector():
    """A raw head: for two sizes, class scores and boxes of one trunk."""

    def head(m, y):
        small = m["down"](y).relu()
        levels = [m["trunk"](level).relu() for level in (y, small)]
        return [[m["scores"](level), m["boxes"](level)] for level in levels]

    return Backbone(
        head,
        down=nn.Conv2d(8, 8, 3, 2, 1),
        trunk=nn.Conv2d(8, 8, 3, 1, 1),
        scores=nn.Conv2d(8, 6, 1),
        boxes=nn.Conv2d(8, 4, 1),
    )


def features():
    """A value that is read further on, the sum of two, and a vector."""

    def head(m, y):
        z = m["conv"](y).relu()
        return {"early": y, "sum": y + z, "vector": m["fc"](z.flatten(1))}

    return Backbone(head, conv=nn.Conv2d(8, 8, 3, 1, 1), fc=nn.Linear(8 * 36, 3))


def parts():
    """Parts of one layer's result, and the same in another shape."""

    def head(m, y):
        z = m["conv"](y)
        return z[:, :2], z[:, 2:], z.flatten(2).transpose(1, 2)

    return Backbone(head, conv=nn.Conv2d(8, 6, 1))


def normed():
    """Results that end with a batch norm, and with a ReLU."""
    return Backbone(
        lambda m, y: (m["bn"](y), m["bn"](y).flatten(2), m["conv"](y).relu()),
        bn=nn.BatchNorm2d(8),
        conv=nn.Conv2d(8, 4, 1),
    )


NETWORKS = {
    "two": (two, {"scores": 1, "map": 1}),
    "pixels": (pixels, "auto"),
    "tokens": (Tokens, "auto"),
    "detector": (detector, None),
    "features": (features, None),
    "parts": (parts, None),
    "normed": (normed, None),
}


def images(name: str, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 5, 6) if name == "tokens" else torch.randn(count, 3, 12, 12)


def converted(name: str, hardware: str = "arch5"):
    """A teacher in eval mode, its student, and inputs."""
    network, classes = NETWORKS[name]
    teacher, x = network().eval(), images(name)
    return teacher, archnet.convert(teacher, x, hardware, classes=classes), x


def flat(result) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def decided(student: Student, count: int) -> int:
    graph = student.graph
    shapes = [graph.shapes[name] for name in graph.outputs]
    pairs = zip(shapes, graph.classes, strict=True)
    return sum(count * int(np.prod(s)) // (1, *s)[a] for s, a in pairs if a is not None)


@pytest.mark.parametrize("hardware", ["arch5", "rk3588"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_gives_what_its_teacher_gives(name, hardware):
    teacher, student, x = converted(name, hardware)
    with torch.no_grad():
        wanted, found = flat(teacher(x)), flat(student(x))
    assert len(found) == len(wanted) == len(student.graph.outputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert student.graph.error < 1e-5
    assert all(row.exact for row in student.report)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_give_what_the_student_gives(name, bits, tmp_path):
    _, student, x = converted(name)
    path = archnet.export(student, tmp_path / "float.onnx")
    assert parity(student, path, x).max_abs_diff < 1e-5
    quantize(student, Recipe(*bits), calibration=[x])
    settle(student)
    path = archnet.export(student, tmp_path / "student.onnx")
    assert [item.name for item in onnx.load(path).graph.output] == student.graph.output_names
    same = parity(student, path, x)
    assert (same.mismatches, same.count) == (0, decided(student, len(x)))
    assert same.relative_error < 1e-5
    assert archnet.audit(path).pure
    checks = {check.name: check for check in verify(student, x.numpy(), ["qdq", "subbyte"])}
    assert {check.bit_equal for check in checks.values()} == {1.0}
    assert checks["qdq"].decisions == same.count


@needs_gcc
@pytest.mark.parametrize("name", ["two", "detector", "features", "parts"])
def test_c_gives_all_results(name, tmp_path):
    _, student, x = converted(name)
    quantize(student, Recipe(4, 4), calibration=[x])
    settle(student)
    model = to_integers(student)
    assert_same(model, x.numpy(), tmp_path)


@pytest.mark.parametrize("name", ["two", "detector", "parts"])
def test_tflite_gives_all_results(name):
    _, student, x = converted(name)
    quantize(student, Recipe(8, 8), calibration=[x])
    assert differences(student, x).max() <= 1


@pytest.mark.parametrize("name", ["two", "detector", "features"])
def test_a_student_is_packed_and_unquantized_with_its_results(name):
    _, student, x = converted(name)
    before = flat(student(x))
    quantize(student, Recipe(4, 4), calibration=[x])
    again = unpack(pack(student))
    assert again.graph == student.graph
    assert all(map(torch.equal, flat(again(x)), flat(student(x))))
    back = flat(unquantize(student)(x))
    for ours, theirs in zip(back, before, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_student_file_of_before_is_read():
    _, student, x = converted("pixels")
    quantize(student, Recipe(8, 8), calibration=[x])
    old = pack(student)
    graph = old["architecture"]
    (graph["output"],), (graph["output_range"],) = graph.pop("outputs"), graph.pop("output_ranges")
    del graph["classes"], graph["output_names"]
    again = unpack(old)
    assert again.graph.classes == [1]
    assert again.graph.output_ranges == student.graph.output_ranges
    assert torch.equal(again(x), student(x))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"outputs": ["other"]}, "its result other is no value of it"),
        ({"outputs": []}, "each needs a name of its own"),
        ({"output_names": ["one", "one"]}, "each needs a name of its own"),
        ({"classes": [1, 4]}, "has its classes along axis 4, of 3 axes"),
        ({"classes": [1, "map"]}, "has its classes along axis map"),
    ],
)
def test_a_student_file_with_damaged_results_is_one_line(damage, message):
    _, student, _ = converted("two")
    with pytest.raises(ArchnetError, match=message):
        Student.from_spec({**student.spec(), **damage})


def test_the_last_layers_of_all_results_keep_their_width():
    _, student, x = converted("detector")
    quantize(student, Recipe(2, 3, first_bits=8, last_bits=8), calibration=[x])
    model = to_integers(student)
    by_name = {step.name: step for step in model.steps}
    assert len(model.outputs) == 4
    for name in model.outputs:
        step = by_name[name]
        assert (step.weight_bits, model.grids[step.inputs[0]].bits) == (8, 8)
    narrow = [s for s in model.steps if s.weight is not None and s.weight_bits == 2]
    assert len(narrow) == 4  # in the stem, the trunk at two sizes, and between these


def test_every_result_counts_in_sensitivity():
    _, student, x = converted("two")
    from archnet.quant.attach import insert_activations

    insert_activations(student)
    heads = list(student.graph.outputs)
    found = sensitivity(student, [x], dict.fromkeys(heads, (2, 8)))
    for name in heads:
        assert found[name][2] > found[name][8] >= 0


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("two", {"mask": 1}, "classes names 'mask', and the results are scores, map"),
        ("two", 2, r"classes=2 is no axis of the result 'scores' \(B, 5\)"),
        ("pixels", 0, r"classes=0 is no axis of the result 'out' \(B, 4, 6, 6\) beside its batch"),
    ],
)
def test_classes_that_cannot_be_are_one_line(name, classes, message):
    with pytest.raises(ConversionError, match=message):
        archnet.convert(NETWORKS[name][0]().eval(), images(name), classes=classes)


@pytest.mark.parametrize("alone", [True, False])
def test_an_input_that_is_a_result_is_given_as_it_is_read(alone, tmp_path):
    teacher, x = two(), images("two")
    teacher.forward = lambda x: x if alone else (x, teacher.stem(x).flatten(1))
    student = archnet.convert(teacher.eval(), x)
    path = archnet.export(student, tmp_path / "float.onnx")
    assert parity(student, path, x).max_abs_diff < 1e-5
    quantize(student, Recipe(8, 8), calibration=[x])
    assert verify(student, x.numpy(), ["qdq"])[-1].bit_equal == 1


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_scores_that_are_enlarged_stay_exact_in_integers(factor, bits):
    """The weights of a bilinear enlargement are on their grids, and are not trained."""
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Upsample(scale_factor=factor, mode="bilinear"),
    )
    x = images("pixels")
    student = archnet.convert(teacher.eval(), x)
    floats = {n: m.weight.detach().clone() for n, m in student.operators.items() if "fc" in n}
    assert len(floats) == 2  # over rows, and over columns
    assert not any(student.operator(name).trainable for name in floats)
    quantize(student, Recipe(*bits), calibration=[x])
    for name, weight in floats.items():
        module = student.operator(name)
        torch.testing.assert_close(
            module.weight_quantizer(module.weight), weight, rtol=1e-6, atol=0
        )
    classifier = student.operator("conv2d_1_conv")
    assert classifier.weight_quantizer.bits == 8  # it is the last layer that is trained
    settle(student)
    assert verify(student, x.numpy(), ["qdq"])[-1].bit_equal == 1


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_segmenters_of_torchvision_convert(name):
    from torchvision.models import segmentation

    build = getattr(segmentation, name)
    teacher = build(weights=None, weights_backbone=None, num_classes=5).eval()
    for module in teacher.modules():  # so that values keep their size up to the end
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    x = torch.randn(1, 3, 64, 64)
    student = archnet.convert(teacher, x, "rk3588")
    assert (student.graph.output_names, student.graph.classes) == (["out"], [1])
    assert all(row.exact for row in student.report)
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x)["out"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", ["joint", "local"])
def test_every_result_is_distilled(schedule, tmp_path, monkeypatch):
    """Class scores by their divergence, a map without classes by its unexplained variance."""
    teacher, x = two().eval(), Images().images
    graph = capture(teacher, x[:2])
    student = archnet.convert(graph, calibration=x, classes={"scores": 1})
    quantize(student, Recipe(2, 3, first_bits=3, last_bits=3), calibration=[x])
    features = graph.features([tap.node for tap in student.taps])
    assert student.graph.classes == [1, None]

    def far() -> list[float]:
        with torch.no_grad():
            theirs, ours = graph.scores()(x), student.eval()(x)
        pairs = zip(ours, theirs, student.graph.classes, strict=True)
        return [float(loss("kl", a, b, axis)) for a, b, axis in pairs]

    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        ArchDistillation, "log_dict", lambda self, values, **_: logged.update(values)
    )
    monkeypatch.setattr(ArchDistillation, "_tell", lambda self, losses, _: logged.update(losses))
    before = far()
    config = options(schedule, steps=20, val_every=10)
    train(features, student, Data(), config, trainer=TRAINER, folder=tmp_path)
    assert all(after < least for after, least in zip(far(), before, strict=True))
    assert {"logits/scores", "logits/map", "val/agreement/scores"} <= logged.keys()
    assert "val/accuracy" in logged  # the labels are of the one result with classes
    assert "val/agreement/map" not in logged
