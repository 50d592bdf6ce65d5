import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from archnet.capture import capture
from archnet.config import AugmentConfig, DataConfig, FitConfig, TaskConfig, TeacherConfig
from archnet.errors import ArchnetError
from archnet.tasks import ClassificationData
from archnet.teachers import TeacherError, load_teacher
from archnet.teachers.fit import teacher_folder, train_teacher
from archnet.teachers.load import fill, read_weights

DIGITS = {"num_classes": 10, "in_channels": 1, "image_size": 28}
COLOUR = {"num_classes": 10, "in_channels": 3, "image_size": 32}


def config(name="digits", source="archnet", **options):
    defaults = {"weights": None, "kwargs": {}}
    return TeacherConfig(name=name, source=source, **{**defaults, **options})


def digits_task():
    data = DataConfig(
        source="mnist5k",
        image_size=28,
        channels=1,
        mean=[0.1307],
        std=[0.3081],
        augment=AugmentConfig(crop=2),
    )
    return TaskConfig(name="mnist5k", num_classes=10, data=data)


def small_teacher(tmp_path, **fit):
    options = {"epochs": 2, "batch_size": 125, "lr": 0.2, "label_smoothing": 0.0, **fit}
    return config(kwargs={"width": 4}, cache_dir=str(tmp_path / "cache"), fit=FitConfig(**options))


def train(teacher, task=None, seed=0, **options):
    """Train the digits teacher as the pipeline does: weights drawn from the seed."""
    data = ClassificationData(task or digits_task(), seed=seed)
    torch.manual_seed(seed)
    model = load_teacher(teacher, **DIGITS)
    return train_teacher(
        model, data, teacher, seed=seed, accelerator="cpu", progress=False, **options
    )


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_teachers_of_older_caches_are_found(make_config):
    """The key of a cache does not change with keys that images or text do not read."""
    for options, name in (
        ((), "digits-dde96fa37fb0a64b"),
        (("experiment=phrases",), "transformer_tiny-faa8ca23c78a11de"),
    ):
        asked = make_config(*options)
        assert teacher_folder(asked.task, asked.teacher, 0).name == name


@pytest.mark.parametrize("end", ["argmax", "round", "detach"])
def test_what_has_no_gradient_is_not_trained(tmp_path, end):
    model = load_teacher(config(), **DIGITS)
    score = model.forward
    ends = {
        "argmax": lambda x: score(x).argmax(1),
        "round": lambda x: (score(x) > 0).float(),
        "detach": lambda x: score(x).detach(),
    }
    model.forward = ends[end]
    task = digits_task()
    teacher = TeacherConfig(name="digits", source="archnet", cache_dir=str(tmp_path), train=True)
    with pytest.raises(TeacherError, match="digits: its result has no gradient"):
        train_teacher(model, ClassificationData(task, 0), teacher, seed=0, progress=False)
    assert not list(tmp_path.rglob("*"))


# Networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet9", "digits"])
def test_networks_are_captured_and_answer_logits(name):
    shape = DIGITS if name == "digits" else COLOUR
    model = load_teacher(config(name), **shape)
    images = torch.randn(2, shape["in_channels"], shape["image_size"], shape["image_size"])
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_cifar_resnet_has_the_published_parameters():
    # Table 6 of 1512.03385 says 0.27 million for 20 layers; option A shortcuts have none.
    model = load_teacher(config("cifar_resnet", kwargs={"depth": 20}), **COLOUR)
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722


def test_the_zero_padded_shortcut_takes_every_second_pixel():
    model = load_teacher(config("cifar_resnet20", kwargs={"width": 4}), **COLOUR)
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 8, 8)
    y = block(x)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().max() == y[:, 6:].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cifar_resnet", "kwargs": {"depth": 21}}, r"6n \+ 2 layers"),
        ({"name": "digits", "kwargs": {"depth": 3}}, r"teacher\.kwargs=.*do not suit digits"),
        (
            {"name": "resnet999"},
            r"teacher\.name=resnet999 is not among archnet's own: cifar_resnet",
        ),
        ({"weights": "published"}, "source archnet publishes none"),
        (
            {"name": "resnet999", "source": "torchvision"},
            "no classifier and no segmenter of torchvision",
        ),
        ({"source": "custom", "factory": "torch.nn.Linear"}, "write package.module:callable"),
        ({"source": "custom", "factory": "torch.nn:Nothing"}, "cannot be imported"),
        ({"source": "custom", "factory": "no.such.place:f"}, "cannot be imported"),
        ({"source": "custom", "factory": "builtins:dict"}, "returned dict, not a torch.nn.Module"),
        ({"weights": "nowhere.pt"}, r"teacher\.weights=nowhere\.pt is not a file"),
    ],
)
def test_what_cannot_be_built_says_what_to_set(options, message):
    with pytest.raises(TeacherError, match=message):
        load_teacher(config(**options), **DIGITS)


def test_timm_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TeacherError, match=r"archnet\[timm\]"):
        load_teacher(config("resnet18", "timm"), **COLOUR)


def test_torchvision_networks_are_built_for_the_task():
    model = load_teacher(config("squeezenet1_1", "torchvision"), **COLOUR)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_published_weights_without_network_name_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(TeacherError, match=r"teacher\.weights=<file>"):
        load_teacher(config("squeezenet1_1", "torchvision", weights="published"), **COLOUR)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**DIGITS, "in_channels": 3}, "does not accept the task's images"),
        ({**DIGITS, "num_classes": 7}, r"answers \(1, 10\) to one image"),
    ],
)
def test_a_network_for_another_task_is_refused(task, message):
    factory = "archnet.teachers:DigitNet"
    with pytest.raises(TeacherError, match=message):
        load_teacher(config("mine", "custom", factory=factory), **task)


# Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dicts_are_unwrapped(tmp_path, suffix, nest, prefix):
    saved = load_teacher(config(), **DIGITS)
    state = {f"{prefix}{name}": tensor for name, tensor in saved.state_dict().items()}
    file = tmp_path / f"weights{suffix}"
    torch.save({nest: state, "epoch": 3} if nest else state, file)
    loaded = load_teacher(
        config("mine", "custom", factory="archnet.teachers:DigitNet", weights=str(file)), **DIGITS
    )
    assert same(saved, loaded)


def test_safetensors_are_read_and_batch_counters_may_be_missing(tmp_path):
    saved = load_teacher(config(), **DIGITS)
    state = {k: v for k, v in saved.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_teacher(config(weights=str(tmp_path / "weights.safetensors")), **DIGITS)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda thing, file: pickle.dump(thing, file.open("wb"))]
)
def test_pickled_code_is_refused_and_not_executed(tmp_path, save):
    touched = tmp_path / "executed"
    save({"state_dict": {"x": torch.zeros(1)}, "y": Malicious(touched)}, tmp_path / "weights.pth")
    with pytest.raises(TeacherError, match="pickled code is never executed"):
        read_weights(tmp_path / "weights.pth")
    assert not touched.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    file = tmp_path / name
    state = load_teacher(config(), **DIGITS).state_dict()
    torch.save(state, file) if name.endswith("pt") else save_file(state, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TeacherError, match=name):
        read_weights(file)


@pytest.mark.parametrize("nest", [False, True])
def test_a_flipped_bit_of_a_weight_is_found(tmp_path, nest):
    """Torch itself does not look at the checksums that it writes."""
    file = tmp_path / "weights.pt"
    state = {"head.weight": torch.full((5, 7), 0.3)}
    torch.save({"state_dict": state} if nest else state, file)
    content = bytearray(file.read_bytes())
    content[content.index(state["head.weight"].numpy().tobytes()) + 9] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)
    with pytest.raises(TeacherError, match=r"weights\.pt is damaged: .* another checksum"):
        read_weights(file)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(1)], {"state_dict": {}}])
def test_a_file_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(TeacherError, match="holds no state dict"):
        read_weights(tmp_path / "weights.pt")


def test_the_first_five_mismatches_are_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    state = {**nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 9)).state_dict(), "extra": torch.ones(1)}
    with pytest.raises(TeacherError) as error:
        fill(model, state, "file.pt")
    assert str(error.value) == (
        "teacher.weights=file.pt do not fit the network, 5 mismatches: "
        "1.weight: (9, 3) in the file, (4, 3) in the network; "
        "1.bias: (9,) in the file, (4,) in the network; 2.weight: missing in the file; "
        "2.bias: missing in the file; extra: not in the network: "
        "check teacher.name, teacher.kwargs and the number of classes"
    )
    with pytest.raises(TeacherError, match="6 mismatches") as error:
        fill(model, {**state, "more": torch.ones(1)}, "file.pt")
    assert "more" not in str(error.value)


# Training -----------------------------------------------------------------------------------


def test_a_trained_teacher_is_cached_by_its_config(tmp_path, monkeypatch):
    teacher = small_teacher(tmp_path)
    model = train(teacher)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    data = ClassificationData(digits_task(), seed=0)
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in data.val_dataloader())
    assert hits / 500 > 0.5
    folder = teacher_folder(digits_task(), teacher, 0)
    assert sorted(file.name for file in folder.iterdir()) == ["teacher.json", "teacher.safetensors"]
    monkeypatch.setattr("lightning.Trainer.fit", lambda *a, **k: pytest.fail("trained again"))
    assert same(model, train(teacher))


def test_the_cache_key_follows_what_the_teacher_learns_from(tmp_path):
    teacher, task = small_teacher(tmp_path), digits_task()
    key = teacher_folder(task, teacher, 0)
    assert key == teacher_folder(replace(task, data=replace(task.data, workers=3)), teacher, 0)
    others = [
        teacher_folder(task, teacher, 1),
        teacher_folder(task, replace(teacher, kwargs={"width": 3}), 0),
        teacher_folder(task, replace(teacher, fit=replace(teacher.fit, lr=0.3)), 0),
        teacher_folder(replace(task, data=replace(task.data, augment=AugmentConfig())), teacher, 0),
        teacher_folder(replace(task, data=replace(task.data, root="elsewhere")), teacher, 0),
    ]
    assert len({key, *others}) == 6


def test_a_restart_trains_the_cached_teacher_on(tmp_path, monkeypatch):
    once = small_teacher(tmp_path, epochs=1)
    twice = replace(once, fit=replace(once.fit, restarts=[1]))
    first = train(once)
    fits, fit = [], lightning.Trainer.fit
    monkeypatch.setattr("lightning.Trainer.fit", lambda *a, **k: (fits.append(1), fit(*a, **k)))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure: closure())
    # With an optimiser that stands still the second cycle ends where the first one did, but for
    # the running statistics, which have seen more batches.
    second = train(twice)
    assert fits == [1]
    assert torch.equal(first.linear.weight, second.linear.weight)
    counter = "features.1.num_batches_tracked"
    assert second.state_dict()[counter] == 2 * first.state_dict()[counter]
    facts = [
        json.loads((teacher_folder(digits_task(), t, 0) / "teacher.json").read_text())
        for t in (once, twice)
    ]
    assert facts[1]["images_seen"] == 2 * facts[0]["images_seen"]


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    killed = small_teacher(tmp_path, epochs=1)
    script = textwrap.dedent(f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from archnet.teachers import fit
        from test_teachers import small_teacher, train
        step = fit._TeacherTraining.on_train_batch_start
        def kill_at_20(self, batch, index):
            if self.trainer.global_step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, batch, index)
        fit._TeacherTraining.on_train_batch_start = kill_at_20
        from pathlib import Path
        train(small_teacher(Path({str(tmp_path)!r}), epochs=1), checkpoint_every=8)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (teacher_folder(digits_task(), killed, 0) / "last.ckpt").is_file()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = train(killed)
        unbroken = train(replace(killed, cache_dir=str(tmp_path / "other")))
    finally:
        torch.set_num_threads(threads)
    assert same(resumed, unbroken)


def test_a_loss_that_diverges_stops_and_keeps_the_last_checkpoint(tmp_path):
    teacher = small_teacher(tmp_path, lr=1e20, warmup=0.9)
    with pytest.raises(TeacherError, match=r"loss is \S+ at step \d+: lower teacher\.fit\.lr"):
        train(teacher, checkpoint_every=1)
    folder = teacher_folder(digits_task(), teacher, 0)
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]


# Wrappings, heads and numbers that are none ---------------------------------------------------


class Ends(nn.Module):
    """A classifier of digits that ends with ``head``."""

    def __init__(self, head):
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), head

    def forward(self, x):
        return self.head(self.net(x))


MADE = {
    "plain": lambda: Ends(lambda y: y),
    "wrapped": lambda: nn.DataParallel(torch.compile(Ends(lambda y: y))),
    "in a mapping": lambda: Ends(lambda y: {"logits": y, "loss": None}),
    "probabilities": lambda: Ends(lambda y: y.softmax(1)),
    "decisions": lambda: Ends(lambda y: y.argmax(1)),
}


def made(kind):
    return MADE[kind]()


def from_here(kind, **options):
    where = f"{__name__}:made"
    return config("own", "custom", factory=where, kwargs={"kind": kind}, **options)


@pytest.mark.parametrize("kind", MADE)
def test_teachers_of_others_are_unwrapped_and_filled(kind, tmp_path):
    source = Ends(lambda y: y)
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    model = load_teacher(from_here(kind, weights=str(tmp_path / "a.pt")), **DIGITS)
    x = torch.randn(3, 1, 28, 28)
    assert isinstance(model(x), torch.Tensor)
    torch.testing.assert_close(capture(model, x).scores()(x), source(x))


def test_several_results_and_other_classes_are_said(monkeypatch):
    monkeypatch.setitem(MADE, "two", lambda: Ends(lambda y: {"a": y, "b": y + 1}))
    monkeypatch.setitem(MADE, "five", lambda: Ends(lambda y: y[:, :5].argmax(1)))
    with pytest.raises(TeacherError, match=r"teacher own: .* 2 values, result\['a'\]"):
        load_teacher(from_here("two"), **DIGITS)
    with pytest.raises(TeacherError, match=r"answers \(1, 5\) to one image"):
        load_teacher(from_here("five"), **DIGITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features.0.weight", float("nan")),
        ("features.1.running_mean", float("inf")),
        ("features.1.running_var", -1.0),
        ("linear.bias", float("-inf")),
    ],
)
def test_weights_that_are_not_finite_are_named(name, value, tmp_path):
    state = load_teacher(config(), **DIGITS).state_dict()
    state[name].flatten()[0] = value
    torch.save(state, tmp_path / "broken.pt")
    # Where a blank image hides it (a ReLU of minus infinity), conversion names it.
    with pytest.raises(ArchnetError, match=f"{name} has"):
        capture(
            load_teacher(config(weights=str(tmp_path / "broken.pt")), **DIGITS),
            torch.zeros(1, 1, 28, 28),
        )
