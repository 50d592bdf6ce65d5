"""Arch-Distillation: schedules, what training does, and that nothing is lost when it stops."""

import shutil
from collections import namedtuple
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from archnet.capture import capture
from archnet.config import DistillConfig, OptimizerConfig
from archnet.convert import convert
from archnet.distill import ArchDistillation, DistillError, plan
from archnet.distill import train as distill
from archnet.distill.cache import FeatureCache
from archnet.distill.comparison import ResidualAdaptation, TapComparison, TeacherAttention
from archnet.distill.run import newest_checkpoint
from archnet.distill.schedule import period_at
from archnet.quant import Recipe, grid_steps, quantize
from archnet.tasks import StepBatchSampler
from archnet.teachers.nets import CifarResNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]
TRAINER = SimpleNamespace(
    accelerator="cpu",
    devices=1,
    strategy="auto",
    precision="32-true",
    progress=False,
    progress_seconds=30,
)
BATCH, IMAGES, STEPS = 8, 48, 12
SCHEDULES = {
    "joint": {"schedule": "joint"},
    "joint, averaged": {"schedule": "joint", "average": 0.9},
    "joint, mixed": {"schedule": "joint", "mixup": 0.5},
    "progressive": {"schedule": "progressive"},
    "local": {"schedule": "local", "joint_steps": 4},
    "local on the student's own": {"schedule": "local", "joint_steps": 4, "inputs": "student"},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def options(schedule="joint", **changes):
    base = DistillConfig(
        steps=STEPS, checkpoint_every=5, val_every=100, val_images=16, cache_images=IMAGES,
        optimizer=OptimizerConfig(lr=3e-3),
    )  # fmt: skip
    return replace(base, **{**SCHEDULES[schedule], **changes})


class Images(torch.utils.data.Dataset):
    """Random images; ``labels`` go with them only where they are asked for."""

    def __init__(self, labels=None):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(IMAGES, 3, 8, 8, generator=generator)
        self.labels = labels

    def __len__(self):
        return IMAGES

    def __getitems__(self, draws):
        index = torch.tensor([draw[0] for draw in draws])
        images = self.images[index]
        return images if self.labels is None else (images, self.labels[index])


class Data:
    """The task as distillation sees it; ``seen`` keeps what training was given."""

    config = SimpleNamespace(data=SimpleNamespace(batch_size=BATCH, eval_batch_size=16))

    def __init__(self, labels=None):
        self.labels = torch.zeros(IMAGES, dtype=torch.long) if labels is None else labels
        self.seen = []

    def unlabelled(self):
        return Images()

    def step_loader(self, dataset, batch_size, steps, *, start=0, rank=0, world=1):
        sampler = StepBatchSampler(len(dataset), batch_size, steps, 0, start=start)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=self.note)

    def val_dataloader(self):
        sampler = StepBatchSampler(IMAGES, 16, 3, 0)
        return DataLoader(Images(self.labels), batch_sampler=sampler, collate_fn=lambda x: x)

    def note(self, batch):
        self.seen.append(batch)
        return batch


def network():
    torch.manual_seed(0)

    def conv(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*conv(3, 8), *conv(8, 8), nn.MaxPool2d(2), *conv(8, 8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)).eval()


@cache
def captured():
    return capture(network(), torch.zeros(2, 3, 8, 8))


def pair(bits=(2, 4)):
    """The teacher with its taps, and a student of it, quantized where bits are given."""
    graph = captured()
    network()  # leaves the generator where it is without the cache
    student = convert(graph)
    if bits:
        quantize(student, Recipe(*bits, first_bits=4, last_bits=4), calibration=[Images().images])
    return graph.features([tap.node for tap in student.taps]), student


def train(folder, config, data=None, **changes):
    teacher, student = pair()
    facts = distill(
        teacher, student, data or Data(), config, trainer=TRAINER, folder=folder, **changes
    )
    return student, facts


def distance(teacher, student):
    """Mean loss over taps and class scores, on all images."""
    images = Images().images
    with torch.no_grad():
        *features, scores = teacher(images)
        values = [*(tap.value for tap in student.taps), student.graph.outputs[0]]
        ours = student.eval().run({student.graph.inputs[0]: images}, values)
    pairs = zip(ours, [*features, scores], strict=True)
    return sum(((a - b).square().mean() / b.var()).item() for a, b in pairs)


def assert_equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Schedules ----------------------------------------------------------------------------------


def summary(periods):
    return [(p.first, p.last, dict(p.weights), p.logits, p.source) for p in periods]


def test_joint_has_one_period_of_all_taps():
    periods = plan(options(steps=10), ["a", "b"], True)
    assert summary(periods) == [(0, 10, {0: 1, 1: 1}, True, None)]


def test_progressive_adds_a_tap_a_period_and_the_logits_last():
    periods = plan(options("progressive", steps=40, decay=0.5), ["a", "b", "c"], True)
    assert summary(periods) == [
        (0, 10, {0: 1.0}, False, None),
        (10, 20, {0: 0.5, 1: 1.0}, False, None),
        (20, 40, {0: 0.25, 1: 0.5, 2: 1.0}, True, None),
    ]


@pytest.mark.parametrize("tail", [True, False])
def test_local_trains_every_block_alone_then_all(tail):
    periods = plan(options("local", steps=10, joint_steps=4), ["a", "b"], tail)
    blocks = [(0, 6, {0: 1.0}, False, -1), (6, 12, {1: 1.0}, False, 0)]
    classifier = [(12, 18, {}, True, 1)] if tail else []
    end = 18 if tail else 12
    assert summary(periods) == [*blocks, *classifier, (end, end + 4, {0: 1, 1: 1}, True, None)]
    assert [period.rate for period in periods[:-1]] == [1.0] * (len(periods) - 1)
    assert periods[-1].rate == options("local").joint_rate < 1


@every_schedule
def test_periods_cover_the_steps_without_gap(schedule):
    periods = plan(options(schedule), ["a", "b", "c"], True)
    assert periods[0].first == 0
    assert all(a.last == b.first for a, b in pairwise(periods))
    assert all(period_at(periods, p.first) is p is period_at(periods, p.last - 1) for p in periods)
    assert period_at(periods, periods[-1].last) is periods[-1]


def test_no_steps_need_no_periods_and_no_taps_are_refused():
    assert plan(options(steps=0), [], True) == []
    with pytest.raises(DistillError, match=r"convert\.taps"):
        plan(options("progressive"), [], True)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [("constant", [1, 1, 1]), ("cosine", [1, 0.505, 0.01]), ("warm_restarts", [1, 1, 0.01])],
)
def test_learning_rates_start_anew_in_every_period(curve, expected):
    periods = plan(options("progressive", steps=2800), ["a", "b"], True)
    teacher, student = pair()
    module = ArchDistillation(teacher, student, periods, options(lr_schedule=curve, warmup=0))
    second, length = periods[1].first, periods[1].steps
    at = [0, length * 3 // 7 if curve == "warm_restarts" else length // 2, length - 1]
    rates = [module.rate_at(second + step) for step in at]
    assert rates == pytest.approx(expected, abs=0.01)


def test_the_rate_rises_at_the_start_of_every_period():
    settings = options("progressive", steps=400, lr_schedule="constant", warmup=9)
    periods = plan(settings, ["a", "b"], True)
    module = ArchDistillation(*pair(), periods, settings)
    for period in periods:
        rates = [module.rate_at(period.first + step) for step in (0, 4, 9, 50)]
        assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_mixup_blends_images_of_the_batch_and_asks_the_teacher_about_them(monkeypatch):
    settings = options(mixup=1.0)
    teacher, student = pair()
    module = ArchDistillation(teacher, student, plan(settings, ["a"], True), settings)
    module._fabric = None
    module._trainer = SimpleNamespace(global_step=3, world_size=1, global_rank=0)
    asked = []
    monkeypatch.setattr(module, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    original = module.teacher_features
    monkeypatch.setattr(module, "teacher_features", lambda x: asked.append(x) or original(x))
    constant = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 8, 8)
    module.training_step(constant, 0)
    (mixed,) = asked
    assert mixed.amin() >= 0
    assert mixed.amax() <= 7
    assert (mixed - constant).flatten(1).abs().amax(1).count_nonzero() >= 4
    assert mixed.flatten(1).std(1).amax() < 1e-6


# Comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 5, 4), (7, 48)])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("adaptation", [True, False])
def test_comparisons_start_neutral(shape, attention, adaptation):
    comparison = TapComparison(shape, attention, adaptation)
    student, teacher = torch.randn(3, *shape), torch.randn(3, *shape)
    plain = (student - teacher).square().mean() / teacher.var()
    torch.testing.assert_close(comparison(student, teacher), plain)
    torch.testing.assert_close(comparison(student * 9, teacher * 9), plain)
    assert comparison(teacher, teacher) == 0


def test_attention_gates_channels_and_adaptation_maps_them():
    gate, adapt = TeacherAttention(48), ResidualAdaptation(48)
    nn.init.normal_(gate.expand.bias)
    nn.init.normal_(adapt.layers[-1].weight)
    student, teacher = torch.randn(2, 48, 5, 4), torch.randn(2, 48, 5, 4)
    ratio = gate(student, teacher) / student
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert ratio.std() > 0.1
    assert not torch.allclose(adapt(student, student), student)


# Training -----------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("helpers", [True, False])
def test_training_brings_the_student_nearer(tmp_path, schedule, helpers):
    teacher, before = pair()
    config = options(schedule, steps=40, attention=helpers, adaptation=helpers)
    after, facts = train(tmp_path, config)
    assert distance(teacher, after) < 0.85 * distance(teacher, before)
    assert facts["inputs_seen"] == 40 * BATCH
    assert facts["unlabelled"] == IMAGES
    assert not (tmp_path / "features").exists()
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert ours.requires_grad == theirs.requires_grad
    assert not after.training


def test_nothing_but_the_student_changes(tmp_path):
    (teacher, _), (untrained, before) = pair(), pair()
    student = pair()[1]
    distill(teacher, student, Data(), options(), trainer=TRAINER, folder=tmp_path)
    assert_equal(teacher, untrained)
    changed = {
        n for n, p in student.named_parameters() if not torch.equal(p, before.get_parameter(n))
    }
    assert changed == {n for n, p in before.named_parameters() if p.requires_grad}
    checkpoint = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "teacher" in name]


@every_schedule
def test_no_label_reaches_training(tmp_path, schedule):
    zeros, others = Data(), Data(torch.arange(IMAGES) % 4)
    first, _ = train(tmp_path / "a", options(schedule, val_every=3), zeros)
    second, _ = train(tmp_path / "b", options(schedule, val_every=3), others)
    assert_equal(first, second)
    for batch in others.seen:
        tensors = [batch] if isinstance(batch, torch.Tensor) else batch
        assert all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors)


# Stopping and going on ----------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stopping(monkeypatch, at, error):
    """Training ends with ``error`` in step ``at``."""
    original = ArchDistillation.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == at:
            raise error
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ArchDistillation, "training_step", training_step)


@every_schedule
@pytest.mark.parametrize("at", [6, 11])
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, monkeypatch, schedule, at):
    unbroken, _ = train(tmp_path / "unbroken", options(schedule))
    with monkeypatch.context() as patch:
        stopping(patch, at, StoppedError())
        with pytest.raises(StoppedError):
            train(tmp_path / "broken", options(schedule))
    assert newest_checkpoint(tmp_path / "broken").stem == f"step{at // 5 * 5}"
    data = Data()
    resumed, facts = train(tmp_path / "broken", options(schedule), data)
    assert_equal(resumed, unbroken)
    assert facts["earlier"] > 0


def test_ctrl_c_stops_with_the_step(tmp_path, monkeypatch):
    stopping(monkeypatch, 7, KeyboardInterrupt())
    with pytest.raises((KeyboardInterrupt, SystemExit, DistillError)):
        train(tmp_path, options())
    assert newest_checkpoint(tmp_path).stem == "step5"


def test_without_a_number_three_eighths_of_the_steps_are_joint():
    periods = plan(options("local", steps=16, joint_steps=None), ["a", "b"], False)
    assert [period.steps for period in periods] == [10, 10, 6]


def test_a_block_leaves_the_blocks_before_it_as_they_are(tmp_path):
    """The grid of a block's output is shared with the next block's addition."""
    torch.manual_seed(0)
    graph = capture(CifarResNet(8, width=4).eval(), torch.zeros(2, 3, 8, 8))
    student = convert(graph)
    quantize(student, Recipe(2, 4), calibration=[Images().images])
    teacher = graph.features([tap.node for tap in student.taps])
    settings = options("local on the student's own", joint_steps=0)
    module = ArchDistillation(
        teacher, student, plan(settings, [tap.path for tap in student.taps], True), settings
    )
    first, second = (tap.value for tap in student.taps[:2])
    (before,) = student.run({student.graph.inputs[0]: Images().images}, [first])
    period = module.periods[1]
    held = {id(parameter) for parameter in module._held_before(period)}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    values = module.enter(0, before.detach())
    student.run(values, [second])[0].square().mean().backward()
    moving = {id(p) for p in student.parameters() if p.grad is not None}
    assert held & moving  # the shared scale has a gradient, and must not follow it
    trainer = SimpleNamespace(global_step=period.first)
    module._fabric, module._trainer = None, trainer
    module.on_before_optimizer_step(optimizer)
    optimizer.step()
    assert torch.equal(student.run({student.graph.inputs[0]: Images().images}, [first])[0], before)


def test_numbers_on_a_grid_move_by_a_share_of_its_step():
    """One rate for all widths: at 8 bits a weight moves a few hundredths of what it does at 2."""
    moved = {}
    for bits in (2, 8):
        teacher, student = pair((bits, bits))
        sizes = grid_steps(student)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        conv = student.operator("conv2d_1_conv")
        rate = {"lr": 0.0, "grid_lr": 0.01}
        settings = options(steps=1, optimizer=OptimizerConfig(**rate), lr_schedule="constant")
        module = ArchDistillation(teacher, student, plan(settings, ["a"], True), settings)
        optimizer = module.configure_optimizers()["optimizer"]
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in student.named_parameters():
            # Adam's first move is its rate.
            size = sizes.get(name, torch.tensor(0.0)).expand_as(parameter)
            change = (parameter.detach() - before[name]).abs()
            torch.testing.assert_close(change, 0.01 * size, rtol=1e-2, atol=1e-6)
        moved[bits] = (conv.weight.detach() - before["operators.conv2d_1_conv.weight"]).abs().max()
    assert moved[8] < moved[2] / 20


def test_a_finished_run_trains_no_further(tmp_path):
    first, _ = train(tmp_path, options(steps=10))
    data = Data()
    again, _ = train(tmp_path, options(steps=10), data)
    assert_equal(first, again)
    assert not data.seen


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    train(tmp_path, options())
    good = newest_checkpoint(tmp_path)
    (tmp_path / "step99.ckpt").write_bytes(damage)
    assert newest_checkpoint(tmp_path) == good
    torn = good.read_bytes()
    (tmp_path / "step99.ckpt").write_bytes(torn[: len(torn) // 2])
    assert newest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("index", [0, 2])
def test_nan_names_tap_and_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, index):
    original = ArchDistillation.teacher_features

    def broken(self, images):
        features, scores = original(self, images)
        if self.global_step == 7:
            features[index] = features[index] * float("nan")
        return features, scores

    monkeypatch.setattr(ArchDistillation, "teacher_features", broken)
    path = pair()[1].taps[index].path
    with pytest.raises(DistillError, match=rf"at {path} is nan at step 7.*optimizer\.lr"):
        train(tmp_path, options())
    checkpoint = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    assert checkpoint["global_step"] == 5
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


# The feature cache --------------------------------------------------------------------------


def test_a_full_disk_is_said_before_features_are_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DistillError, match=r"0\.0 GB are free: lower distill\.cache_images"):
        train(tmp_path, options("local"))
    assert not list(tmp_path.rglob("*.npy"))


def test_the_cache_holds_all_of_an_array_or_nothing(tmp_path):
    def batches(count):
        for _ in range(count):
            yield [torch.full((4, 2), 1e6), torch.ones(4, 3)]
        if count < 3:
            raise StoppedError

    cache = FeatureCache(tmp_path)
    with pytest.raises(StoppedError):
        cache.write(["a", "b"], 10, batches(2))
    assert "a" not in cache
    cache.write(["a", "b"], 10, batches(3))
    assert "a" in cache
    assert "b" in cache
    assert cache.read("a").shape == (10, 2)
    assert cache.read("a").max() == 65504  # half precision's largest
    cache.clear()
    assert "a" not in cache


def test_a_float_student_moves_by_the_plain_rate():
    teacher, student = pair(None)
    before = [p.detach().clone() for p in student.parameters()]
    settings = options(steps=1, optimizer=OptimizerConfig(lr=0.01), lr_schedule="constant")
    module = ArchDistillation(teacher, student, plan(settings, ["a"], True), settings)
    optimizer = module.configure_optimizers()["optimizer"]
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for now, start in zip(student.parameters(), before, strict=True):
        torch.testing.assert_close(start - now, torch.full_like(now, 0.01), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_zeros_of_the_conversion_are_kept_if_asked(tmp_path, kept):
    teacher, student = pair()
    weight = student.operator("conv2d_1_conv").weight
    with torch.no_grad():
        weight[:, :2] = 0
    before = weight.detach().clone()
    settings = options(steps=4, keep_zeros=kept)
    distill(teacher, student, Data(), settings, trainer=TRAINER, folder=tmp_path)
    assert bool((weight[:, :2] == 0).all()) == kept
    assert not torch.equal(weight, before)


class Attending(nn.Module):
    """Two blocks of attention and a layer on tokens of pixels, and a smooth activation."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True) for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_taps_inside_of_blocks_are_compared_where_the_whole_network_runs(tmp_path):
    images = Images().images
    graph = capture(Attending().eval(), images[:2])
    student = convert(graph, calibration=images, inner_taps=True)
    outer = [tap for tap in student.taps if not tap.inner]
    inner = [tap for tap in student.taps if tap.inner]
    assert student.taps == [*outer, *inner]
    assert outer == convert(graph, calibration=images).taps
    assert {"blocks.0.self_attn", "blocks.1.self_attn"} < {tap.path for tap in inner}
    # The functional GELU stands in the module whose output is a tap: losses go by path.
    assert len({tap.path for tap in student.taps}) == len(student.taps)
    assert any(tap.path.startswith("gelu") for tap in inner)
    # Each carries what the report has measured there.
    rows = zip(graph.nodes, student.report, strict=True)
    errors = {node.name: row.error for node, row in rows if row.error is not None}
    features = graph.features([tap.node for tap in student.taps])
    *wanted, _ = features(images)
    found = student.run({student.graph.inputs[0]: images}, [tap.value for tap in student.taps])
    for tap, ours, theirs in zip(student.taps, found, wanted, strict=True):
        assert ours.shape == theirs.shape
        if tap.node in errors:
            error = float((ours - theirs).detach().norm() / theirs.norm())
            assert error == pytest.approx(errors[tap.node], rel=1e-3)
    quantize(student, Recipe(4, 4), calibration=[images])
    assert [tap.inner for tap in student.taps] == [False] * len(outer) + [True] * len(inner)
    for number, schedule in enumerate(("joint", "progressive", "local on the student's own")):
        folder, settings = tmp_path / str(number), options(schedule)
        distill(features, student, Data(), settings, trainer=TRAINER, folder=folder)
    assert all(bool(weight.isfinite().all()) for weight in student.parameters())


def test_periods_of_all_taps_have_those_inside_of_blocks():
    for schedule in ("joint", "progressive", "local"):
        *others, last = plan(options(schedule), ["a", "b"], True, inner=2)
        assert set(last.weights) == {0, 1, 2, 3}
        assert all(set(period.weights) <= {0, 1} for period in others)
