"""Networks in wrappings, inputs and results of many kinds, and numbers that are none."""

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import archnet
from archnet.capture import CaptureError, capture
from archnet.errors import ArchnetError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*layers).eval()


class Body(nn.Module):
    """A network with a forward of its own."""

    def __init__(self, forward=lambda m, x: m.body(x), body=None) -> None:
        super().__init__()
        self.body, self.function = body or network(), forward

    def forward(self, x: torch.Tensor):
        return self.function(self, x)


def assert_same(student: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = network()(inputs[0])
    torch.testing.assert_close(student(*inputs), expected, rtol=tolerance, atol=tolerance)


# Networks -----------------------------------------------------------------------------------


class Starred(Body):
    def forward(self, *x):
        return self.body(x[0])


class Keyword(Body):
    def forward(self, *, pixels):
        return self.body(pixels)


class Optional(Body):
    def forward(self, x=None, labels=None):
        return self.body(x)


def compiled_in_place() -> nn.Module:
    teacher = network()
    teacher.compile()
    return teacher


def normed(module: nn.Module) -> nn.Module:
    """After one run its weight is the result of operators."""
    body = network()
    body[4] = torch.nn.utils.weight_norm(body[4])
    teacher = Body(body=body).eval()
    teacher(X)
    return teacher


WRAPPED = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda m: nn.DataParallel(torch.compile(m)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "inside": lambda m: Body(body=nn.DataParallel(m)),
    "compiled inside": lambda m: Body(body=torch.compile(m)),
    "compiled in place": lambda m: compiled_in_place(),
    "any number of inputs": lambda m: Starred(),
    "by keyword": lambda m: Keyword(),
    "with defaults": lambda m: Optional(),
    "weight norm": normed,
    "scripted": torch.jit.script,
    "traced": lambda m: torch.jit.trace(m, X),
    "frozen": lambda m: torch.jit.freeze(torch.jit.script(m)),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wraps_a_network_is_taken_off(kind):
    teacher = WRAPPED[kind](network())
    mode = getattr(teacher, "training", False)
    student = archnet.convert(teacher, X[:1])
    assert_same(student, X)
    assert getattr(teacher, "training", False) is mode
    # A frozen script has no module left.
    assert {"0", "body.0"} & {row.path for row in student.report} or kind == "frozen"


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_script_from_a_file(tmp_path):
    torch.jit.save(torch.jit.script(network()), str(tmp_path / "a.pt"))
    assert_same(archnet.convert(torch.jit.load(str(tmp_path / "a.pt")), X[:1]), X)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda x: x, "a function, not a torch.nn.Module"),
        (lambda: network().state_dict(), "load_state_dict"),
        (lambda: "net.pt", "the path 'net.pt'"),
        (lambda: nn.ReLU, "the class ReLU, not an instance of it"),
        (lambda: 3, "a int, not a torch.nn.Module"),
        (lambda: torch.export.export(network(), (X,)), "exported from"),
        (lambda: network().to("meta"), "0.weight has no values yet"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "1.weight has no values yet"),
        (lambda: Body(body=torch.jit.script(network())), "body is TorchScript"),
    ],
)
def test_what_is_no_network_is_one_line(make, message):
    with pytest.raises(CaptureError, match=message) as caught:
        archnet.convert(make(), X[:1])
    assert "\n" not in str(caught.value)


# Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_networks_of_other_floats_are_converted_in_float32(weights, inputs):
    teacher = network().to(weights)
    student = archnet.convert(teacher, X[:1].to(inputs))
    with torch.no_grad():
        torch.testing.assert_close(student(X), copy.deepcopy(teacher).float()(X))
    assert teacher[0].weight.dtype is weights


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.body(x.half()).float(),
        lambda m, x: m.body(x.to(m.body[0].weight.dtype)),
        lambda m, x: m.body(x.to(dtype=torch.float16)).double(),
        lambda m, x: m.body[4](m.body[3](m.body[2](m.body[1](m.body[0](x.type(torch.float16)))))),
    ],
)
def test_a_forward_that_casts_is_converted_in_float32(forward):
    student = archnet.convert(Body(forward, network().half()), X[:1])
    assert_same(student, X, tolerance=1e-2)


def test_bytes_are_converted_where_the_network_itself_does_it():
    scaled = Body(lambda m, x: m.body(x.float() / 255))
    images = (X * 40 + 128).clamp(0, 255).to(torch.uint8)
    student = archnet.convert(scaled, images[:1])
    torch.testing.assert_close(student(images.float()), scaled(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(CaptureError, match=r"uint8 at '0', but on float32.*/ 255"):
        archnet.convert(network(), images[:1])


# Inputs -------------------------------------------------------------------------------------


class Shifted(Body):
    def forward(self, x, *, offset):
        return self.body(x) + 0 * offset


@pytest.mark.parametrize(
    ("teacher", "given"),
    [
        (network(), [X]),
        (network(), X.numpy()),
        (network(), {"input": X}),
        (network(), X.double().requires_grad_()),
        (Keyword(), {"pixels": X}),
        (Shifted(), (X, X[:, 0, 0, :1])),
        (Shifted(), {"x": X, "offset": X[:, 0, 0, :1].numpy()}),
    ],
    ids=["list", "array", "by name", "double", "keyword", "two", "two by name"],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_inputs_are_taken_as_they_come(teacher, given, calibrated):
    student = archnet.convert(teacher, given, calibration=given if calibrated else None)
    inputs = [X, X[:, 0, 0, :1]][: len(student.graph.inputs)]
    assert_same(student, *inputs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "example_inputs is empty"),
        (X[:0], r"example_inputs of shape \(0, 3, 8, 8\) holds no sample"),
        (torch.tensor(1.0), "holds no sample"),
        ("photo.png", "example_inputs is a str"),
        ([[1.0, 2.0]], "is a list"),
        ((X, None), r"example_inputs\[1\] is a NoneType"),
        ({"x": X}, r"has 'x', which Sequential\.forward\(input\) does not take"),
        ((X, X), r"are 2 tensors, but Sequential\.forward\(input\) takes 1"),
        (np.array(["a"]), "an array of <U1"),
        (X.to("meta"), "is a meta tensor"),
        (X.to_sparse(), "sparse_coo tensor"),
        (X.to(torch.complex64), "complex64"),
        (X * torch.nan, "example_inputs has values that are not finite"),
        (torch.zeros(2, 3, 9, 9), r"\(2, 3, 9, 9\) float32: .* at '4'"),
        (torch.zeros(2, 4, 8, 8), r"\(2, 4, 8, 8\) float32: .*4 channels instead at '0'"),
        (torch.zeros(2, 8, 8), r"\(2, 8, 8\) float32: .* at '0'"),
    ],
)
def test_inputs_that_cannot_be_are_one_line(given, message):
    with pytest.raises(CaptureError, match=message) as caught:
        archnet.convert(network(), given)
    assert "\n" not in str(caught.value)
    assert "branches" not in str(caught.value)


def test_inputs_that_lack_one_name_it():
    with pytest.raises(CaptureError, match=r"lack offset of Shifted\.forward\(x, \*, offset\)"):
        archnet.convert(Shifted(), X)


def test_calibration_that_is_not_finite_is_named():
    calibration = X.clone()
    calibration[2, 0, 0, 0] = torch.inf
    with pytest.raises(ArchnetError, match="calibration has values that are not finite"):
        archnet.convert(network(), X[:1], calibration=calibration)


# Results ------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    hidden: object = None


class Plain:
    def __init__(self, logits) -> None:
        self.logits, self.loss = logits, None


Named = namedtuple("Named", "logits")
Both = namedtuple("Both", "logits aux")

RESULTS = {
    "dataclass": Output,
    "mapping": lambda y: {"logits": y, "loss": None},
    "ordered": lambda y: OrderedDict(logits=y),
    "named tuple": Named,
    "tuple": lambda y: (y,),
    "list": lambda y: [y],
    "object": Plain,
    "nested": lambda y: {"out": (Output(y, []),)},
    "twice": lambda y: {"logits": y, "prediction": y},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_the_one_tensor_of_a_result_is_taken(kind):
    teacher = Body(lambda m, x: RESULTS[kind](m.body(x)))
    student = archnet.convert(teacher, X[:1])
    assert_same(student, X)
    torch.testing.assert_close(capture(teacher, X).scores()(X), student(X), rtol=1e-4, atol=1e-5)


SEVERAL = {
    "mapping": (lambda y: {"logits": y, "aux": y + 1}, ["logits", "aux"]),
    "named tuple": (lambda y: Both(y, y + 1), ["logits", "aux"]),
    "tuple": (lambda y: (y, y + 1), ["output_0", "output_1"]),
    "numbers": (lambda y: {0: y, "0": y + 1}, ["output_0", "output_0_"]),
    "nested": (lambda y: Output(y, [y * 2]), ["logits", "hidden_0"]),
    "a head": (lambda y: {"logits": y, "aux": y * 2, "probs": y.softmax(1)}, ["logits", "aux"]),
    "heads": (lambda y: {"class": y.argmax(1), "probs": y.softmax(1), "aux": -y}, ["class", "aux"]),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_results_are_named(kind):
    result, names = SEVERAL[kind]
    teacher = Body(lambda m, x: result(m.body(x)))
    graph = capture(teacher, X)
    student = archnet.convert(graph)
    assert student.graph.output_names == names
    with torch.no_grad():
        found, wanted = student(X), graph.scores()(X)
    assert len(found) == len(wanted) == len(names)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    has_head = kind in ("a head", "heads")
    assert student.graph.classes == ([1, None] if has_head else [None, None])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda y: None, "returns None, in which there is no tensor"),
        (lambda y: 3.0, "returns a float"),
        (lambda y: (y, torch.ones(3)), "result 'output_1' does not depend on its input"),
    ],
)
def test_a_result_that_is_none_is_one_line(result, message):
    with pytest.raises(CaptureError, match=message):
        archnet.convert(Body(lambda m, x: result(m.body(x))), X[:1])


# Failures -----------------------------------------------------------------------------------


def raising(m, x):
    raise ValueError("of its own")


@pytest.mark.parametrize(
    ("forward", "message", "branches"),
    [
        (lambda m, x: m.body(x) if x.sum() > 0 else x, r"in <lambda> at test_unwrap\.py", True),
        (lambda m, x: torch.from_numpy(m.body(x).numpy()), "cannot capture Body.*numpy", False),
        (raising, "does not run on a batch of .*of its own", False),
        (lambda m, x: m.body(x.view(1, 3, 8, 8)), "runs on one sample and not on two", False),
        (lambda m, x: m.body(x) * x.amax((1, 2, 3))[0].item(), "makes a Python number", False),
        (lambda m, x: m.body(x)[:, : int(x[0, 0, 0, 0])], "makes a number", True),
        (lambda m, x: m.body(x)[m.body(x) > 0], "depends on values", False),
    ],
)
def test_each_failure_has_a_reason_of_its_own(forward, message, branches):
    with pytest.raises(CaptureError, match=message) as caught:
        capture(Body(forward), X)
    assert ("branches" in str(caught.value)) is branches
    assert "\n" not in str(caught.value)


# Numbers that are none ----------------------------------------------------------------------


class Read(nn.Module):
    """With a parameter, a buffer and a constant, of which some are read."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.body, self.function = network(), forward
        self.scale, self.mask = nn.Parameter(torch.ones(10)), nn.Buffer(torch.ones(10))
        self.table = torch.ones(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.body(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.weight", "4.weight"]
)
def test_a_weight_or_statistic_that_is_not_finite_is_named(name, value):
    teacher = network()
    teacher.state_dict()[name].flatten()[1] = value
    with pytest.raises(CaptureError, match=rf"{name} has 1 of .* not finite"):
        archnet.convert(teacher, X[:1])


@pytest.mark.parametrize(
    ("forward", "name"),
    [(lambda m, y: y * m.scale, "scale"), (lambda m, y: y + m.mask, "mask")],
)
def test_tensors_count_where_they_are_read(forward, name):
    broken, unread = Read(forward), Read(lambda m, y: y)
    for teacher in (broken, unread):
        with torch.no_grad():
            getattr(teacher, name)[3] = torch.nan
    with pytest.raises(CaptureError, match=f"teacher's {name} has 1 of 10"):
        archnet.convert(broken, X[:1])
    assert_same(archnet.convert(unread, X[:1]), X)


def test_constants_count_as_well():
    teacher = Read(lambda m, y: y * m.table)
    teacher.table[0] = torch.nan
    with pytest.raises(CaptureError, match="table has 1 of 10"):
        archnet.convert(teacher, X[:1])


def test_a_mask_may_hold_minus_infinity():
    teacher = Read(lambda m, y: (y + m.mask).softmax(1)[:, :9] * 2)
    with torch.no_grad():
        teacher.mask[3] = -torch.inf
    assert capture(teacher, X)
    with torch.no_grad():
        teacher.mask[3] = torch.inf
    with pytest.raises(CaptureError, match="mask has 1 of 10"):
        capture(teacher, X)


@pytest.mark.parametrize(("variance", "fits"), [(-5e-6, True), (-1e-5, False), (-0.1, False)])
def test_a_variance_below_zero_is_named_where_the_root_has_none(variance, fits):
    teacher = network()
    teacher[1].running_var[0] = variance
    if fits:
        assert_same(capture(network(), X).scores(), X)
        archnet.convert(teacher, X[:1])
        return
    with pytest.raises(CaptureError, match=r"1\.running_var has a variance of -"):
        archnet.convert(teacher, X[:1])
