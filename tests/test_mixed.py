"""Widths of their own for every layer: what they are chosen by, and that all else takes them."""

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import milp
from torch import nn

from archnet import report
from archnet.compose import compose
from archnet.config import Config
from archnet.convert import convert
from archnet.deploy import audit, export, parity, to_integers
from archnet.errors import ConfigError
from archnet.hardware import Target, student_cost
from archnet.jobs import conductor
from archnet.ops import Student
from archnet.quant import (
    Allocation,
    QuantizationError,
    Recipe,
    allocate,
    pack,
    quantize,
    settle,
    unpack,
)
from archnet.quant.allocate import Term, bit_operations, cost_of, packed_bytes, solve
from archnet.quant.attach import insert_activations, shared_grids
from archnet.quant.sensitivity import sensitivity
from archnet.quant.widths import end_names, uniform_widths
from archnet.runs import read_json
from archnet.runs.quant import first_inputs
from archnet.runs.student import load_student
from archnet.teachers.nets import CifarResNet
from archnet.teachers.transformer import Transformer

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def student() -> Student:
    """Two residual blocks with an addition whose sides share a grid."""
    torch.manual_seed(0)
    return convert(CifarResNet(8, 4).eval(), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def macs(student: Student) -> dict[str, int]:
    return {row.name: row.macs for row in student_cost(student).steps}


@pytest.fixture(scope="module")
def chosen(student: Student, images: torch.Tensor, macs: dict[str, int]) -> Allocation:
    return allocate(student, [images], macs, budget=0.8)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the runs below keep the teacher that the first one trains."""
    return f"teacher.cache_dir={tmp_path_factory.mktemp('teachers')}"


def placed(student: Student, fine_sums: bool = True) -> Student:
    student = copy.deepcopy(student)
    insert_activations(student, fine_sums)
    return student


# The program --------------------------------------------------------------------------------


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [
        Term(5.0, ("a", "x")), Term(2.0, ("b", "x")), Term(7.0, ("c", "y")),
        Term(3.0, ("x", "y")), Term(1.0, ("y", "y")), Term(4.0, ("fixed", "c")), Term(11.0),
    ]  # fmt: skip
    for _ in range(5):
        names, widths = ("a", "b", "c", "x", "y"), (2, 4, 8)
        losses = {
            name: dict(zip(widths, torch.rand(3, generator=generator).tolist(), strict=True))
            for name in names
        }
        options = [
            {**dict(zip(names, pick, strict=True)), "fixed": 8}
            for pick in itertools.product(widths, repeat=5)
        ]
        limit = sorted(cost_of(terms, option) for option in options)[60] + 0.5
        found = solve(losses, terms, {"fixed": 8}, limit)
        best = min(
            sum(losses[name][option[name]] for name in names)
            for option in options
            if cost_of(terms, option) <= limit
        )
        assert cost_of(terms, {**found, "fixed": 8}) <= limit
        assert sum(losses[name][found[name]] for name in names) == pytest.approx(best)


def test_what_is_no_better_wider_stays_narrow() -> None:
    losses = {"a": {2: 0.0, 4: 0.0, 8: 0.0}, "b": {2: 0.5, 4: 0.5, 8: 0.1}}
    assert solve(losses, [Term(1.0, ("a", "b"))], {}, 1e6) == {"a": 2, "b": 8}


def test_a_limit_of_exactly_the_narrowest_widths() -> None:
    losses = {"a": {2: 0.5, 3: 0.1}, "b": {2: 0.5, 3: 0.1}}
    terms = [Term(1e9, ("a", "b"))]
    assert solve(losses, terms, {}, 4e9) == {"a": 2, "b": 2}
    with pytest.raises(QuantizationError, match="the narrowest widths cost more"):
        solve(losses, terms, {}, 3.9e9)


def test_the_solver_stops_at_a_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the clock: a busy machine makes the same choice."""
    generator = torch.Generator().manual_seed(1)
    names = [f"{kind}{index}" for index in range(24) for kind in "wa"]
    losses = {
        name: dict(zip((2, 4, 8), torch.rand(3, generator=generator).tolist(), strict=True))
        for name in names
    }
    terms = [Term(3.0 + index % 5, (f"w{index}", f"a{index // 2}")) for index in range(24)]
    limit = cost_of(terms, dict.fromkeys(names, 4))
    solver = sys.modules["archnet.quant.allocate"]
    given = []

    def watched(*arguments: Any, options: dict[str, float], **others: Any) -> Any:
        given.append(set(options))
        return milp(*arguments, options=options, **others)

    monkeypatch.setattr(solver, "milp", watched)
    monkeypatch.setattr(solver, "NODES", 1)
    first, second = (solve(losses, terms, {}, limit) for _ in range(2))
    assert first == second
    assert cost_of(terms, first) <= limit
    assert all(options == {"node_limit", "mip_rel_gap"} for options in given)


# Costs --------------------------------------------------------------------------------------


def test_costs_are_those_of_the_hardware_room(
    student: Student, images: torch.Tensor, macs: dict[str, int], chosen: Allocation
) -> None:
    quantized = quantize(
        copy.deepcopy(student), Recipe(4, 4), calibration=[images], widths=chosen.widths
    )
    cost = student_cost(quantized)
    network = placed(student)
    assert cost_of(bit_operations(network, macs), chosen.widths) == cost.bops == chosen.spent
    layers = len(cost.steps)
    assert 0 <= cost.weight_bytes - cost_of(packed_bytes(network), chosen.widths) < layers
    uniform = student_cost(quantize(copy.deepcopy(student), Recipe(4, 4), calibration=[images]))
    assert chosen.uniform == uniform.bops
    assert cost.bops <= 0.8 * uniform.bops


def test_costs_of_attention() -> None:
    from archnet.convert.translation import convert_translator

    torch.manual_seed(0)
    teacher = Transformer(40, 16, dim=8, heads=2, inner=16, encoder_layers=1, decoder_layers=1)
    student, _ = convert_translator(teacher.eval(), Target.named("arch5_matmul"))
    tokens = torch.full((2, 6), 5)
    inputs = (tokens, tokens, torch.zeros(2, 6))
    macs = {row.name: row.macs for row in student_cost(student).steps}
    chosen = allocate(student, [inputs], macs, budget=0.9, weight_widths=[2, 8], act_widths=[2, 8])
    quantize(student, Recipe(4, 4), calibration=[inputs], widths=chosen.widths)
    assert student_cost(student).bops == chosen.spent <= 0.9 * chosen.uniform


# Sensitivity --------------------------------------------------------------------------------


def test_a_loss_is_that_of_the_student_with_one_layer_rounded(
    student: Student, images: torch.Tensor
) -> None:
    network = placed(student, fine_sums=False)
    layer = next(name for name, m in network.operators.items() if type(m).__name__ == "Convolution")
    shared = shared_grids(network)
    group = next(g for g in shared.values() if list(shared.values()).count(g) > 1)
    batches = [images[:4], images[4:]]
    found = sensitivity(network, batches, {layer: [3], group: [2, 4]})
    for name, losses in found.items():
        for bits, loss in losses.items():
            alone = dict.fromkeys(uniform_widths(network, 32, 32), 32) | {name: bits}
            rounded = quantize(
                copy.deepcopy(student), Recipe(32, 32), calibration=batches, widths=alone
            )
            with torch.no_grad():  # float32 logs would hold a divergence of 1e-5 to a thousandth
                nets = (student, rounded)
                wanted, scores = (net(images).double().log_softmax(-1) for net in nets)
            kl = nn.functional.kl_div(scores, wanted, reduction="batchmean", log_target=True)
            assert loss == pytest.approx(float(kl), rel=1e-5)
    assert found[group][2] > found[group][4] > 0


def test_measuring_leaves_the_student_as_it_was(
    student: Student, images: torch.Tensor, chosen: Allocation
) -> None:
    assert pack(student)["quantizers"] == {}
    network = placed(student)
    before = network(images)
    sensitivity(network, [images], {name: [4] for name in list(chosen.losses)[:3]})
    assert pack(network)["quantizers"] == {}
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-4)


# Choices ------------------------------------------------------------------------------------


def test_ends_keep_their_widths_unless_they_are_free(
    student: Student, images: torch.Tensor, macs: dict[str, int], chosen: Allocation
) -> None:
    ends = end_names(placed(student))
    assert len(ends) == 4  # weights and inputs of two layers
    assert {chosen.widths[name] for name in ends} == {8}
    assert not ends & set(chosen.losses)
    free = allocate(student, [images], macs, budget=0.8, free_ends=True, weight_widths=[2, 4],
                    act_widths=[3])  # fmt: skip
    assert ends <= set(free.losses)
    assert {free.widths[name] for name in shared_grids(placed(student)).values()} == {3}
    assert set(free.widths.values()) <= {2, 3, 4}


def test_a_budget_of_bytes(student: Student, images: torch.Tensor, macs: dict[str, int]) -> None:
    found = allocate(student, [images], macs, budget=0.9, budget_of="bytes", act_widths=[4])
    quantized = quantize(
        copy.deepcopy(student), Recipe(4, 4), calibration=[images], widths=found.widths
    )
    uniform = quantize(copy.deepcopy(student), Recipe(4, 4), calibration=[images])
    ratio = student_cost(quantized).weight_bytes / student_cost(uniform).weight_bytes
    assert 0.6 < ratio < 0.91


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1}, r"quant.budget=0.1 of the bops at W4A4 cannot be met: .* take 0\.\d+"),
        ({"recipe": Recipe(32, 4)}, "a share of a quantized student, not of W32A4"),
        ({"act_widths": [4, 9]}, "9 is not a width to choose from"),
    ],
)
def test_what_cannot_be_chosen(
    student: Student, images: torch.Tensor, macs: dict[str, int], options: dict, message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        allocate(student, [images], macs, **{"budget": 1.0, **options})


def test_the_smallest_budget_that_is_named_can_be_met(
    student: Student, images: torch.Tensor, macs: dict[str, int]
) -> None:
    options = {"weight_widths": [2, 3], "act_widths": [2, 3]}
    with pytest.raises(QuantizationError) as caught:
        allocate(student, [images], macs, budget=0.0, **options)
    least = float(str(caught.value).rpartition(" ")[2])
    assert allocate(student, [images], macs, budget=least, **options).spent > 0


@pytest.mark.parametrize(
    ("widths", "message"),
    [({"nowhere": 4}, "nowhere is neither a weighted layer"), ({"": 9}, "=9 is not a width")],
)
def test_widths_of_nothing(
    student: Student, images: torch.Tensor, chosen: Allocation, widths: dict, message: str
) -> None:
    named = {name or next(iter(chosen.losses)): bits for name, bits in widths.items()}
    with pytest.raises(QuantizationError, match=message):
        quantize(copy.deepcopy(student), Recipe(4, 4), calibration=[images], widths=named)


# What takes them ----------------------------------------------------------------------------


def test_files_and_integers_of_mixed_widths(
    student: Student, images: torch.Tensor, chosen: Allocation, tmp_path
) -> None:
    mixed = quantize(
        copy.deepcopy(student), Recipe(4, 4), calibration=[images], widths=chosen.widths
    ).eval()
    assert len(set(chosen.widths.values())) > 2
    settle(mixed)
    again = unpack(pack(mixed))
    assert torch.equal(again(images), mixed(images))
    assert student_cost(again) == student_cost(mixed)
    for form in ("qdq", "subbyte"):
        export(again, tmp_path / f"{form}.onnx", form=form)
        assert audit(tmp_path / f"{form}.onnx", hardware="arch5").pure
        same = parity(again, tmp_path / f"{form}.onnx", images)
        assert same.mismatches == 0
        assert same.max_abs_diff < 1e-4
    model = to_integers(again)
    scores = torch.as_tensor(model.run(images.numpy())[model.outputs[0]])
    assert torch.equal(scores.argmax(1), mixed(images).argmax(1))


def test_a_run_tells_its_widths_and_resumes_with_them(make_config: Make, teachers: str) -> None:
    options = ["trainer=debug", "trainer.progress=false", "quant=mixed", "quant.budget=0.9",
               "quant.widths=[2,4,8]", "hardware.act_bits=[4,8]", "quant.sensitivity_inputs=8",
               "distill.steps=2", "distill.joint_steps=1", teachers]  # fmt: skip
    folder = conductor.run(make_config(*options))
    quant = read_json(folder.metrics)["quant"]
    assert (quant["budget"], quant["budget_of"], quant["inputs"]) == (0.9, "bops", 8)
    assert quant["smallest_share"] <= quant["share"] <= 0.9
    own = load_student(folder)
    bits = {row["name"]: row["bits"] for row in quant["widths"]}
    for row in student_cost(own).steps:
        if row.macs:
            assert row.weight_bits == bits[row.name]
    for row in quant["widths"]:
        assert row["operator"] != "Activation" or row["bits"] in (4, 8)
        assert not row["loss"] or str(row["bits"]) in row["loss"]
    assert "<h2>Widths</h2>" in (folder.path / "report.html").read_text()
    shown = {what: text for what, _, text in report.rows(read_json(folder.metrics))}
    assert "of W4A4's bops" in shown["network"]
    assert " x " in shown["layers x bits of weights"]
    (folder.path / "stages" / "evaluate.json").unlink()
    conductor.run(make_config(f"resume={folder.path}"), ["resume"])
    assert read_json(folder.metrics)["quant"] == quant


def test_an_impossible_budget_ends_a_run_before_training(make_config: Make, teachers: str) -> None:
    options = ["trainer=debug", "trainer.progress=false", "quant=mixed", "quant.budget=0.05",
               teachers]  # fmt: skip
    with pytest.raises(QuantizationError, match=r"quant.budget=0.05 .* narrowest widths take 0"):
        conductor.run(make_config(*options))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.budget=-1"], "quant.budget=-1.0 is out of range: at least 0"),
        (["quant.budget_of=byte"], "bops, bytes; nearest: bytes"),
        (["quant.widths=[0,4]"], r"holds 0, which is out of range: 1 to 8; nearest valid: 1"),
        (["quant.bits=32"], "is a share of a quantized student"),
        (
            [
                "hardware.act_bits=[4]",
                "quant.first_bits=4",
                "quant.last_bits=4",
                "quant.sum_bits=4",
                "quant.widths=[2,8]",
            ],
            "its act_bits are 4",
        ),
    ],
)
def test_budgets_that_cannot_be_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(Path(__file__).parents[1] / "conf", ["quant=mixed", *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_first_inputs_cut_the_last_batch() -> None:
    batches = [torch.zeros(4, 2), torch.zeros(4, 2)]
    assert [len(batch) for batch in first_inputs(batches, 6)] == [4, 2]
    pairs = [(torch.zeros(4, 2), torch.zeros(4, 3))] * 2
    assert [len(y) for _, y in first_inputs(pairs, 3)] == [3]
    assert len(first_inputs(batches, 99)) == 2
