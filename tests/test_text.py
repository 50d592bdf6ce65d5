"""Parallel text: files, tokens, batches, phrases."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archnet.config import Config
from archnet.tasks import EncodedText, TaskError, Tokenizer, TranslationData
from archnet.tasks.batches import StepBatches, epoch_batches
from archnet.tasks.corpus import TextFiles
from archnet.tasks.phrases import SIZES, Phrases
from archnet.tasks.tokenizer import BOS, EOS, PAD, UNK

Make = Callable[..., Config]
NAMES = {"train": "train", "valid": "valid", "test": "test"}
ENGLISH = ["A man sleeps.", "Two dogs run over the grass.", "A child eats an apple."] * 40
GERMAN = ["Ein Mann schläft.", "Zwei Hunde laufen über das Gras.", "Ein Kind isst Äpfel."] * 40


def write(folder: Path, english: list[str], german: list[str], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for language, lines in (("en", english), ("de", german)):
        (folder / f"{split}.{language}").write_text("".join(f"{x}\n" for x in lines), "utf-8")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in NAMES:
        write(tmp_path / "text", ENGLISH, GERMAN, split)
    return tmp_path / "text"


@pytest.fixture
def data(root: Path, make_config: Make, tmp_path: Path) -> TranslationData:
    return made(make_config, root, tmp_path)


def made(make_config: Make, root: Path, tmp_path: Path, *overrides: str) -> TranslationData:
    config = make_config(
        "task=wmt14",
        f"task.data.root={root}",
        f"task.text.cache_dir={tmp_path}/cache",
        "task.text.vocabulary=80",
        *overrides,
    )
    data = TranslationData(config.task, 0)
    data.setup()
    return data


def test_text_goes_to_tokens_and_back(data: TranslationData) -> None:
    assert len(data.tokenizer) == 80
    rows = data.tokenizer.encode(["A man sleeps.", ""])
    assert rows[1] == []
    assert data.tokenizer.decode([[BOS, *rows[0], EOS, PAD]]) == ["A man sleeps."]
    assert UNK in data.tokenizer.encode(["☃"])[0]


def test_a_second_setup_reads_what_the_first_wrote(
    root: Path, make_config: Make, tmp_path: Path, data: TranslationData
) -> None:
    model = data.tokenizer.path
    before = model.stat().st_mtime_ns
    again = made(make_config, root, tmp_path)
    assert again.tokenizer.path == model
    assert model.stat().st_mtime_ns == before
    assert len(again.train) == len(data.train)


def test_other_text_has_another_cache(
    root: Path, make_config: Make, tmp_path: Path, data: TranslationData
) -> None:
    write(root, [*ENGLISH, "One more."], [*GERMAN, "Noch einer."])
    assert made(make_config, root, tmp_path).tokenizer.path != data.tokenizer.path


def test_empty_and_long_pairs_are_dropped_and_counted(
    root: Path, make_config: Make, tmp_path: Path
) -> None:
    write(root, [*ENGLISH, "", "so " * 100], [*GERMAN, "leer", "kurz"])
    data = made(make_config, root, tmp_path, "task.text.max_tokens=40")
    assert data.train.dropped == {"empty": 1, "long": 1}
    assert len(data.train) == len(ENGLISH)


def test_files_of_unequal_length_are_refused(root: Path, make_config: Make, tmp_path: Path) -> None:
    write(root, ENGLISH, GERMAN[:-1])
    with pytest.raises(TaskError, match=r"train\.de ends after line 119 and the other goes on"):
        made(make_config, root, tmp_path)


def test_bytes_that_are_not_utf8_are_named_by_line(
    root: Path, make_config: Make, tmp_path: Path
) -> None:
    (root / "train.en").write_bytes(b"fine\n\xffbad\n" + b"x\n" * 118)
    with pytest.raises(TaskError, match=r"train\.en, line 2: not UTF-8 \(byte 1"):
        made(make_config, root, tmp_path)


def test_text_without_words_is_refused(root: Path, make_config: Make, tmp_path: Path) -> None:
    write(root, [""] * 5, [""] * 5)
    with pytest.raises(TaskError, match="the training text is empty"):
        made(make_config, root, tmp_path)


def test_a_vocabulary_too_large_for_the_text_is_refused(
    root: Path, make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=r"task\.text\.vocabulary=5000 does not suit"):
        made(make_config, root, tmp_path, "task.text.vocabulary=5000")


def test_a_missing_file_is_named_with_its_key(root: Path) -> None:
    (root / "test.de").unlink()
    with pytest.raises(TaskError, match=r"test\.de is missing.*task\.text\.test"):
        TextFiles(root, NAMES, ("en", "de")).check()


def test_line_separators_inside_a_line_do_not_end_it(root: Path) -> None:
    write(root, ["one\u2028still one", "two\x0bstill two\r"], ["eins", "zwei"])
    pairs = list(TextFiles(root, NAMES, ("en", "de")).pairs("train"))
    assert pairs == [("one\u2028still one", "eins"), ("two\x0bstill two", "zwei")]


def test_parquet_in_the_layout_of_hugging_face(tmp_path: Path) -> None:
    rows = [{"en": a, "de": b} for a, b in zip(ENGLISH, GERMAN, strict=True)]
    pq.write_table(pa.table({"translation": rows}), tmp_path / "train-00000-of-00001.parquet")
    files = TextFiles(tmp_path, NAMES, ("en", "de"))
    assert list(files.pairs("train")) == list(zip(ENGLISH, GERMAN, strict=True))
    with pytest.raises(TaskError, match="has no language fr"):
        list(TextFiles(tmp_path, NAMES, ("en", "fr")).pairs("train"))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(TaskError, match="is no SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def rows_of(tmp_path: Path, count: int) -> EncodedText:
    drawer = np.random.default_rng(0)
    rows = (
        (drawer.integers(4, 99, drawer.integers(1, 20)), drawer.integers(4, 99, 7))
        for _ in range(count)
    )
    return EncodedText.write(tmp_path / "rows", iter(rows), 50, "rows")


def test_an_epoch_has_every_pair_once_within_the_token_limit(tmp_path: Path) -> None:
    text = rows_of(tmp_path, 1000)
    batches = list(epoch_batches(text, 128, 3, 0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    for index in batches:
        longest = max(max(map(len, text.pair(int(i)))) + 1 for i in index)
        assert len(index) * longest <= 128
    assert not np.array_equal(np.concatenate(batches)[:50], np.arange(50))


def test_batches_resume_where_they_stopped_and_are_shared(tmp_path: Path) -> None:
    text = rows_of(tmp_path, 300)
    whole = list(StepBatches(text, 128, 100, seed=1))
    assert len(whole) == 100
    late = list(StepBatches(text, 128, 100, seed=1, start=60))
    assert all((a.source == b.source).all() for a, b in zip(whole[60:], late, strict=True))
    parts = [StepBatches(text, 128, 5, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for batch, *shares in islice(zip(whole, *parts, strict=False), 5):
        assert sum(len(share.source) for share in shares) == len(batch.source)


def test_marks_stand_where_they_should(tmp_path: Path) -> None:
    batch = next(iter(StepBatches(rows_of(tmp_path, 50), 64, 1, seed=0)))
    assert (batch.target_in[:, 0] == BOS).all()
    assert (batch.source.where(batch.source_pad, EOS) >= 0).all()
    assert ((batch.target_out == EOS).sum(1) == 1).all()
    assert (batch.real == (batch.target_in != PAD)).all()


def test_distillation_reads_no_reference(
    data: TranslationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training pair only the source reaches the student's text."""
    asked: list[list[int]] = []

    def translate(rows: list[list[int]]) -> list[list[list[int]]]:
        asked.extend(rows)
        return [[row[::-1]] for row in rows]

    text = data.translated("reversed", translate)
    assert len(text) == len(data.train)
    for index in range(len(text)):
        source, target = text.pair(index)
        assert source.tolist() == data.train.pair(index)[0].tolist()
        assert target.tolist() == source.tolist()[::-1]
    assert len(asked) == len(text)
    data.translated("reversed", translate)
    assert len(asked) == len(text)  # cached


def test_a_source_may_have_several_translations(data: TranslationData) -> None:
    text = data.translated("two", lambda rows: [[row, row[::-1] + row[:1]] for row in rows])
    assert (len(text), text.sources()) == (2 * len(data.train), len(data.train))
    for index in range(0, len(text), 2):
        (source, first), (again, second) = text.pair(index), text.pair(index + 1)
        assert source.tolist() == again.tolist() == first.tolist()
        assert len(second) == len(source) + 1


def test_translating_goes_on_where_it_was_killed(
    data: TranslationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archnet.tasks.translation.TRANSLATED", 40)
    calls = []

    def dies(rows: list[list[int]]) -> list[list[list[int]]]:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [[row] for row in rows]

    with pytest.raises(KeyboardInterrupt):
        data.translated("same", dies)
    data.translated("same", dies)
    assert calls == [40, 40, 40, 40]


def test_calibration_batches_have_no_padding(data: TranslationData) -> None:
    for batch in data.calibration_batches(data.train, 3):
        assert not batch.source_pad.any()
        assert batch.real.all()


def test_phrases_are_the_same_each_time_and_in_one_split() -> None:
    phrases, again = (Phrases(("en", "de"), 0) for _ in range(2))
    seen = [source for split in SIZES for source, _ in phrases.pairs(split)]
    assert len(set(seen)) == len(seen) == sum(SIZES.values())
    assert list(phrases.pairs("test")) == list(again.pairs("test"))
    assert ("Italy", "Italien") in [pair for split in SIZES for pair in phrases.pairs(split)]


def test_phrases_refuse_a_language_that_cldr_lacks() -> None:
    with pytest.raises(TaskError, match="CLDR names languages"):
        Phrases(("en", "tlhingan"), 0)
