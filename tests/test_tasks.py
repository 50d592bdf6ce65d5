import gc
import json
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from archnet.config import AugmentConfig, DataConfig, TaskConfig
from archnet.tasks import ClassificationData, StepBatchSampler, TaskError
from archnet.tasks.images import Augmentation
from archnet.tasks.sampling import Draw

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
IMAGENET_SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample"


def task(root=None, *, augment=None, num_classes=None, **data):
    """A task of 8x8 colour images; normalisation leaves pixels in [0, 1]."""
    sizes = {"image_size": 8, "batch_size": 4, "eval_batch_size": 4}
    options = {**sizes, "mean": [0.0] * 3, "std": [1.0] * 3, **data}
    config = DataConfig(root=root and str(root), **options)
    config.augment = augment or AugmentConfig()
    return TaskConfig(name="test", num_classes=num_classes, data=config)


def image(value, size=(8, 8), mode="RGB"):
    """An image of one grey value, which tells in a batch which image was drawn."""
    return Image.new("L", size, value).convert(mode)


def write_folders(root, counts, size=(8, 8)):
    """Class folders with so many images each; every image has its own grey value."""
    value = 0
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            image(value, size).save(folder / f"{index:03}.png")
            value += 1
    return root


def encoded(value, path):
    image(value).save(path)
    return path.read_bytes()


def write_parquet(file, values, labels, folder, names=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(value, folder / "x.png"), "path": f"{value}.png"} for value in values]
    table = pa.table({"image": rows, "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file, **options)


def values(images):
    """The grey value of each image of a batch (B, C, 8, 8)."""
    return (images[:, 0, 4, 4] * 255).round().int().tolist()


def drawn(loader):
    return [value for images, _ in loader for value in values(images)]


# Sampling -----------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_alone():
    whole = list(StepBatchSampler(10, 4, 9, seed=3))
    assert list(StepBatchSampler(10, 4, 9, seed=3, start=5)) == whole[5:]
    assert StepBatchSampler(10, 4, 9, seed=3).batch(7) == whole[7]
    assert list(StepBatchSampler(10, 4, 9, seed=4)) != whole


def test_an_epoch_visits_every_item_once_and_no_key_comes_twice():
    draws = [draw for batch in StepBatchSampler(10, 4, 5, seed=0) for draw in batch]
    assert sorted(draw.item for draw in draws[:10]) == list(range(10))
    assert sorted(draw.item for draw in draws[10:]) == list(range(10))
    assert [draw.item for draw in draws[:10]] != [draw.item for draw in draws[10:]]
    assert len({draw.key for draw in draws}) == len(draws)


def test_processes_share_the_global_batch():
    whole = StepBatchSampler(10, 4, 3, seed=1)
    parts = [list(StepBatchSampler(10, 4, 3, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    for step, (first, second) in enumerate(zip(*parts, strict=True)):
        assert sorted(first + second) == sorted(whole.batch(step))


def test_length_counts_from_the_start_of_the_run():
    assert len(StepBatchSampler(10, 4, 9, seed=0, start=5)) == 9


@pytest.mark.parametrize(
    ("size", "batch_size", "world", "message"),
    [(0, 4, 1, "at least one item"), (10, 3, 2, "shared evenly"), (10, 0, 1, "shared evenly")],
)
def test_impossible_batches_are_refused(size, batch_size, world, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(size, batch_size, 1, seed=0, world=world)


# Augmentation -------------------------------------------------------------------------------


def test_a_view_depends_on_its_key_and_not_on_its_batch():
    pixels = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    keys = np.arange(6, dtype=np.uint64) * 977
    random = Augmentation(crop=2, flip=True)
    together = random.view(pixels, keys)
    for index in range(6):
        alone = random.view(pixels[index : index + 1], keys[index : index + 1])
        assert torch.equal(alone[0], together[index])


def test_views_are_shifts_and_mirror_images():
    column = torch.arange(1, 9, dtype=torch.uint8).repeat(64, 8, 1)[..., None]
    views = Augmentation(crop=2, flip=True).view(column, np.arange(64, dtype=np.uint64))
    seen = {tuple(view[4, :, 0].tolist()) for view in views}
    ramp = [0, 0, *range(1, 9), 0, 0]
    shifts = [tuple(ramp[start : start + 8]) for start in range(5)]
    assert seen == {*shifts, *(shift[::-1] for shift in shifts)}


def test_a_resized_crop_keeps_within_image_and_area():
    random = Augmentation(resized_crop=0.25)
    for key in range(200):
        left, top, right, bottom = random.box(40, 30, np.array([key], np.uint64))
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 30
        assert (right - left) * (bottom - top) >= 0.2 * 40 * 30


# The wall between labels and training -------------------------------------------------------


def reachable(root):
    """Every object that can be reached from `root` without passing through a module or class."""
    seen, queue = {}, [root]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, types.ModuleType | type | types.FunctionType):
            continue
        seen[id(thing)] = thing
        queue.extend(gc.get_referents(thing))
        queue.extend(getattr(thing, "__dict__", {}).values())
    return list(seen.values())


@pytest.mark.parametrize("resized_crop", [0.0, 0.5], ids=["in memory", "decoded in the loader"])
def test_no_label_is_reachable_from_what_distillation_sees(tmp_path, resized_crop):
    labels = [17, 23] * 10
    write_parquet(tmp_path / "data" / "train.parquet", range(20), labels, tmp_path)
    augment = AugmentConfig(resized_crop=resized_crop)
    data = ClassificationData(task(tmp_path / "data", augment=augment), seed=0)
    data.setup()
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, Tensor) for batch in batches)
    assert batches[0].shape == (4, 3, 8, 8)
    assert batches[0].dtype == torch.float32
    labelled = data.labelled()
    things = reachable(data.unlabelled())
    assert any(thing is labelled.labels for thing in reachable(labelled))
    assert not any(thing is data._splits or thing is labelled.labels for thing in things)
    for thing in things:
        if isinstance(thing, Tensor | np.ndarray) and thing.ndim == 1:
            assert {17, 23} != {int(value) for value in thing}


def test_splits_are_disjoint_and_only_asked_ones_are_decoded(tmp_path):
    write_folders(tmp_path / "train", {"a": 20, "b": 20})
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        image(200 + (name == "b")).save(tmp_path / "test" / name / "x.png")
    data = ClassificationData(task(tmp_path, val_fraction=0.25), seed=0)
    data.setup()
    train = values(torch.cat(list(data.train_dataloader())))
    assert len(train) == 32  # 30 images in batches of 4: the last is filled from the next epoch
    assert len(set(train)) == 30
    val = drawn(data.val_dataloader())
    assert len(val) == 10
    assert set(train) | set(val) == set(range(40))
    assert set(data._stores) == {"train"}
    assert sorted(drawn(data.test_dataloader())) == [200, 201]


def test_the_seed_moves_val_and_leaves_a_cut_test_split_alone(tmp_path):
    write_folders(tmp_path, {"a": 20, "b": 20})
    runs = []
    for seed in (0, 0, 1):
        data = ClassificationData(task(tmp_path, val_fraction=0.2, test_fraction=0.25), seed=seed)
        runs.append([drawn(loader) for loader in (data.val_dataloader(), data.test_dataloader())])
        train = set(values(torch.cat(list(data.train_dataloader()))))
        assert not train & {*runs[-1][0], *runs[-1][1]}
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] == runs[2][1]
    assert len(runs[0][1]) == 10


def test_a_sample_without_splits_is_evaluated_whole(tmp_path, caplog):
    write_folders(tmp_path, {"a": 10, "b": 10})
    data = ClassificationData(task(tmp_path), seed=0)
    assert len(drawn(data.test_dataloader())) == 20
    assert "the whole set is evaluated" in caplog.text


def test_val_stands_in_for_a_missing_test_split(tmp_path):
    write_folders(tmp_path / "train", {"a": 10, "b": 10})
    write_folders(tmp_path / "val", {"a": 2, "b": 3})
    data = ClassificationData(task(tmp_path), seed=0)
    assert len(drawn(data.test_dataloader())) == 5
    assert len(drawn(data.val_dataloader())) == 2


def test_a_test_split_alone_can_be_evaluated_and_nothing_else(tmp_path):
    write_folders(tmp_path / "test", {"a": 3, "b": 3})
    data = ClassificationData(task(tmp_path), seed=0)
    assert len(drawn(data.test_dataloader())) == 6
    with pytest.raises(TaskError, match="leaves no images for train"):
        data.unlabelled()


def test_unlabelled_limits_what_distillation_sees_and_calibration_follows(tmp_path):
    write_folders(tmp_path, {"a": 20, "b": 20})
    augment = AugmentConfig(crop=2, flip=True)
    data = ClassificationData(task(tmp_path, unlabelled=10, augment=augment), seed=0)
    assert len(data.unlabelled()) == 10
    assert len(data.labelled()) == 36
    batches = data.calibration_batches(2)
    assert [len(batch) for batch in batches] == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(batches, data.calibration_batches(2), strict=True))
    assert sum(len(batch) for batch in data.calibration_batches(100)) == 10


# Sources ------------------------------------------------------------------------------------


def test_parquet_shards_make_splits_and_name_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("archnet.tasks.sources._RESIDENT_BYTES", 0)
    monkeypatch.setattr("archnet.tasks.sources._KEPT_GROUPS", 1)
    root, names = tmp_path / "data", ["x", "y", "z"]
    for shard in range(2):
        file = root / f"train-{shard:05}-of-00002.parquet"
        shown = range(shard * 6, shard * 6 + 6)
        write_parquet(file, shown, [0, 1] * 3, tmp_path, names, row_group_size=4)
    write_parquet(root / "validation" / "0000.parquet", [100, 101], [0, 1], tmp_path)
    write_parquet(root / "test" / "0000.parquet", [200], [-1], tmp_path)
    data = ClassificationData(task(root), seed=0)
    data.setup()
    assert data.num_classes == 3
    labelled = data.labelled()
    images, labels = labelled.__getitems__([Draw(item, 0) for item in range(len(labelled))])
    assert [value % 2 for value in values(images)] == labels.tolist()
    assert drawn(data.test_dataloader()) == [100, 101]  # the labels of test itself are withheld
    assert data._splits.parts["train"].images.name(11).endswith("00001-of-00002.parquet row 5")


def test_folder_labels_follow_sorted_class_names(tmp_path):
    write_folders(tmp_path, {"b": 5, "a": 5})
    data = ClassificationData(task(tmp_path, num_classes=4), seed=0)
    data.setup()
    assert data.num_classes == 4
    labels = [label for _, batch in data.test_dataloader() for label in batch.tolist()]
    shown = drawn(data.test_dataloader())
    assert sorted(shown) == list(range(10))
    assert labels == [0 if value >= 5 else 1 for value in shown]
    assert labels != sorted(labels), "the first images of a split are not of one class"


def test_mnist5k_is_cut_the_same_for_every_seed():
    options = {"source": "mnist5k", "image_size": 28, "channels": 1, "mean": [0.0], "std": [1.0]}
    sets = [ClassificationData(task(**options), seed=seed) for seed in (0, 1)]
    for data in sets:
        data.setup()
        assert [len(data._items[name][1]) for name in ("train", "val", "test")] == [3500, 500, 1000]
        labels = data.test_dataloader().dataset.labels
        assert torch.equal(labels.classes.bincount(), torch.full((10,), 100))
    first, second = (data.val_dataloader().dataset.images.pixels for data in sets)
    assert torch.equal(first, second)
    assert sets[0].train_dataloader().dataset[0].shape == (1, 28, 28)


def test_large_images_are_decoded_by_workers_as_without(tmp_path):
    write_folders(tmp_path, {"a": 6, "b": 6}, size=(100, 80))
    augment = AugmentConfig(resized_crop=0.5, flip=True)
    batches = []
    for workers in (0, 1):
        options = task(tmp_path, image_size=72, resize=76, augment=augment, workers=workers)
        batches.append(list(ClassificationData(options, seed=0).train_dataloader()))
    assert batches[0][0].shape == (4, 3, 72, 72)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wide = image(0, (32, 16))
        wide.paste(image(255, (16, 16)), (8, 0))
        wide.save(tmp_path / name / "x.png")
    data = ClassificationData(task(tmp_path, resize=8), seed=0)
    images, _ = next(iter(data.test_dataloader()))
    assert images[:, :, :, 1:7].min() == 1
    assert images.shape == (2, 3, 8, 8)


# Bad input ----------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"task\.data\.root=.*nowhere is not a folder"):
        ClassificationData(task(tmp_path / "nowhere"), seed=0).setup()


def test_no_root_is_named():
    with pytest.raises(TaskError, match=r"task\.data\.root is not set"):
        ClassificationData(task(), seed=0).setup()


def test_an_empty_folder_is_told_what_belongs_there(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(TaskError, match="holds no images"):
        ClassificationData(task(tmp_path), seed=0).setup()


def test_cifar10_without_data_or_download_says_what_to_set(tmp_path):
    with pytest.raises(TaskError, match=r"task\.data\.download=true"):
        ClassificationData(task(tmp_path, source="cifar10"), seed=0).prepare_data()


def test_one_class_is_refused(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", range(3), [4] * 3, tmp_path)
    with pytest.raises(TaskError, match="1 class: a classifier needs at least two"):
        ClassificationData(task(tmp_path / "data"), seed=0).setup()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_corrupt_image_is_skipped_counted_and_named(tmp_path, streamed):
    write_folders(tmp_path, {"a": 10, "b": 10})
    whole = (tmp_path / "a" / "004.png").read_bytes()
    (tmp_path / "a" / "004.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "002.png").write_bytes(b"no image at all")
    augment = AugmentConfig(resized_crop=1.0 if streamed else 0.0)
    options = task(tmp_path, val_fraction=0.0, augment=augment, workers=int(streamed))
    data = ClassificationData(options, seed=0)
    train = list(data.train_dataloader())
    assert {len(batch) for batch in train} == {4}
    assert not {4, 12} & set(values(torch.cat(train)))
    assert sorted(drawn(data.test_dataloader())) == sorted(set(range(20)) - {4, 12})
    names = sorted(Path(name).relative_to(tmp_path).as_posix() for name in data.skipped)
    assert names == ["a/004.png", "b/002.png"]
    labelled = data.labelled()
    images, labels = labelled.__getitems__([Draw(item, 0) for item in range(len(labelled))])
    assert [int(value >= 10) for value in values(images)] == labels.tolist()


@pytest.mark.parametrize("resized_crop", [0.0, 1.0])
def test_a_folder_without_a_readable_image_is_refused(tmp_path, resized_crop):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(5):
            (tmp_path / name / f"{index}.png").write_bytes(b"")
    options = task(tmp_path, augment=AugmentConfig(resized_crop=resized_crop))
    with pytest.raises(TaskError, match=r"none of .* images can be decoded"):
        list(ClassificationData(options, seed=0).train_dataloader())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_any_mode_becomes_three_channels(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    picture = image(255) if mode == "P" else image(255, mode="L")
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        converted = picture.convert("RGB").convert(mode) if mode != "I;16" else picture
        converted.save(tmp_path / name / f"x.{suffix}")
    images, _ = next(iter(ClassificationData(task(tmp_path), seed=0).test_dataloader()))
    assert images.shape == (2, 3, 8, 8)
    assert images.min() > 0.98


def test_colour_is_not_guessed_into_grey(tmp_path):
    write_folders(tmp_path, {"a": 5, "b": 5})
    data = ClassificationData(task(tmp_path, channels=1, mean=[0.0], std=[1.0]), seed=0)
    with pytest.raises(TaskError, match=r"is RGB, but task\.data\.channels=1"):
        data.unlabelled()


@pytest.mark.parametrize("options", [{"channels": 4}, {"channels": 1}, {"std": [1.0]}])
def test_channels_must_suit_the_normalisation(options):
    with pytest.raises(TaskError, match=r"task\.data\.channels"):
        ClassificationData(task(**options), seed=0)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    write_folders(tmp_path, {"a": 2, "b": 2, "c": 2})
    with pytest.raises(TaskError, match=r"label 2 occurs in the data, but task\.num_classes=2"):
        _ = ClassificationData(task(tmp_path, num_classes=2), seed=0).num_classes


def test_a_table_without_images_is_told_what_it_lacks(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(TaskError, match="has the columns text, label: expected an image column"):
        ClassificationData(task(tmp_path), seed=0).setup()


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TaskError, match=r"train\.parquet is not readable"):
        ClassificationData(task(tmp_path), seed=0).setup()


# Real data ----------------------------------------------------------------------------------


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="../shared/data/cifar10 is not there")
def test_cifar10_parquet_is_read():
    options = task(CIFAR10, source="cifar10", image_size=32, augment=AugmentConfig(resized_crop=1))
    data = ClassificationData(options, seed=0)
    data.setup()
    assert data.num_classes == 10
    sizes = [len(data._items[name][1]) for name in ("train", "val", "test")]
    assert sizes == [45_000, 5_000, 10_000]
    assert next(iter(data.train_dataloader())).shape == (4, 3, 32, 32)


@pytest.mark.skipif(not IMAGENET_SAMPLE.is_dir(), reason="../shared/data/imagenet_sample missing")
def test_imagenet_sample_keeps_its_thousand_classes():
    options = task(IMAGENET_SAMPLE, image_size=224, resize=256, num_classes=1000)
    data = ClassificationData(options, seed=0)
    images, labels = next(iter(data.test_dataloader()))
    assert data.num_classes == 1000
    assert images.shape == (4, 3, 224, 224)
    assert labels.max() > 0
