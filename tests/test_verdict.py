"""The verdict on a run: intervals from the test samples, cost on the target, good and bad deals."""

import copy
import doctest
import random
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from archnet import intervals
from archnet.jobs.evaluation import Evaluation
from archnet.report import files as report_files
from archnet.report.table import rows
from archnet.report.verdict import verdict
from archnet.tasks import sentences
from archnet.tasks.sentences import compared, paired

METRICS: dict[str, Any] = {
    "task": "mnist5k",
    "teacher": {"name": "digits", "accuracy": 97.0},
    "student": {"accuracy": 96.5, "agreement": 98.0},
    "quant": {"method": "lsq", "weight_bits": 4, "act_bits": 4, "copies": 1},
    "hardware": "arch5",
    "conversion": {"approximate_rules": [], "error": 1e-7},
    "paired": {"accuracy": {"difference": -0.5, "low": -1.2, "high": 0.2, "samples": 1000}},
    "agreement_interval": [96.9, 98.7],
    "cost": {
        "macs": {"teacher": 100, "student": 100},
        "bops": {"teacher": 102400, "teacher_w8a8": 6400, "student": 1600},
        "weight_bytes": {"teacher": 400, "student": 50},
        "cycles": {"teacher": 50, "student": 50},
        "on_target": {
            "measure": "bops", "teacher": 6400, "student": 1600,
            "teacher_bits": [8, 8], "runs_teacher": True,
        },
    },
    "audit": {"pure": True, "violations": [], "not_judged": {}},
    "parity": {"runtime": "onnxruntime 1", "max_abs_diff": 0.0, "mismatches": 0},
    "data": {
        "unit": "image", "inputs_seen": 1, "unlabelled": 1, "evaluated": 1000, "skipped": [],
    },
    "seconds": {"total": 1.0},
    "seed": 0,
}  # fmt: skip


def changed(**paths: Any) -> dict[str, Any]:
    """`METRICS` with other values: ``cost__on_target__student=9``."""
    metrics = copy.deepcopy(METRICS)
    for path, value in paths.items():
        *where, last = path.split("__")
        node = metrics
        for key in where:
            node = node[key]
        node[last] = value
    return metrics


def test_the_sentence_has_distance_cost_and_file() -> None:
    found = verdict(METRICS)
    assert found["sentence"] == (
        "Accuracy 96.50, 0.50 points below its teacher (95 % interval of the difference -1.20 to "
        "+0.20 on 1,000 test images), at 0.25 times the bit operations of its teacher at W8A8 on "
        "arch5; the file is pure and gives what the student gives (onnxruntime 1)."
    )
    assert (found["bad_deal"], found["pure"], found["verified"]) == (False, True, True)
    assert found["difference"] == -0.5
    assert found["cost_ratio"] == 0.25
    assert "fewer bits may do, quant.bits=3" in found["advice"][0]


@pytest.mark.parametrize(
    ("change", "bad", "said"),
    [
        ({}, False, ""),
        ({"cost__on_target__student": 11392}, True, "costs 1.78 times the bit operations"),
        ({"cost__on_target__student": 6400}, False, ""),  # at W8A8, the teacher itself
        (
            {"cost__on_target__student": 11392, "cost__on_target__runs_teacher": False},
            True,
            "on a chip that runs it as it is, which arch5 does not",
        ),
        # A chip on which fewer bits are as dear, and the student is worse.
        (
            {
                "cost__on_target": {
                    "measure": "cycles", "teacher": 50, "student": 50, "teacher_bits": [8, 8],
                },
                "paired__accuracy__high": -0.1,
            },
            True,
            "fewer bits save nothing on arch5 and lose accuracy",
        ),
        (
            {
                "cost__on_target": {
                    "measure": "cycles", "teacher": 50, "student": 50, "teacher_bits": [8, 8],
                },
            },
            False,
            "",
        ),
    ],
)  # fmt: skip
def test_a_student_that_costs_more_than_its_teacher_is_a_bad_deal(
    change: dict[str, Any], bad: bool, said: str
) -> None:
    found = verdict(changed(**change))
    assert found["bad_deal"] == bad
    assert found["sentence"].startswith("A bad deal: ") == bad
    assert said in found["sentence"]
    assert ("8-bit quantization of the teacher alone would be better" in found["sentence"]) == bad


def test_without_labels_it_is_the_agreement() -> None:
    found = verdict(
        changed(teacher={"name": "x", "accuracy": None}, paired={},
                student={"accuracy": None, "agreement": 98.0})
    )  # fmt: skip
    assert "98.00 % of the decisions are the teacher's" in found["sentence"]
    assert "95 % interval 96.90 to 98.70" in found["sentence"]
    assert found["metric"] is None


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        ({}, {"relative_error": 1.23}, "Results 1.23 % from the teacher's"),
        ({"psnr": 31.0}, {"psnr": 30.5}, "Psnr 30.50, 0.50 below its teacher"),
        ({"miou": 60.0}, {"miou": 61.0}, "Mean IoU 61.00, 1.00 points above its teacher"),
        ({"bleu": 30.0, "per_second": 9}, {"bleu": 30.0, "per_second": 5}, "BLEU 30.00, as its"),
    ],
)
def test_every_kind_of_figure_has_a_verdict_and_lines(
    teacher: dict[str, Any], student: dict[str, Any], said: str
) -> None:
    metrics = changed(
        teacher={"name": "x", **teacher}, student={"agreement": None, **student}, paired={}
    )
    assert verdict(metrics)["sentence"].startswith(said)
    shown = [what for what, *_ in rows(metrics)]
    assert "agreement, points" not in shown
    for key in student:
        assert any(key.split("_")[0] in what.lower() or key == "miou" for what in shown), key


def test_metrics_of_before_have_a_verdict() -> None:
    old = {key: value for key, value in METRICS.items() if key not in ("paired",)}
    old["cost"] = {key: METRICS["cost"][key] for key in ("macs", "bops", "weight_bytes")}
    found = verdict(old)
    assert found["cost_ratio"] == 0.25
    assert found["low"] is None


def test_advice_follows_what_was_measured() -> None:
    layers = [
        {
            "layer": "a",
            "tap": "a",
            "bops": 10,
            "cycles": 1,
            "error_before": 0.2,
            "error_after": 0.01,
        },
        {
            "layer": "b",
            "tap": "b",
            "bops": 990,
            "cycles": 9,
            "error_before": 0.4,
            "error_after": 0.3,
        },
    ]
    worse = changed(paired__accuracy__high=-0.2, quant__weight_bits=2)
    wide = changed(paired__accuracy__low=-3.0, paired__accuracy__high=2.0)
    assert "More test samples" in verdict(wide)["advice"][-1]
    said = verdict(worse, layers, trend=0.8)["advice"]
    assert "still rose by 0.80 points" in said[0]
    assert "Most is lost up to b (30.0%" in said[1]
    assert "quant.copies=2" in said[2]
    dear = changed(
        cost__on_target__student=9000, conversion={"approximate_rules": ["gelu"], "error": 0.1}
    )
    said = verdict(dear, layers)["advice"]
    assert "99% of the cost is in b" in said[0]
    assert "convert.max_cost" in said[1]
    assert len(verdict(dear, layers, max_cost=2.0)["advice"]) == 1


def test_examples_in_the_documentation_hold() -> None:
    for module in (intervals, report_files):
        assert doctest.testmod(module).failed == 0


@given(st.integers(1, 3000), st.data())
def test_intervals_hold_what_was_measured(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = intervals.wilson(hits, count)
    assert 0 <= low <= hits / count + 1e-12 <= high + 2e-12 <= 1 + 2e-12
    fewer = data.draw(st.integers(0, count))
    more = data.draw(st.integers(0, count - fewer))
    low, high = intervals.of_pairs(fewer, more, count)
    assert -1 <= low < high <= 1
    shrunk = (more - fewer) / (count + 2)
    assert low <= shrunk <= high


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        cells = draw.multinomial(300, [0.05, 0.02, 0.9, 0.03])
        low, high = intervals.of_pairs(cells[0], cells[1], 300)
        covered += low <= -0.03 <= high
    assert 0.935 <= covered / 2000 <= 0.975


def evaluated(metrics: Any, shape: tuple[int, ...], labels: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(0)
    found = Evaluation(metrics, {"output": 1})
    for first in range(0, len(labels), 30):
        part = labels[first : first + 30]
        teacher = 3 * torch.nn.functional.one_hot(part.clamp_min(0), shape[0]).float()
        teacher = torch.movedim(teacher, -1, 1) + torch.randn(len(part), *shape)
        student = teacher + 0.7 * torch.randn(len(part), *shape)
        found.add([teacher], [student], part, lambda row: {"picture": "x"})
    return found.facts()


def test_classes_are_compared_sample_by_sample() -> None:
    labels = torch.arange(200) % 4
    facts = evaluated(
        lambda shape: {"accuracy": MulticlassAccuracy(shape[0], average="micro")}, (4,), labels
    )
    pair = facts["paired"]["accuracy"]
    net = pair["student_alone"] - pair["teacher_alone"]
    assert pair["samples"] == 200
    assert pair["difference"] == pytest.approx(100 * net / 200, abs=1e-3)
    assert pair["low"] < pair["difference"] < pair["high"]
    details = facts["details"]
    assert len(details["disagreements"]) == 12
    assert all(row["teacher"] != row["student"] for row in details["disagreements"])
    assert np.array(details["confusion"]["counts"]).sum() == 200
    assert facts["agreement"] == pytest.approx(100 - details["disagreeing"] / 2)


def test_figures_that_are_no_share_get_their_interval_from_groups() -> None:
    labels = torch.randint(0, 3, (90, 6, 6), generator=torch.Generator().manual_seed(1))
    facts = evaluated(lambda shape: {"miou": MulticlassJaccardIndex(shape[0])}, (3, 6, 6), labels)
    pair = facts["paired"]["miou"]
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["high"] - pair["low"] < 10
    assert facts["agreement_interval"][0] < facts["agreement"] < facts["agreement_interval"][1]
    assert facts["details"]["disagreements"][0]["changed"] > 0


def test_no_labels_leave_the_agreement_and_its_interval() -> None:
    facts = evaluated(
        lambda shape: {"accuracy": MulticlassAccuracy(shape[0])}, (4,), torch.full((60,), -1)
    )
    assert facts["teacher"] == facts["student"] == {"accuracy": None}
    assert facts["paired"] == {}
    assert facts["agreement_interval"][0] < facts["agreement"] < facts["agreement_interval"][1]
    assert facts["details"]["confusion"]["rows"] == "teacher"


def test_chrf_of_sums_is_that_of_sacrebleu() -> None:
    draw = random.Random(0)
    words = ["", "a", "cat", "Haus,", "größer", "schläft", "the", "!"]
    for size in (1, 3, 40):
        theirs, known = (
            [" ".join(draw.choices(words, k=draw.randrange(9))) for _ in range(size)]
            for _ in range(2)
        )
        rows = [sentences._characters(*pair) for pair in zip(theirs, known, strict=True)]
        expected = sacrebleu.CHRF().corpus_score(theirs, [known]).score
        assert sentences._chrf(np.array(rows).sum(0)) == pytest.approx(expected)


def test_bleu_and_chrf_are_compared_by_drawing_sentences_again() -> None:
    references = [f"the {n} small cats sit on {n} mats in the sun" for n in range(60)]
    teacher = [line.replace("sun", "rain") for line in references]
    student = [line.replace("small", "tiny") if n % 2 else line for n, line in enumerate(teacher)]
    texts = {"teacher": teacher, "student": student}
    found = {"teacher": {"bleu": 80.0, "chrf": 90.0}, "student": {"bleu": 70.0, "chrf": 88.0}}
    pairs = paired(texts, references, found)
    assert pairs["bleu"]["low"] < -5 > pairs["bleu"]["high"]
    assert pairs["chrf"]["low"] < pairs["chrf"]["high"] < 0
    assert pairs["chrf"]["difference"] == -2
    for same in paired({"teacher": teacher, "student": teacher}, references, found).values():
        assert same["low"] == same["high"] == 0
    details = compared(references, references, texts)
    assert details["disagreeing"] == 30
    assert len(details["disagreements"]) == 12
    (row,) = details["by_length"]
    assert (row["words"], row["sentences"]) == (10, 60)
    assert row["student"] < row["teacher"]
