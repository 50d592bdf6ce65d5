"""From Python, without a config: loaders of any kind, distill, compare, verify."""

import copy
import functools
import itertools
import logging
import re
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

import archnet
from archnet import loaders
from archnet.config import DistillConfig, keys
from archnet.distill import options_of
from archnet.errors import ArchnetError, ConfigError, TaskError
from archnet.loaders import Batches, Takes
from archnet.quant import QuantizationError, Recipe, describe
from conftest import CONF, ROOT

SHAPE, CLASSES, ROWS = (3, 8, 8), 4, 48
TAKES = Takes({"x": SHAPE})
TWO = Takes({"left": (3,), "right": (5,)})


def images(rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows) % CLASSES


def loader(rows: int = ROWS, size: int = 16, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(rows), labels(rows)), batch_size=size, **options)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, CLASSES))


@functools.cache
def _made(bits: int | None) -> Any:
    student = archnet.convert(network(), images(2))
    if bits:
        archnet.quantize(student, weight_bits=bits, act_bits=bits, calibration=images())
    return student


def made(bits: int | None = 4) -> Any:
    return copy.deepcopy(_made(bits))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.last = nn.Linear(3, 6), nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.one(left) + self.other(right)))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from images()


# Loaders ------------------------------------------------------------------------------------

WITHOUT_LABELS = {
    "tensor": images,
    "array": lambda: images().numpy(),
    "list": lambda: list(images().split(16)),
    "list of doubles": lambda: list(images().double().split(16)),
    "generator": lambda: (x for x in images().split(16)),
    "function": lambda: lambda: iter(images().split(16)),
    "mapping": lambda: [{"x": x} for x in images().split(16)],
    "mapping of pictures": lambda: [UserDict(pixel_values=x) for x in images().split(16)],
    "loader of tensors": lambda: DataLoader(images(), batch_size=16),
    "loader of lists": lambda: DataLoader(TensorDataset(images()), batch_size=16),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=16),
}
WITH_LABELS = {
    "loader": loader,
    "list of tuples": lambda: [*zip(images().split(16), labels().split(16), strict=True)],
    "mapping of both": lambda: [{"image": x, "label": y} for x, y in loader()],
    "nested": lambda: [(({"x": x},), "boxes") for x in images().split(16)],
    "three": lambda: [(x, 1, 2) for x in images().split(16)],
}


@pytest.mark.parametrize("kind", [*WITHOUT_LABELS, *WITH_LABELS])
def test_what_users_hold_becomes_unlabelled_batches(kind, caplog):
    is_labelled = kind in WITH_LABELS
    found = list(Batches({**WITHOUT_LABELS, **WITH_LABELS}[kind](), TAKES))
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(torch.cat(found), images())
    assert len([r for r in caplog.records if "labels are dropped" in r.message]) == is_labelled


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), most=st.integers(1, 30))
def test_endless_batches_go_round_in_order(sizes, most):
    parts = list(images(sum(sizes)).split(sizes))
    found = list(itertools.islice(Batches(parts, TAKES).endless(), most))
    assert all(torch.equal(x, parts[i % len(parts)]) for i, x in enumerate(found))


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 3), torch.zeros(2, 5)),
        [torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2)],
        ((torch.zeros(2, 3), torch.zeros(2, 5)), torch.zeros(2)),
        {"right": torch.zeros(2, 5), "left": torch.zeros(2, 3), "y": torch.zeros(2)},
    ],
)
def test_networks_of_several_inputs_get_them_all(batch):
    found = TWO.batch(batch, "a batch")
    assert [tuple(x.shape) for x in found.inputs] == [(2, 3), (2, 5)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data is None: give a tensor"),
        ("photos", "data is a str: give a tensor"),
        (3, "data is a int: give a tensor"),
        (network(), "data is a Sequential: give a tensor"),
        (TensorDataset(images()), r"a dataset of single samples: give DataLoader\(data"),
        ([], r"data has no batch: give some \(B, 3, 8, 8\)"),
        (iter(()), "data has no batch"),
        (lambda: 3, "data is a function that returns a int"),
        ([images()[0]], "the shape .* of one sample, without a batch"),
        ([images()[:0]], "batch 0 of data of shape .* holds no sample"),
        ([images(), images()[:, :, :7]], r"batch 1 of data: x has the shape \(48, 3, 7, 8\)"),
        ([images()[:, :1]], "bring all samples to the size"),
        ([(images() * 255).byte()], r"torch.uint8.* x.float\(\) / 255"),
        ([images().long()], "torch.int64, and the network takes floats: give float32"),
        ([["a", "b"]], "batch 0 of data is a str"),
        ([{"picture": images()}], "a mapping with picture: the network's inputs are called x"),
        ([()], "batch 0 of data is an empty tuple"),
        ([images().to_sparse()], "give a dense one"),
    ],
)
def test_what_cannot_be_read_is_one_line(data, message):
    with pytest.raises(TaskError, match=message) as caught:
        list(Batches(data, TAKES))
    assert "\n" not in str(caught.value)


def test_inputs_of_several_that_do_not_belong_together_are_one_line():
    with pytest.raises(TaskError, match="is 4 values, and the network takes 2 inputs"):
        TWO.batch([torch.zeros(2, 3)] * 4, "a batch")
    with pytest.raises(TaskError, match="its inputs have 2 and 3 samples"):
        TWO.batch((torch.zeros(2, 3), torch.zeros(3, 5)), "a batch")


def test_a_generator_that_ends_cannot_begin_again():
    batches = Batches((x for x in images().split(16)), TAKES)
    with pytest.raises(TaskError, match="has ended and cannot be begun again"):
        list(itertools.islice(batches.endless(), 4))
    with pytest.raises(TaskError, match="can be read once"):
        next(iter(batches))


def test_what_has_no_end_is_read_as_far_as_needed(monkeypatch):
    monkeypatch.setattr(loaders, "MOST_BATCHES", 5)

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield images()

    student = archnet.convert(network(), images(2), calibration=endless)
    assert not describe(student)
    archnet.quantize(student, calibration=endless())
    with pytest.raises(TaskError, match=r"gives more than 5 batches: .* batches=<number>"):
        archnet.compare(network(), student, endless)
    assert archnet.compare(network(), student, endless, batches=2).inputs == 2 * ROWS


def test_conversion_reads_batches_and_loaders():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    once, *others = (
        archnet.convert(teacher, images(2), calibration=data)
        for data in (images(), list(images().split(16)), loader())
    )
    for other in others:
        torch.testing.assert_close(other(images()), once(images()))


# Recipes ------------------------------------------------------------------------------------


def test_a_recipe_and_its_fields_say_the_same(caplog):
    students = [made(None) for _ in range(3)]
    archnet.quantize(students[0], Recipe(weight_bits=2, act_bits=4), calibration=images())
    archnet.quantize(students[1], weight_bits=2, act_bits=4, calibration=loader(size=ROWS))
    archnet.quantize(students[2], Recipe(act_bits=4), weight_bits=2, calibration=[images()])
    assert sum("labels are dropped" in record.message for record in caplog.records) == 1
    first, *others = (student(images()) for student in students)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_bit": 4}, "weight_bit is not a field of Recipe; nearest valid: weight_bits"),
        ({"recipe": 4}, r"the recipe is a int: give archnet.Recipe\(weight_bits=4"),
        ({"recipe": {"weight_bits": 4}}, "the recipe is a dict"),
        ({"weight_bits": 9}, "weight_bits=9 is not a width: 1 to 8, or 32"),
        ({"act_bits": 4.5}, "act_bits=4.5 is not a width"),
        ({"method": "ptq"}, "method=ptq is not one of lsq, dorefa"),
        ({"copies": 0}, "copies=0"),
        ({"calibration": None}, "calibration is None"),
        ({"calibration": [images()[:, :1]]}, "batch 0 of calibration: .* takes"),
    ],
)
def test_what_no_recipe_can_be_is_one_line(given, message):
    with pytest.raises(QuantizationError, match=message):
        archnet.quantize(made(None), **{"calibration": images(), **given})


# Distillation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "data"),
    [
        (None, loader),
        (None, WITHOUT_LABELS["function"]),
        ("joint", lambda: images(16)),
        ("progressive", WITHOUT_LABELS["list"]),
    ],
)
def test_distill_trains_on_any_loader(schedule, data):
    teacher, student = network().train(), made(2)
    before = student(images()).detach()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    state = torch.random.get_rng_state()
    facts = archnet.distill(
        student, teacher, data(), steps=12, schedule=schedule, val=loader(), val_every=6,
        progress=False, grid_lr=0.05,
    )  # fmt: skip
    assert (facts["steps"] >= 12, facts["inputs_seen"]) == (True, 12 * 16)
    assert not torch.equal(student(images()), before)
    assert teacher.training
    assert not student.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state) or isinstance(data(), DataLoader)


def test_the_same_seed_gives_the_same_student():
    found = []
    for _ in range(2):
        student = made(2)
        archnet.distill(student, network(), loader(shuffle=True), steps=8, progress=False)
        found.append(student(images()))
    assert torch.equal(*found)


def test_distillation_brings_the_student_nearer():
    teacher, student = network(), made(2)
    before = archnet.compare(teacher, student, loader())
    archnet.distill(student, teacher, loader(), steps=60, progress=False, grid_lr=0.05)
    assert archnet.compare(teacher, student, loader()).error < 0.7 * before.error


def test_a_stopped_call_goes_on_from_its_folder(tmp_path: Path):
    teacher, student = network(), made(2)
    given = {"schedule": "joint", "folder": tmp_path, "checkpoint_every": 4, "progress": False}
    archnet.distill(student, teacher, loader(), steps=8, **given)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step8.ckpt"]
    again = made(2)
    archnet.distill(again, teacher, loader(), steps=8, **given)
    assert torch.equal(again(images()), student(images()))


def test_networks_of_several_inputs_are_distilled():
    x = torch.randn(32, 3), torch.randn(32, 5)
    teacher = TwoInputs()
    student = archnet.convert(teacher, x)
    archnet.quantize(student, weight_bits=4, act_bits=4, calibration=[x])
    pairs = DataLoader(TensorDataset(*x, labels(32)), batch_size=8)
    archnet.distill(student, teacher, pairs, steps=6, val=pairs, progress=False)
    assert archnet.compare(teacher, student, pairs).metric == "accuracy, points"
    with pytest.raises(ArchnetError, match="schedule=local is for networks of one input"):
        archnet.distill(student, teacher, pairs, steps=6, schedule="local", progress=False)


def test_the_module_trains_under_a_trainer_of_ones_own(caplog):
    teacher, student = network(), made(2)
    before = student(images()).detach()
    module = archnet.ArchDistillation(teacher, student, steps=6, lr=1e-3)
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 6
    assert {"val/agreement", "val/accuracy"} <= set(trainer.callback_metrics)
    assert sum("labels are dropped" in record.message for record in caplog.records) == 1
    assert not torch.equal(student.eval()(images()), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: archnet.distill(t, s, loader()), "teacher and student are swapped"),
        (
            lambda s, t: archnet.distill(t, t, loader()),
            "a Sequential is not a student: call convert",
        ),
        (lambda s, t: archnet.distill(s, s, loader()), "the teacher is a student itself"),
        (lambda s, t: archnet.distill(s, TwoInputs(), loader()), "give the teacher that convert"),
        (lambda s, t: archnet.ArchDistillation(t, s, steps=0), "steps=0 trains nothing"),
        (lambda s, t: archnet.distill(s, t[:6], loader()), "converted from another network"),
        (lambda s, t: archnet.distill(s, t, None), "data is None"),
        (lambda s, t: archnet.distill(s, t, loader(), val=[]), "val has no batch"),
        (lambda s, t: archnet.distill(s, t, loader(), step=3), "nearest valid: steps"),
        (lambda s, t: archnet.distill(s, t, loader(), steps=-3), r"distill\.steps=-3"),
        (lambda s, t: archnet.distill(s, t, loader(), steps="x"), "steps: Value 'x'"),
        (lambda s, t: archnet.distill(s, t, loader(), schedule="all"), r"schedule=all"),
        (lambda s, t: archnet.distill(s, t, loader(), accelerator="tpu"), "not one of auto"),
        (lambda s, t: archnet.distill(s, t, iter([images()]), steps=3), "cannot be begun again"),
        (
            lambda s, t: archnet.distill(s, t, [images() * torch.nan], steps=3, schedule="joint"),
            "the batch of step 0 has values that are not finite",
        ),
        (
            lambda s, t: archnet.ArchDistillation(t, s, schedule="local"),
            "schedule=local trains on cached features",
        ),
        (lambda s, t: archnet.quantize(t, calibration=images()), "a Sequential is not a student"),
        (lambda s, t: archnet.quantize(s, calibration=images()), "quantized already"),
        (lambda s, t: archnet.compare(s, t, loader()), "teacher and student are swapped"),
        (lambda s, t: archnet.compare(t, s, loader(), "accuracy"), "the metric is a str"),
        (lambda s, t: archnet.export(t, "x.onnx"), "a Sequential is not a student"),
        (lambda s, t: archnet.verify(t, "x.onnx", loader()), "a Sequential is not a student"),
        (lambda s, t: archnet.verify(s, "x.onnx", loader()), "x.onnx is missing"),
        (lambda s, t: archnet.verify(made(None), "x.onnx", loader()), "is not quantized"),
    ],
)
def test_wrong_calls_are_one_line(call, message):
    student, teacher = made(), network()
    with pytest.raises(ArchnetError, match=message) as caught:
        call(student, teacher)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["joint", "progressive", "local"])
def test_options_by_name_are_those_of_the_config(schedule):
    tree: Any = OmegaConf.merge(
        OmegaConf.structured(DistillConfig), OmegaConf.load(CONF / "distill" / f"{schedule}.yaml")
    )
    expected = dict(keys(OmegaConf.to_object(tree)))
    assert dict(keys(options_of({"schedule": schedule}))) == expected


def test_options_of_the_optimizer_stand_beside_the_others():
    options = options_of({"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.2})
    found = options.optimizer.name, options.optimizer.lr, options.optimizer.weight_decay
    assert found == ("adamw", 0.1, 0.2)
    with pytest.raises(ConfigError, match=r"distill\.optimizer\.name=lion"):
        options_of({"optimizer": "lion"})


# Comparison and verification ----------------------------------------------------------------


def test_compare_counts_as_one_would_by_hand():
    teacher, student = network().eval(), made(2)
    found = archnet.compare(teacher, student, loader(size=10))
    with torch.no_grad():
        theirs, ours = teacher(images()).argmax(1), student(images()).argmax(1)
    assert found.inputs == ROWS
    assert found.agreement == pytest.approx(100 * float((theirs == ours).float().mean()))
    assert found.teacher == pytest.approx(100 * float((theirs == labels()).float().mean()))
    assert found.student == pytest.approx(100 * float((ours == labels()).float().mean()))
    assert found.bops["student"] < found.bops["teacher"] == 64 * found.macs["teacher"]
    for shown in (str(found), found._repr_html_()):
        assert "agreement, points" in shown
        assert "accuracy, points" in shown
    assert archnet.compare(teacher, student, images()).metric == ""


def test_compare_takes_any_metric():
    teacher, student = network().eval(), made(2)
    found = archnet.compare(teacher, student, loader(), MulticlassF1Score(CLASSES))
    with torch.no_grad():
        expected = MulticlassF1Score(CLASSES)(student(images()), labels())
    assert (found.metric, found.student) == ("MulticlassF1Score", pytest.approx(float(expected)))
    for data, metric, message in (
        (images(), MulticlassF1Score(CLASSES), "needs labels"),
        (loader(), MulticlassConfusionMatrix(CLASSES), "gives no single number"),
        ([(images(), labels()[:7])], MulticlassF1Score(CLASSES), "does not take results"),
    ):
        with pytest.raises(ArchnetError, match=message) as caught:
            archnet.compare(teacher, student, data, metric)
        assert "\n" not in str(caught.value)


def test_the_file_of_a_distilled_student_verifies(tmp_path: Path):
    teacher, student = network(), made(4)
    archnet.distill(student, teacher, loader(), steps=8, progress=False)
    path = archnet.export(student, tmp_path / "student.onnx")
    found = archnet.verify(student, path, loader(), inputs=20)
    assert (found.equal, found.inputs) == (True, 20)
    assert [check.name for check in found.checks][-1] == "student.onnx"
    assert "100 %" in str(found)
    assert "<table>" in found._repr_html_()
    other = made(2)
    archnet.distill(other, teacher, loader(), steps=8, progress=False)
    found = archnet.verify(other, path, loader())
    assert not found.equal
    assert "first difference at" in str(found)


def test_the_page_about_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    names = {
        "archnet": archnet, "lightning": lightning, "teacher": network(), "example": images(2),
        "batches": [images()], "loader": loader(), "val_loader": loader(),
    }  # fmt: skip
    blocks = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    for place, block in enumerate(blocks):
        # The second one quantizes, and the student of the first is quantized.
        found = {**names, "student": made(None)} if "Recipe" in block else dict(names)
        exec(block.replace("2000", "4").replace("minutes=30", "minutes=0"), found)
        if not place:
            names = found
            assert archnet.verify(found["student"], "student.onnx", loader(), inputs=9).inputs == 9


def test_arrays_are_read_too():
    assert archnet.compare(network(), made(), np.float64(images().numpy())).inputs == ROWS


# Search -------------------------------------------------------------------------------------


def searched(where: Path | None = None, **options: Any) -> archnet.Searched:
    student, asked = made(None), {"weight_bits": 4, "act_bits": 4, "steps": 40, "minutes": None}
    options = {"drop": 0.0, "accelerator": "cpu", "progress": False, **asked, **options}
    return archnet.search(student, network(), loader(), val=loader(), folder=where, **options)


def test_search_ends_where_the_promise_is_kept() -> None:
    found = searched(agreement=20, drop=None)
    assert found.kept
    assert found.sure
    assert [row["kind"] for row in found.trials] == ["converted", "calibrated"]
    assert describe(found.student)["weights"]
    again = archnet.compare(network(), found.student, loader())
    assert again.agreement == pytest.approx(found.measured.agreement)
    assert "kept" in str(found)


def test_search_from_python_trains_and_goes_on(tmp_path: Path) -> None:
    teacher = network()
    before = copy.deepcopy(teacher.state_dict())
    # What is named is not on trial, so that there are rounds alone.
    options = {"agreement": 100, "drop": None, "steps": 8, "schedule": "joint", "grid_lr": 0.05}
    found = searched(tmp_path, **options)
    kinds = {(row["kind"], row["widths"]) for row in found.trials}
    assert ("trained", "W4A4") in kinds
    assert all(before[name].equal(x) for name, x in teacher.state_dict().items())
    best = max(row["agreement"] for row in found.trials if row["widths"] == "W4A4")
    assert found.measured.agreement == best
    # A second call finds every trial, and the same student.
    again = searched(tmp_path, **options)
    assert again.trials == found.trials
    theirs, ours = (one.student.state_dict() for one in (found, again))
    assert all(ours[name].equal(x) for name, x in theirs.items())
    with pytest.raises(ArchnetError, match="another student"):
        other = archnet.convert(torch.nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images(2))
        archnet.search(
            other, nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), loader(), val=loader(),
            folder=tmp_path, agreement=99,
        )  # fmt: skip


def test_search_without_labels_goes_by_agreement() -> None:
    found = archnet.search(
        made(None), network(), images(), val=images(), weight_bits=8, act_bits=8, drop=60.0
    )
    assert found.measured.drop is None
    assert found.kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": None}, "nothing is promised"),
        ({"drop": -1.0}, "drop=-1 is no number of points"),
        ({"weight_bits": 9}, "9"),
        ({"grid_rl": 0.1}, "nearest valid"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchnetError, match=message):
        searched(**options)


def test_a_quantized_student_is_not_searched_from() -> None:
    with pytest.raises(QuantizationError, match="quantized already"):
        archnet.search(made(4), network(), loader(), val=loader(), drop=1.0)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
