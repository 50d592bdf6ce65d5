"""Translators in integers: the golden model, files, C and TensorFlow Lite give the same tokens."""

import copy
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from archnet.chips import bridge
from archnet.convert import stepwise
from archnet.deploy import ExportError, OnnxTranslator, export_translator
from archnet.deploy.c_header import translator_to_c
from archnet.deploy.sentences import (
    GoldenTranslator,
    Sentences,
    columns_of,
    embedding_of,
    sentence_cost,
    widened,
)
from archnet.deploy.tflite import translator_to_tflite
from archnet.hardware import onnx_cost
from archnet.jobs.sentences import verify_sentences
from archnet.ops import Student
from archnet.translate import SearchOptions, translate_tokens
from test_translation import POSITIONS, VOCABULARY
from test_translation import make as make_new

SEARCH = SearchOptions(beam=2, longest=7)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@cache
def make(hardware: str, norm: str = "pre", bits: int = 4) -> Student:
    return make_new(hardware, norm, bits).student


def sentences(count: int = 7) -> list[list[int]]:
    """Of one token to the longest that the students read, and an empty one."""
    torch.manual_seed(4)
    lengths = [0, 1, POSITIONS - 1, *(2 + index % 9 for index in range(count - 3))]
    return [torch.randint(4, VOCABULARY, (length,)).tolist() for length in lengths]


@needs_compiler
@pytest.mark.parametrize(("norm", "bits"), [("post", 8), ("pre", 4), ("post", 2)])
def test_all_forms_of_a_strict_student_agree_token_for_token(norm: str, bits: int) -> None:
    checks = verify_sentences(make("arch5", norm, bits), sentences(), SEARCH)
    assert [check.name for check in checks] == ["pytorch float32", "qdq", "subbyte", "c"]
    for check in checks:
        assert (check.skipped, check.bit_equal, check.max_steps) == ("", 1, 0)
        assert (check.sentences_changed, check.changed, check.first) == (0, 0, None)
        assert check.decisions > check.inputs == 7


def test_attention_is_float_and_said_to_be() -> None:
    student = make("arch5_matmul")
    in_pytorch, in_c = verify_sentences(student, sentences(5), SEARCH, ["c"])
    assert in_pytorch.changed == 0
    assert "MatMul, Softmax of this student are computed in floats" in in_c.skipped
    for form in ("c", "tflite"):
        with pytest.raises(ExportError, match=f"form={form} has integers alone.*hardware=arch5"):
            export_translator(stepwise(student), "unused", form)


def test_another_students_files_are_found_out(tmp_path: Path) -> None:
    student = make("arch5")
    other = copy.deepcopy(student)
    step = next(s.name for s in other.graph.steps if s.name.endswith("1_cross_output"))
    with torch.no_grad():
        other.operator(step).weight.neg_()
    export_translator(stepwise(other), tmp_path, "qdq")
    _, file = verify_sentences(student, sentences(5), SEARCH, [], tmp_path)
    assert file.bit_equal < 1
    assert file.first is not None
    assert file.first.values > 0


@pytest.mark.parametrize("hardware", ["arch5", "arch5_matmul"])
def test_costs_are_what_the_files_compute(hardware: str, tmp_path: Path) -> None:
    source, target = 9, 4
    parts = stepwise(make(hardware))
    encoder, decoder = export_translator(parts, tmp_path, "qdq")
    stated = sentence_cost(parts, source, target)
    facts = OnnxTranslator(tmp_path).facts
    columns = facts["length"] or source
    hot = facts["tokens"] + facts["positions"]
    found = onnx_cost(encoder, {"source": [1, source, hot]}).macs or 0
    shapes = Sentences.of(parts, length=source).decoder.student.graph.shapes
    for past in range(target):
        sizes = {"target": [1, 1, hot]}
        for name in facts["memory"]:
            sizes[name] = [1, *shapes[name]]
        for name in facts["states"]:
            sizes[name] = [1, *shapes[name]]
            if len(shapes[name]) == 3:
                sizes[name][2] = past
        if past or hardware == "arch5":  # onnx_cost refuses axes of no entry
            found += onnx_cost(decoder, sizes).macs or 0
        else:
            first = Sentences.of(parts, weights=False, length=source, past=0)
            found += sum(
                step.macs
                for step in sentence_cost(parts, source, 1).cost.steps
                if step.name in first.decoder.cycles
            )
    assert stated.cost.macs == found
    assert sum(step.macs for step in stated.cost.steps) == found
    said = f"each computes {columns} source positions"
    assert (said in stated.about) == (hardware == "arch5")
    assert set(stated.whole.values()) <= {step.name for step in make(hardware).graph.steps}


def test_columns_are_a_power_of_two() -> None:
    assert columns_of(stepwise(make("arch5", "post", 32)).decoder) == POSITIONS
    assert columns_of(stepwise(make("arch5_matmul")).decoder) is None


@needs_compiler
def test_the_header_is_strict_c(tmp_path: Path) -> None:
    (tmp_path / "student.h").write_text(translator_to_c(stepwise(make("arch5"))))
    (tmp_path / "main.c").write_text('#include "student.h"\nint main(void) { return 0; }\n')
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run(["cc", *flags, tmp_path / "main.c"], check=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_tensorflow_lite_gives_the_golden_models_integers(bits: int) -> None:
    runtime = pytest.importorskip("ai_edge_litert.interpreter")
    parts, length = stepwise(make("arch5", "post", bits)), 9
    golden = GoldenTranslator(Sentences.of(parts))

    def runner(content: bytes):
        network = runtime.Interpreter(model_content=content)
        network.allocate_tensors()
        given = {item["name"]: item for item in network.get_input_details()}

        def run(values):
            for name, value in values.items():
                stored = value + given[name]["quantization"][1]
                network.set_tensor(given[name]["index"], stored.astype(np.int8))
            network.invoke()
            return [
                network.get_tensor(item["index"]).astype(np.int64) - item["quantization"][1]
                for item in network.get_output_details()
            ]

        return run

    encode, decode = map(runner, translator_to_tflite(parts, length))
    source = torch.randint(4, VOCABULARY, (1, length))
    state = golden.start(source)
    memory = encode({"source": embedding_of(parts.encoder).one_hot(source).numpy()})
    names = golden.sentences.parts.memory
    for name, found in zip(names, memory, strict=True):
        wide = widened(found, golden.sentences.columns)
        np.testing.assert_array_equal(wide, state[name].numpy())
    table = embedding_of(parts.decoder)
    for place, token in enumerate([1, 7, 9, 20]):
        values = {name: state[name].numpy() for name in (*names, *golden.sentences.states)}
        hot = table.one_hot(torch.tensor([[token]]), torch.tensor([[place]])).numpy()
        _, *after = decode({"target": hot, **values})
        _, state = golden.integers(torch.tensor([token]), state)
        for name, found in zip(golden.sentences.states, after, strict=True):
            np.testing.assert_array_equal(found, state[name].numpy())


def test_tensorflow_lite_has_fixed_lengths(tmp_path: Path) -> None:
    parts = stepwise(make("arch5"))
    export_translator(parts, tmp_path, "tflite", 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "student.decoder.tflite",
        "student.encoder.tflite",
    ]
    for length in (0, POSITIONS + 1):
        with pytest.raises(ExportError, match=f"length={length}: the student reads sentences of 1"):
            export_translator(parts, tmp_path, "tflite", length)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["ethos-u55-128", "ethos-u85-256"])
def test_arms_compiler_takes_both_parts_whole(chip: str) -> None:
    found = bridge("vela")
    if found.missing:
        pytest.skip(found.missing)
    for content in translator_to_tflite(stepwise(make("arch5")), 9):
        compiled = found.compile(content, chip)
        assert (compiled.error, len(compiled.off)) == ("", 0)
        assert len(compiled.operators) > 20


@pytest.mark.parametrize("form", ["qdq", "subbyte", "c", "tflite"])
def test_float_students_have_no_integers(form: str, tmp_path: Path) -> None:
    parts = stepwise(make("arch5", "post", 32))
    with pytest.raises(ExportError, match=f"no quantizers, and form={form} holds integers"):
        export_translator(parts, tmp_path, form)
    with pytest.raises(ExportError, match="has float weights"):
        Sentences.of(parts).integers()


def test_packed_weights_translate_alike_and_take_less(tmp_path: Path) -> None:
    parts = stepwise(make("arch5", "post", 2))
    sizes, words = {}, {}
    for form in ("qdq", "subbyte"):
        files = export_translator(parts, tmp_path, form)
        sizes[form] = sum(path.stat().st_size for path in files)
        words[form] = translate_tokens(OnnxTranslator(tmp_path, 1), sentences(6), SEARCH)
    assert words["subbyte"] == words["qdq"]
    assert sizes["subbyte"] < sizes["qdq"]
