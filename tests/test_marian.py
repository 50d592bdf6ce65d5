"""Published translators: Marian models become our Transformer with their own tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archnet.config import Config
from archnet.jobs import conductor
from archnet.runs import read_json
from archnet.tasks.tokenizer import train_tokenizer
from archnet.teachers import TeacherError, load_marian
from archnet.translate import SearchOptions, translate

transformers = pytest.importorskip("transformers", reason="needs the extra: archnet[marian]")
pytest.importorskip("sentencepiece")

Make = Callable[..., Config]
ENGLISH = ["A man sleeps.", "Two dogs run over the grass.", "A child eats an apple."] * 30
GERMAN = ["Ein Mann schläft.", "Zwei Hunde laufen über das Gras.", "Ein Kind isst Äpfel."] * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, saved as OPUS-MT's are."""
    path = tmp_path_factory.mktemp("marian")
    model = path / "pieces" / "source.spm"
    train_tokenizer(model, [*ENGLISH, *GERMAN], 90, 1000)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = [pieces.id_to_piece(i) for i in range(4, len(pieces))]
    vocabulary = {name: i for i, name in enumerate(["</s>", "<unk>", *names, "<pad>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    for side in ("source", "target"):
        (path / f"{side}.spm").write_bytes(model.read_bytes())
    tokenizer = transformers.MarianTokenizer(
        str(path / "source.spm"), str(path / "target.spm"), str(path / "vocab.json")
    )
    pad = vocabulary["<pad>"]
    config = transformers.MarianConfig(
        vocab_size=len(vocabulary), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad,
        forced_eos_token_id=0, bad_words_ids=[[pad]], max_position_embeddings=64,
        scale_embedding=True, activation_function="swish",
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.MarianMTModel(config)
    with torch.no_grad():
        made.model.shared.weight.mul_(8)
        made.final_logits_bias.normal_()
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_scores_are_those_of_transformers(folder: Path) -> None:
    ours, tokens = load_marian(folder, 32)
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    order = torch.tensor(tokens.order)
    source = torch.tensor([[*tokens.encode(["Two dogs run."])[0], 2]])
    target = torch.tensor([[1, 9, 12, 7]])
    with torch.no_grad():
        expected = theirs(input_ids=order[source], decoder_input_ids=order[target]).logits
        found = ours(source, target)
    torch.testing.assert_close(found, expected[..., order], atol=1e-4, rtol=1e-4)


def test_text_goes_to_tokens_and_back(folder: Path) -> None:
    _, tokens = load_marian(folder, 32)
    (row,) = tokens.encode(["Two dogs run."])
    assert 2 not in row
    assert tokens.decode([[1, *row, 2, 0]]) == ["Two dogs run."]


def test_greedy_translations_are_those_of_transformers(folder: Path) -> None:
    ours, tokens = load_marian(folder, 24)
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    lines = ["Two dogs run.", "A man eats grass."]
    found = translate(ours, tokens, lines, SearchOptions(1, 1.0, 16))
    for line, mine in zip(lines, found, strict=True):
        batch = tokenizer([line], return_tensors="pt")
        written = theirs.generate(
            **batch,
            num_beams=1,
            do_sample=False,
            max_new_tokens=15,
            bad_words_ids=[[1], [theirs.config.pad_token_id]],
        )
        expected = tokenizer.decode(written[0], skip_special_tokens=True)
        assert mine[:20] == expected[:20]


def test_a_published_translator_becomes_a_student(
    folder: Path, make_config: Make, tmp_path: Path
) -> None:
    root = tmp_path / "text"
    root.mkdir()
    for split in ("train", "valid", "test"):
        (root / f"{split}.en").write_text("\n".join(ENGLISH) + "\n")
        (root / f"{split}.de").write_text("\n".join(GERMAN) + "\n")
    config = make_config(
        "task=wmt14", f"task.data.root={root}", "teacher=marian", f"teacher.name={folder}",
        "quant.bits=4", "distill.steps=2", "task.text.max_tokens=20", "trainer.limit_eval=6",
        "task.text.beam=2", f"task.text.cache_dir={tmp_path}/cache", "trainer.accelerator=cpu",
    )  # fmt: skip
    metrics = read_json(conductor.run(config).metrics)
    assert metrics["audit"]["pure"]
    assert metrics["parity"]["mismatches"] == 0


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="holds no Marian tokenizer"):
        load_marian(tmp_path, 20)
