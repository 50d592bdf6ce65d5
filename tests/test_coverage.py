"""`archnet coverage`: rows and pages; and networks as people write them, from torch to ONNX."""

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archnet
from archnet.cli import main
from archnet.commands.coverage import isolated
from archnet.convert import ConversionError
from archnet.convert.feature import Value
from archnet.convert.rules import RULES, Rule
from archnet.convert.rules.base import Site
from archnet.coverage import Coverage, Spent, measure, page
from archnet.deploy import load_session
from archnet.errors import ArchnetError


class Running(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


NETWORKS = f"""
from torch import nn

{inspect.getsource(Running)}

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(144, 5))

def odd():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink(), nn.Sequential(Running()),
                         nn.Hardshrink())

def none():
    return 5
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the command, as a user has it."""
    (tmp_path / "their_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "their_networks"


def test_a_network_of_ones_own(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", f"{networks}:plain", "input=3x8x8", "output=page.md"]) == 0
    out = capsys.readouterr().out
    assert "exactly" in out
    (line,) = [line for line in Path("page.md").read_text().splitlines() if ":plain |" in line]
    cells = dict(zip(head(Path("page.md").read_text()), line.split(" | "), strict=True))
    assert cells["converts"] == "exactly"
    assert (cells["nodes"], cells["exact"], cells["approximate"]) == ("5", "5", "0")
    assert cells["MACs"] == "1.00"
    assert cells["pure"] == "yes"
    assert float(cells["error"].rstrip(" |")) < 1e-4


def head(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("| family")]
    return line.removesuffix(" |").split(" | ")


def test_every_operator_without_a_rule_is_named(
    networks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coverage", f"model={networks}:odd", "input=3x8x8"]) == 1
    out = capsys.readouterr().out
    assert "no rule for aten.hardshrink.default at '1'" in out
    assert "`aten.hardshrink.default`: 2 nodes without a rule, first at '1'" in out
    assert "`aten.cumsum.default`: 1 node without a rule, first at '2.0'" in out


def test_the_error_names_all_of_them_too() -> None:
    network = nn.Sequential(nn.Hardshrink(), Running(), Running())
    with pytest.raises(ConversionError, match=r"at '0'.*; also without a rule: aten\.cumsum\.d"):
        archnet.convert(network, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["their_networks:nothing"], "model=their_networks:nothing cannot be imported"),
        (["their_networks:none"], "returned int, not a torch.nn.Module"),
        (["their_networks"], "write package.module:callable"),
        (["their_networks:plain", "input=3x0"], "input=3x0: write sizes without the batch"),
        (["their_networks:plain", "input=wide"], "input=wide: write sizes without the batch"),
        (["their_networks:plain", "families=vgg"], "exclude each other"),
        (["hardware=arch6"], "hardware=arch6 is not one of"),
        (["jobs=0"], "jobs=0 must be at least 1"),
        (["families=resnett"], "families=resnett is not one of them; nearest: resnet"),
    ],
)
def test_what_is_impossible_is_one_line(
    networks: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coverage", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_input_that_does_not_fit_stops_the_row() -> None:
    row = measure(nn.Linear(4, 2).eval(), [(3,)], "arch5", name="narrow")
    assert row.converts == "no"
    assert "Linear does not run on a batch of (2, 3)" in row.stopped


def test_a_rule_that_is_not_as_exact_as_it_says_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shifted(site: Site) -> Value:
        return site.builder.activation(site.feature("self"), 0.1, 1e9)

    operator = "aten.relu.default"
    monkeypatch.setitem(RULES, operator, Rule("relu", (operator,), shifted))
    row = measure(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), [(4,)], "arch5")
    assert row.converts == "no"
    assert "the student differs from the teacher" in row.stopped


def test_a_page_counts_and_keeps_what_stopped() -> None:
    rows = [
        Coverage("A", "a", ((3, 8, 8),), nodes=4, exact=4, approximate=0),
        Coverage("B", "b", ((3, 8, 8),), 4, 3, 1, {"`aten.gelu.default` (gelu)": 1}),
        Coverage("C", "c", ((3, 8, 8),), missing={"aten.erf.default": ["x", "y"]}, stopped="why"),
    ]
    text = page(rows, "arch5", "in 3 minutes", ["deit_tiny: no timm"])
    assert "Of 3 published networks 1 convert exactly, 1 with approximations and 1 not" in text
    assert "in 3 minutes; archnet" in text
    assert "Left out: deit_tiny: no timm." in text
    approximate, stops = text.split("## Where it stops")
    assert "- **b**\n  - `aten.gelu.default` (gelu): 1 node\n" in approximate
    assert "- **c**: why\n  - `aten.erf.default`: 2 nodes without a rule, first at 'x'\n" in stops


def test_a_process_that_dies_or_fails_loses_only_itself() -> None:
    assert isolated(divmod, 7, 2) == (3, 1)
    with pytest.raises(ArchnetError, match="died with exit code 3"):
        isolated(os._exit, 3)
    with pytest.raises(ArchnetError, match="ZeroDivisionError"):
        isolated(divmod, 7, 0)


def _memory_of_a_conversion() -> tuple[float, float | None]:
    """MB of a teacher of linear layers, and the most that its conversion held beside it."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    network, x = nn.Sequential(*layers).eval(), torch.zeros(1, 2048)
    archnet.convert(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4))  # loads torch.export
    with Spent() as spent:
        archnet.convert(network, x)
    return sum(p.nbytes for p in network.parameters()) / 2**20, spent.peak_mb


def test_conversion_holds_at_most_twice_the_teacher() -> None:
    # In a process of its own: in this one, what other tests freed and left counts as well.
    teacher_mb, peak_mb = isolated(_memory_of_a_conversion)
    if peak_mb is None:
        pytest.skip("only Linux tells the peak of a process's memory")
    assert peak_mb <= 2 * teacher_mb


# Networks as people write them --------------------------------------------------------------


class Functional(nn.Module):
    """Bare parameters and calls: no module of torch.nn inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.gamma, self.beta = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("variance", torch.rand(6) + 0.5)
        self.matrix = nn.Parameter(torch.randn(5, 6) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.kernel, padding=1)
        y = F.relu(F.batch_norm(y, self.mean, self.variance, self.gamma, self.beta))
        y = F.avg_pool2d(torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(y, 2)], 1), 2)[:, 3:9]
        return F.linear(y.mean((2, 3)), self.matrix)


class Branch(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"left": nn.Conv2d(4, 4, 3, padding=1), "right": inner})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.inner["left"](x) + self.inner["right"](x))


def nested() -> nn.Module:
    inner: nn.Module = nn.Conv2d(4, 4, 1)
    for _ in range(3):
        inner = nn.Sequential(Branch(inner))
    return nn.Sequential(nn.ModuleList([nn.Conv2d(3, 4, 3, 2)])[0], inner, nn.Flatten(),
                         nn.Linear(36, 5))  # fmt: skip


class TwoInputs(nn.Module):
    """An image and a vector of what else is known about it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.known = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(7, 6)
        self.out = nn.Linear(10, 5)

    def forward(self, image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        pooled = F.relu(self.conv(image)).mean((2, 3))
        return self.out(torch.cat([pooled, F.relu(self.known(known))], 1))


class Shared(nn.Module):
    """One layer, norm and head for three sizes of the same image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, scores = self.stem(x), 0.0
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
            scores = scores + self.head(x.mean((2, 3)))
            x = F.max_pool2d(x, 2)
        return scores


class DynamicBatch(nn.Module):
    """Reads its batch size and uses it wherever torch takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, rows, columns = x.shape
        y = F.relu(self.conv(x)).view(batch, 2, 2, rows - 2, columns - 2)
        y = F.max_pool2d(y.reshape(batch, 4, rows - 2, -1), 2)
        return self.out(y.view(y.size(0), -1))


class Video(nn.Module):
    """Looks at every frame by itself, frames joined with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        )
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.frame(x.flatten(0, 1)).view(x.shape[0], -1))


IMAGE = (3, 8, 8)


@pytest.mark.parametrize("hardware", ["arch5", "arch5_conv"])
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (Functional, [IMAGE]),
        (nested, [IMAGE]),
        (TwoInputs, [IMAGE, (7,)]),
        (Shared, [IMAGE]),
        (DynamicBatch, [IMAGE]),
        (Video, [(4, *IMAGE)]),
    ],
)
def test_networks_as_people_write_them(make, shapes, hardware, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = make().eval()
    student = archnet.convert(teacher, tuple(torch.zeros(2, *s) for s in shapes), hardware)
    assert all(row.exact for row in student.report)
    path = archnet.export(student, tmp_path / "student.onnx", form="float")
    audit = archnet.audit(path, hardware)
    assert audit.pure, audit.violations
    session = load_session(path)
    names = [entry.name for entry in session.get_inputs()]
    for batch in (1, 3, 7):
        inputs = [torch.randn(batch, *shape) for shape in shapes]
        with torch.no_grad():
            expected, ours = teacher(*inputs), student(*inputs)
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        (written,) = session.run(None, feed)
        scale = expected.norm()
        assert expected.shape == (batch, 5)
        assert (ours - expected).norm() <= 1e-4 * scale
        assert (torch.from_numpy(written) - expected).norm() <= 1e-4 * scale
