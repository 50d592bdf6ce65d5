"""Jobs: segmentation, features and custom, one from outside the package, and their bad inputs."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.regression import MeanSquaredError

from archnet.cli import main
from archnet.config import Config, DataConfig, TaskConfig
from archnet.errors import ArchnetError, ConfigError, TaskError
from archnet.jobs import TensorJob, check_data, conductor, kinds, register
from archnet.jobs.registry import job_class
from archnet.runs import RunFolder, read_json
from archnet.runs.device import set_up
from archnet.tasks import SegmentationData, masks
from archnet.tasks.modules import ModuleData

Make = Callable[..., Config]
SHORT = (
    "trainer=debug",
    "trainer.progress=false",
    "distill.steps=4",
    "task.data.batch_size=8",
    "teacher.source=custom",
    "teacher.train=false",
    "teacher.weights=null",
)
HERE = "test_jobs"  # as what the modules below are imported


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


# What users bring --------------------------------------------------------------------------


class Wave(nn.Module):
    """A number for every position of a signal (B, 4, 16): (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Scores(nn.Module):
    """Three classes of a picture (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def signals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 16, generator=generator)
    return x, x.mean(1)


class Signals(lightning.LightningDataModule):
    """Signals and a number for each position."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size

    def _loader(self, seed: int) -> DataLoader:
        return DataLoader(TensorDataset(*signals(self.size, seed)), batch_size=16)

    def train_dataloader(self) -> DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader:
        return self._loader(2)


class WithoutTest(Signals):
    test_dataloader = lightning.LightningDataModule.test_dataloader


class Endless(Signals):
    def train_dataloader(self) -> object:  # type: ignore[override]
        return iter(lambda: signals(4, 0), None)


class Dictionaries(Signals):
    """Mappings, as Hugging Face's collators give them."""

    def _loader(self, seed: int) -> DataLoader:
        x, y = signals(self.size, seed)
        rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
        return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


class Bytes(Signals):
    def _loader(self, seed: int) -> DataLoader:
        x = torch.zeros(8, 4, 16, dtype=torch.uint8)
        return DataLoader(TensorDataset(x), batch_size=4)


class Broken(Signals):
    def setup(self, stage: str) -> None:
        raise ValueError("no such file: x.npy")


NOT_A_MODULE = dict


# A job from outside the package --------------------------------------------------------------


class Positions(TensorJob):
    """A number for every position, judged by the mean squared error."""

    unit = "signal"
    in_points = False

    def open(self) -> None:
        set_up(self.config.trainer)
        self.data = ModuleData(self.config.task, self.config.seed)
        self.teacher = Wave().eval().requires_grad_(False)

    def metrics(self, shape: tuple[int, ...]) -> Mapping[str, Metric]:
        return {"mse": MeanSquaredError()}

    @property
    def classes(self) -> None:
        return None


def config_of(make: Make, *options: str) -> Config:
    places = (f"task.datamodule={HERE}:Signals", f"teacher.factory={HERE}:Wave")
    return make("task=custom", *SHORT, *places, *options)


@pytest.mark.parametrize("kind", ["positions", f"{HERE}:Positions"])
def test_a_job_of_ones_own_is_a_class_and_a_name(make_config: Make, kind: str) -> None:
    register("positions", Positions)
    assert "positions" in kinds()
    assert job_class(kind) is Positions
    folder = conductor.run(config_of(make_config, f"task.kind={kind}"))
    metrics = read_json(folder.metrics)
    assert metrics["data"]["unit"] == "signal"
    assert metrics["student"]["mse"] > 0
    assert metrics["student"]["relative_error"] < 20
    assert metrics["audit"]["pure"]
    assert metrics["parity"]["max_abs_diff"] < 1e-4
    page = (folder.path / "report.html").read_text()
    assert "mse" in page
    assert main(["verify", str(folder.path), "inputs=16"]) == 0


def test_a_kind_that_is_none_is_one_line(make_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"task\.kind=segmention is not one of .*segmentation"):
        make_config("task.kind=segmention")
    for kind, said in ((f"{HERE}:Wave", "is no archnet.jobs.Job"), ("nowhere:Job", "cannot be")):
        with pytest.raises(ConfigError, match=said):
            job_class(kind)


def test_code_of_somebody_elses_folder_is_not_run(make_config: Make, tmp_path: Path) -> None:
    folder = conductor.run(config_of(make_config))
    (folder.path / "origin.json").unlink()
    with pytest.raises(ArchnetError, match=r"would run task\.datamodule=.*trust=true"):
        conductor.reopen(RunFolder.open(folder.path))


# Custom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["Signals", "Dictionaries"])
def test_a_module_and_a_metric_of_ones_own(make_config: Make, module: str) -> None:
    options = (
        f"task.datamodule={HERE}:{module}",
        "+task.datamodule_kwargs.size=24",
        "task.metric=torchmetrics.regression:MeanAbsoluteError",
        "task.classes=none",
    )
    folder = conductor.run(config_of(make_config, *options))
    metrics = read_json(folder.metrics)
    assert metrics["data"]["evaluated"] == 24
    assert metrics["student"]["MeanAbsoluteError"] > 0
    assert metrics["student"]["agreement"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["task.datamodule=null"], "task.data.root is missing.*task.datamodule="),
        ([f"task.datamodule={HERE}:WithoutTest"], "has no test_dataloader"),
        ([f"task.datamodule={HERE}:Endless"], "cannot be drawn from by number"),
        ([f"task.datamodule={HERE}:Bytes"], "holds torch.uint8"),
        ([f"task.datamodule={HERE}:Broken"], "its setup fails: ValueError: no such file"),
        ([f"task.datamodule={HERE}:NOT_A_MODULE"], "is a dict, not a LightningDataModule"),
        ([f"task.datamodule={HERE}:Missing"], "cannot be imported"),
        (["+task.datamodule_kwargs.size=0"], "the dataset of train_dataloader is empty"),
        ([f"task.metric={HERE}:Wave"], "is a Wave, not a torchmetrics.Metric"),
        (["task.metric=torchmetrics.classification:MulticlassAccuracy"], "cannot be made"),
        (
            [
                "task.metric=torchmetrics.classification:MulticlassAccuracy",
                "+task.metric_kwargs.num_classes=3",
            ],
            "metric MulticlassAccuracy does not take results",
        ),
        (["teacher.train=true"], "teacher.train=true has no meaning for task.kind=custom"),
        ([f"teacher.factory={HERE}:Scores"], "does not accept the task's inputs"),
    ],
)
def test_bad_modules_and_metrics_are_one_line(
    make_config: Make, options: list[str], said: str
) -> None:
    with pytest.raises(ArchnetError, match=said) as caught:
        conductor.run(config_of(make_config, *options))
    assert "\n" not in str(caught.value)


# Features -------------------------------------------------------------------------------------


def pictures(folder: Path, count: int = 24, side: int = 8) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def test_features_of_images_need_no_labels(make_config: Make, tmp_path: Path) -> None:
    pictures(tmp_path / "data" / "cats")
    options = (
        f"task.data.root={tmp_path}/data",
        "task.data.image_size=8",
        "task.data.mean=[0.5,0.5,0.5]",
        "task.data.std=[0.25,0.25,0.25]",
        "task.data.workers=0",
        f"teacher.factory={HERE}:Scores",
        "quant=none",
    )
    folder = conductor.run(make_config("task=features", *SHORT, *options))
    student = read_json(folder.metrics)["student"]
    assert student["agreement"] is None
    assert student["relative_error"] < 2
    assert student["cosine"] > 0.999


class TwoResults(Scores):
    """An embedding, and a map."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        features = self.layers[1](self.layers[0](x))
        return {"vector": self.layers[3](features.flatten(1)), "map": features * 0.5}


def test_a_network_with_two_results_is_judged_by_each(make_config: Make, tmp_path: Path) -> None:
    pictures(tmp_path / "data", 40)
    options = (
        f"task.data.root={tmp_path}/data",
        "task.data.image_size=8",
        "task.data.mean=[0.5,0.5,0.5]",
        "task.data.std=[0.25,0.25,0.25]",
        "task.data.workers=0",
        f"teacher.factory={HERE}:TwoResults",
    )
    folder = conductor.run(make_config("task=features", *SHORT, *options))
    metrics = read_json(folder.metrics)
    assert [row["name"] for row in metrics["outputs"]] == ["vector", "map"]
    worst = max(row["relative_error"] for row in metrics["outputs"])
    assert worst == metrics["student"]["relative_error"] < 5
    assert f"{worst:.2f} % from the teacher's" in json.dumps(metrics["verdict"])
    assert metrics["parity"]["mismatches"] == 0
    assert main(["verify", str(folder.path), "inputs=20"]) == 0
    # A classifier gives one result.
    wrong = [option for option in options if "labels" not in option]
    with pytest.raises(ArchnetError, match="returns 2 values"):
        conductor.run(make_config("task=images", *SHORT, *wrong, "task.num_classes=3"))


# Segmentation ---------------------------------------------------------------------------------


def mask(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    (image.convert(mode) if mode else image).save(path)


def photo(path: Path, side: int = 8) -> None:
    mask(path, np.full((side, side, 3), 100))


CLASSES = np.arange(64).reshape(8, 8) % 3


def by_split_first(root: Path) -> None:
    for split in ("train", "val", "test"):
        for index in range(6):
            photo(root / split / "images" / f"{index}.jpg")
            mask(root / split / "masks" / f"{index}.png", CLASSES)


def by_kind_first(root: Path) -> None:
    for split in ("train", "val", "test"):
        for index in range(6):
            photo(root / "images" / split / f"{index}.jpg")
            mask(root / "annotations" / split / f"{index}.png", CLASSES)


def without_splits(root: Path) -> None:
    for index in range(18):
        photo(root / "JPEGImages" / f"{index}.jpg")
        mask(root / "SegmentationClass" / f"{index}.png", CLASSES, "P" if index % 2 else None)


def in_parquet(root: Path) -> None:
    without_splits(root / "x")
    rows = []
    for index in range(18):
        image = (root / "x" / "JPEGImages" / f"{index}.jpg").read_bytes()
        of_pixels = (root / "x" / "SegmentationClass" / f"{index}.png").read_bytes()
        rows.append({"image": {"bytes": image}, "mask": {"bytes": of_pixels}})
    pq.write_table(pa.Table.from_pylist(rows), root / "train-0.parquet")


def task_of(root: Path, **options: object) -> TaskConfig:
    data = DataConfig(
        root=str(root), image_size=8, mean=[0.5] * 3, std=[0.5] * 3, eval_batch_size=4,
        test_fraction=0.3,
    )  # fmt: skip
    return TaskConfig(kind="segmentation", num_classes=3, data=data, **options)  # type: ignore


@pytest.mark.parametrize("layout", [by_split_first, by_kind_first, without_splits, in_parquet])
def test_masks_are_found(layout: Callable[[Path], None], tmp_path: Path) -> None:
    layout(tmp_path / "data")
    check_data(Config(task=task_of(tmp_path / "data")))
    data = SegmentationData(task_of(tmp_path / "data"), 0)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.int64
    for found in labels:
        np.testing.assert_array_equal(found.numpy(), CLASSES)
    assert all(isinstance(batch, Tensor) for batch in data.train_dataloader())


def test_masks_turn_with_their_images(tmp_path: Path) -> None:
    """A picture whose grey is its class: after crops and flips the two still say the same."""
    root = tmp_path / "data"
    random = np.random.default_rng(0)
    for index in range(8):
        classes = random.integers(0, 3, (8, 8))
        mask(root / "images" / f"{index}.png", np.stack([classes * 100 + 20] * 3, -1))
        mask(root / "masks" / f"{index}.png", classes)
    task = task_of(root)
    task.data.augment.crop, task.data.augment.flip = 3, True
    data = SegmentationData(task, 0)
    data.setup()
    loader = data.step_loader(data.labelled(), 4, 6)
    seen = set()
    for images, labels in loader:
        grey = (images[:, 0] * 0.5 + 0.5) * 255
        expected = torch.where(grey < 1, -1, ((grey - 20) / 100).round().long())
        assert torch.equal(labels, expected)
        seen |= {tuple(label.flatten().tolist()) for label in labels}
    assert len(seen) > 8, "nothing was turned"


def test_scaled_masks_hold_whole_classes(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for index in range(8):
        photo(root / "images" / f"{index}.png", 32)
        mask(root / "masks" / f"{index}.png", np.kron(CLASSES, np.ones((4, 4))))
    data = SegmentationData(task_of(root), 0)
    data.setup()
    _, labels = next(iter(data.test_dataloader()))
    np.testing.assert_array_equal(labels[0].numpy(), CLASSES)


def of_another_size(root: Path) -> None:
    without_splits(root)
    for path in (root / "SegmentationClass").iterdir():
        mask(path, CLASSES[:4])


def of_another_class(root: Path) -> None:
    without_splits(root)
    for path in (root / "SegmentationClass").iterdir():
        mask(path, CLASSES + 5)


def in_colour(root: Path) -> None:
    without_splits(root)
    for path in (root / "SegmentationClass").iterdir():
        photo(path)


def cut_off(root: Path) -> None:
    without_splits(root)
    for path in (root / "SegmentationClass").iterdir():
        path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (of_another_size, "is 8x4 pixels and its image 8x8"),
        (of_another_class, "has a pixel of class 7, and there are classes 0 to 2"),
        (in_colour, "is RGB: a mask holds one number a pixel"),
        (cut_off, "cannot be decoded"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(
    layout: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    layout(tmp_path / "data")
    data = SegmentationData(task_of(tmp_path / "data"), 0)
    data.setup()
    with pytest.raises(TaskError, match=said):
        list(data.test_dataloader())


def test_pixels_without_a_class_do_not_count(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for index in range(8):
        photo(root / "images" / f"{index}.png")
        mask(root / "masks" / f"{index}.png", np.where(CLASSES == 2, 9, CLASSES))
    data = SegmentationData(task_of(root, ignored=9), 0)
    data.setup()
    _, labels = next(iter(data.test_dataloader()))
    assert (labels[0].numpy() == np.where(CLASSES == 2, -1, CLASSES)).all()


def test_names_of_masks_that_are_no_images_are_said(tmp_path: Path) -> None:
    photo(tmp_path / "data" / "images" / "a.png")
    mask(tmp_path / "data" / "masks" / "b.png", CLASSES)
    with pytest.raises(TaskError, match=r"no mask in .* is named as an image"):
        check_data(Config(task=task_of(tmp_path / "data")))


def test_images_without_masks_leave_agreement(tmp_path: Path) -> None:
    for index in range(6):
        photo(tmp_path / "data" / "images" / f"{index}.png")
    found = masks.read(task_of(tmp_path / "data").data, "x")
    assert "has no masks" in found.notes[0]
    data = SegmentationData(task_of(tmp_path / "data"), 0)
    data.setup()
    _, labels = next(iter(data.test_dataloader()))
    assert (labels == -1).all()


def test_scenes_hold_digits_of_their_own_split() -> None:
    parts = masks.scenes().parts
    for part in parts.values():
        assert part.images.shape[1:] == (masks.SCENE, masks.SCENE, 1)
        assert ((part.masks > 0) <= (part.images[..., 0] > 0)).all()
        assert set(np.unique(part.masks)) == set(range(11))


@pytest.mark.slow
def test_a_segmenter_goes_the_whole_way(make_config: Make) -> None:
    folder = conductor.run(
        make_config(
            "experiment=scenes", "teacher.fit.epochs=1", "distill.steps=20",
            "distill.joint_steps=10", "trainer.progress=false", "trainer.limit_eval=60",
        )
    )  # fmt: skip
    metrics = read_json(folder.metrics)
    assert metrics["audit"] == {"pure": True, "violations": [], "not_judged": {}}
    assert metrics["parity"]["mismatches"] == 0
    assert 0 < metrics["student"]["miou"] <= 100
    assert metrics["data"]["evaluated"] == 60
    assert main(["verify", str(folder.path), "inputs=20"]) == 0
    for form in ("c", "tflite"):
        assert main(["export", str(folder.path), f"form={form}"]) == 0
    # How a picture becomes the input stands in the files.
    kept = {item.key: item.value for item in onnx.load(folder.onnx).metadata_props}
    stated = json.loads(kept["preprocessing"])
    assert stated["height"] == stated["width"] == masks.SCENE
    assert stated == metrics["preprocessing"]
    assert '"mean": [0.1307]' in (folder.path / "student_c.h").read_text()
    assert json.loads((folder.path / "stages" / "evaluate.json").read_text())["inputs"] == 60
