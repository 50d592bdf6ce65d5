"""Translating students: conversion, padding, decoding step by step, files, search, distillation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archnet.config import DistillConfig
from archnet.convert import (
    ConversionError,
    convert_translator,
    fit_norms,
    stepwise,
)
from archnet.deploy import OnnxTranslator, audit, export_translator
from archnet.deploy.writer import ExportError
from archnet.distill.text import TextDistillation, plan_text
from archnet.hardware import Target, student_cost, teacher_cost
from archnet.jobs.on_policy import OwnTranslations
from archnet.lower import lower
from archnet.ops import FullyConnected, Stepwise, Student, TokenEmbedding
from archnet.quant import Recipe, describe, pack, quantize, settle, unpack
from archnet.tasks.batches import TextBatch
from archnet.teachers import TappedTeacher, TeacherError, Transformer, load_translator
from archnet.teachers.fit import teacher_folder
from archnet.translate import (
    SearchOptions,
    StudentTranslator,
    scores_of,
    search,
    translate,
    translate_tokens,
)

VOCABULARY, POSITIONS = 50, 32
SEARCH = SearchOptions(beam=3, longest=12)
KINDS = [(hardware, norm) for hardware in ("arch5_matmul", "arch5") for norm in ("post", "pre")]


def make_teacher(norm: str = "post") -> Transformer:
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 4, "inner": 48, "encoder_layers": 2, "decoder_layers": 2}
    model = Transformer(VOCABULARY, POSITIONS, **sizes, dropout=0.1, norm=norm)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model.eval().requires_grad_(False)


def inputs(sentences: int = 12, source: int = 9, target: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randint(4, VOCABULARY, (sentences, source)),
        torch.randint(4, VOCABULARY, (sentences, target)),
        torch.zeros(sentences, source),
    )


def padded(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    source, target, pad = batch
    more = torch.randint(4, VOCABULARY, (len(source), 3))  # what stands there must not matter
    return torch.cat([source, more], 1), target, torch.cat([pad, torch.ones(len(pad), 3)], 1)


@dataclass
class Made:
    teacher: Transformer
    student: Student
    left: dict[str, float]


def make(hardware: str, norm: str = "post", bits: int = 32) -> Made:
    teacher = make_teacher(norm)
    student, norms = convert_translator(teacher, Target.named(hardware))
    tapped = TappedTeacher(teacher, [norm.path for norm in norms])
    left = fit_norms(student, norms, lambda *batch: tapped(*batch)[0], [inputs()])
    if bits < 32:
        quantize(student, Recipe(bits, bits), calibration=[inputs()])
        settle(student)
    return Made(teacher, student.requires_grad_(False).eval(), left)


@pytest.fixture(scope="module", params=[*KINDS], ids="-".join)
def floating(request: pytest.FixtureRequest) -> Made:
    return make(*request.param)


@pytest.fixture(scope="module", params=["arch5_matmul", "arch5"])
def quantized(request: pytest.FixtureRequest) -> Made:
    return make(request.param, bits=4)


class TestTeacher:
    @pytest.mark.parametrize("norm", ["post", "pre"])
    def test_a_step_at_a_time_gives_what_whole_sentences_give(self, norm: str) -> None:
        teacher, (source, target, _) = make_teacher(norm), inputs()
        whole, state = teacher(source, target), teacher.start(source)
        for place in range(target.shape[1]):
            scores, state = teacher.step(target[:, place], state)
            torch.testing.assert_close(scores, whole[:, place], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("norm", ["post", "pre"])
    def test_padding_changes_nothing(self, norm: str) -> None:
        teacher, batch = make_teacher(norm), inputs()
        source, target, pad = padded(batch)
        whole = teacher(batch[0], batch[1])
        torch.testing.assert_close(teacher(source, target, pad.bool()), whole, atol=1e-4, rtol=1e-4)

    def test_the_table_is_shared_and_saved_once(self) -> None:
        teacher = make_teacher()
        assert teacher.projection.weight is teacher.tokens.weight
        assert [n for n, t in teacher.state_dict().items() if t.shape == (VOCABULARY, 32)] == [
            "tokens.weight"
        ]

    def test_arguments_that_do_not_suit_are_named(self, make_config: Callable[..., object]) -> None:
        config = make_config("task=phrases", "teacher.kwargs.heads=5")
        with pytest.raises(TeacherError, match="dim=64 is no multiple of heads=5"):
            load_translator(config.teacher, vocabulary=50, positions=32)  # type: ignore[attr-defined]
        config = make_config("task=phrases", "teacher=resnet18")
        with pytest.raises(TeacherError, match="resnet18 does not translate"):
            load_translator(config.teacher, vocabulary=50, positions=32)  # type: ignore[attr-defined]

    def test_search_settings_do_not_move_a_teachers_cache(
        self, make_config: Callable[..., object]
    ) -> None:
        folders = {
            teacher_folder(config.task, config.teacher, 0)  # type: ignore[attr-defined]
            for config in (
                make_config("task=phrases"),
                make_config("task=phrases", "task.text.beam=2"),
            )
        }
        assert len(folders) == 1


class TestConversion:
    def test_without_norms_the_papers_student_is_the_teacher(self) -> None:
        """All but the norms is exact: embeddings, attention, additions, feed-forward parts."""
        teacher = make_teacher("pre")
        for module in list(teacher.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.LayerNorm):
                    setattr(module, name, nn.Identity())
        batch = inputs()
        student, _ = convert_translator(teacher, Target.named("arch5_matmul"))
        source, target, pad = batch
        with torch.no_grad():
            ours, theirs = student(source, target, pad), teacher(source, target)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4

    def test_fitted_norms_bring_the_student_near_its_teacher(self, floating: Made) -> None:
        source, target, pad = inputs()
        theirs = floating.teacher(source, target)
        error = (floating.student(source, target, pad) - theirs).var() / theirs.var()
        assert float(error) < 0.05
        assert all(share < 0.5 for share in floating.left.values())

    def test_the_teacher_is_left_alone(self) -> None:
        teacher = make_teacher()
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        convert_translator(teacher, Target.named("arch5"))
        assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())

    def test_training_and_use_are_the_same_function(self, floating: Made) -> None:
        """No batch has statistics of its own: modes agree, and batches of any lengths do."""
        source, target, pad = inputs()
        student = floating.student
        with torch.no_grad():
            used = student.eval()(source, target, pad)
            trained = student.train()(source, target, pad)
            alone = torch.cat([student(source[i : i + 1], target[i : i + 1], pad[i : i + 1])
                               for i in range(3)])  # fmt: skip
        student.eval()
        assert torch.equal(used, trained)
        torch.testing.assert_close(alone, used[:3], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("place", [0, 3, 6])
    def test_no_position_sees_a_later_token(self, floating: Made, place: int) -> None:
        source, target, pad = inputs()
        changed = target.clone()
        changed[:, place + 1 :] = 7
        with torch.no_grad():
            before = floating.student(source, target, pad)[:, : place + 1]
            after = floating.student(source, changed, pad)[:, : place + 1]
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)

    def test_padding_changes_nothing(self, floating: Made) -> None:
        with torch.no_grad():
            whole = floating.student(*inputs())
            torch.testing.assert_close(
                floating.student(*padded(inputs())), whole, atol=1e-4, rtol=1e-4
            )

    def test_a_look_up_is_the_layer_on_one_hots_to_the_bit(self, quantized: Made) -> None:
        for module in quantized.student.operators.values():
            if isinstance(module, TokenEmbedding):
                tokens = inputs()[0]
                assert torch.equal(module(tokens), module(module.one_hot(tokens)))

    def test_other_networks_and_targets_are_refused(self) -> None:
        with pytest.raises(ConversionError, match="a Linear does not translate"):
            convert_translator(nn.Linear(2, 2), Target.named("arch5"))
        with pytest.raises(ConversionError, match="no fully connected layer at positions"):
            convert_translator(make_teacher(), Target.named("arch5_conv"))

    def test_cost_counts_products_of_activations(self) -> None:
        made = make("arch5_matmul")
        tokens = torch.full((1, 16), 5)
        # The same products, attention's included, besides the additions' and the one-hots'.
        teacher = teacher_cost(made.teacher, (tokens, tokens))
        student = student_cost(made.student)
        extra = sum(row.macs for row in student.steps if row.name.endswith(("_sum", "_embed")))
        assert student.macs - extra == teacher.macs


class TestQuantized:
    def test_padding_changes_nothing(self, quantized: Made) -> None:
        with torch.no_grad():
            whole = quantized.student(*inputs())
            assert torch.equal(quantized.student(*padded(inputs())), whole)

    def test_packing_keeps_everything(self, quantized: Made) -> None:
        again = unpack(pack(quantized.student))
        with torch.no_grad():
            assert torch.equal(again(*inputs()), quantized.student(*inputs()))

    def test_embeddings_and_projection_have_their_own_widths(self) -> None:
        made = make("arch5")
        quantize(made.student, Recipe(2, 4, first_bits=6, last_bits=7), calibration=[inputs()])
        weights = describe(made.student)["weights"]
        assert {weights[f"{side}_embed"]["bits"] for side in ("encoder", "decoder")} == {6}
        assert weights["scores"]["bits"] == 7
        assert weights["encoder_0_feed_expand"]["bits"] == 2

    def test_softmax_results_may_be_finer(self) -> None:
        made = make("arch5_matmul")
        quantize(made.student, Recipe(2, 4, softmax_bits=8), calibration=[inputs()])
        grids = describe(made.student)["activations"]
        ours = {name: spec["bits"] for name, spec in grids.items() if "_weights" in name}
        assert len(ours) == 6
        assert set(ours.values()) == {8}
        assert {spec["bits"] for name, spec in grids.items() if "_mixed" in name} == {4}

    def test_additions_are_constants_of_two_bits_between_fine_grids(self) -> None:
        """[I, I] is exact at any width, and what it reads and gives has `Recipe.sum_bits`."""
        parts = stepwise(make("arch5", bits=2).student)
        for part in (parts.encoder, parts.decoder):
            lowered = lower(part)
            sums = [name for name, way in lowered.ways.items() if "concat" in way]
            assert sums
            for name in sums:
                layer = lowered.student.operator(name)
                assert isinstance(layer, FullyConnected)
                assert not layer.trainable
                assert layer.weight_quantizer.bits == 2
                assert layer.bias_quantizer.source.bits == 8

    def test_both_sides_of_a_pair_have_one_scale(self) -> None:
        student = make("arch5", bits=4).student
        ours, theirs = (student.operator(f"decoder_0_cross_{n}_grid") for n in ("ours", "theirs"))
        assert ours.quantizer is theirs.quantizer  # type: ignore[union-attr]


@pytest.fixture(scope="module", params=["arch5_matmul", "arch5"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Stepwise, Path]:
    folder = tmp_path_factory.mktemp("exported")
    parts = stepwise(make(request.param, bits=4).student)
    export_translator(parts, folder, "qdq")
    return request.param, parts, folder


class TestStepwise:
    def test_a_token_at_a_time_gives_what_whole_sentences_give(self, floating: Made) -> None:
        source, target, pad = inputs()
        with torch.no_grad():
            whole = floating.student(source, target, pad)
            translator = StudentTranslator(stepwise(floating.student))
            state = translator.start(source)
            for place in range(target.shape[1]):
                scores, state = translator.step(target[:, place], state)
                torch.testing.assert_close(scores, whole[:, place], atol=1e-4, rtol=1e-4)

    def test_files_are_pure_and_translate_alike(self, exported: tuple[str, Stepwise, Path]) -> None:
        hardware, parts, folder = exported
        for path in folder.glob("*.onnx"):
            found = audit(path, hardware)
            assert found.pure, found.violations
        here, there = StudentTranslator(parts), OnnxTranslator(folder, 1)
        rows = [row.tolist() for row in torch.randint(4, VOCABULARY, (20, 11))]
        rows = [row[: 3 + index % 8] for index, row in enumerate(rows)]
        assert translate_tokens(here, rows, SEARCH) == translate_tokens(there, rows, SEARCH)

    def test_a_strict_student_has_no_product_of_activations(self, tmp_path: Path) -> None:
        parts = stepwise(make("arch5").student)
        export_translator(parts, tmp_path, "float")
        counts = audit(tmp_path / "student.decoder.onnx", "arch5").counts
        assert {"fully_connected", "concat", "maxpool2x2"} <= set(counts)
        assert not {"matmul", "softmax"} & set(counts)
        assert not audit(tmp_path / "student.decoder.onnx", "arch5").violations

    def test_the_papers_student_is_not_pure_under_five_operators(self, tmp_path: Path) -> None:
        export_translator(stepwise(make("arch5_matmul").student), tmp_path, "float")
        assert not audit(tmp_path / "student.encoder.onnx", "arch5").pure
        assert audit(tmp_path / "student.encoder.onnx", "arch5_matmul").pure

    def test_other_forms_and_files_are_refused(
        self, exported: tuple[str, Stepwise, Path], tmp_path: Path
    ) -> None:
        _, parts, folder = exported
        with pytest.raises(ExportError, match="form=mct: a translator is written as"):
            export_translator(parts, tmp_path, "mct")
        for name in ("encoder", "decoder"):
            content = (folder / "student.encoder.onnx").read_bytes()
            (tmp_path / f"student.{name}.onnx").write_bytes(content)
        with pytest.raises(ExportError, match="no decoder that archnet wrote"):
            OnnxTranslator(tmp_path)


class Words:
    """A tokenizer of one token a letter."""

    def encode(self, sentences: list[str]) -> list[list[int]]:
        return [[4 + ord(letter) % 40 for letter in text] for text in sentences]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


class Counter:
    """Repeats a token of the source, then ends; says what it is asked."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, source: Tensor) -> dict[str, Tensor]:
        return {"source": source, "place": torch.zeros(len(source), 1, dtype=torch.long)}

    def step(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps += 1
        wanted = state["source"].gather(1, state["place"].clamp(max=state["source"].shape[1] - 1))
        scores = torch.zeros(len(tokens), VOCABULARY).scatter_(1, wanted, 10.0)
        return scores, {**state, "place": state["place"] + 1}


class TestSearch:
    @pytest.mark.parametrize("beam", [1, 4])
    def test_it_finds_the_best_and_stops(self, beam: int) -> None:
        model = Counter()
        source = torch.tensor([[5, 6, 7, 2], [8, 8, 9, 2]])
        found = search(model, source, SearchOptions(beam, 1.0, 20))
        assert found == [[5, 6, 7], [8, 8, 9]]
        assert model.steps < 14

    def test_beam_one_is_greedy(self) -> None:
        teacher, (source, _, _) = make_teacher(), inputs(3)
        (found,) = search(teacher, source[:1], SearchOptions(1, 0.0, 10))
        tokens, state = [1], teacher.start(source[:1])
        while len(tokens) < 10:
            scores, state = teacher.step(torch.tensor(tokens[-1:]), state)
            scores[:, [0, 1, 3]] = -torch.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] == 2:
                break
        assert found == [token for token in tokens[1:] if token != 2]

    def test_a_wider_beam_finds_no_less_likely_translations(self) -> None:
        teacher, (source, _, _) = make_teacher(), inputs(6)

        def likelihood(rows: list[list[int]]) -> list[float]:
            totals = []
            for index, row in enumerate(rows):
                target = torch.tensor([[1, *row]])
                logs = teacher(source[index : index + 1], target).log_softmax(-1)[0]
                totals.append(sum(float(logs[i, t]) for i, t in enumerate([*row, 2])))
            return totals

        greedy, wide = (
            likelihood(search(teacher, source, SearchOptions(beam, 0.0, 25))) for beam in (1, 8)
        )
        assert sum(wide) >= sum(greedy) - 1e-4

    def test_sentences_together_are_sentences_alone(self) -> None:
        teacher = make_teacher()
        rows = [[5, 6, 7], [], [9], [4, 5, 6], [11, 12]]
        together = translate_tokens(teacher, rows, SEARCH)
        assert together == [translate_tokens(teacher, [row], SEARCH)[0] for row in rows]
        assert together[1] == []

    @pytest.mark.parametrize("hardware", ["arch5_matmul", "arch5"])
    def test_scores_together_are_scores_alone(self, hardware: str) -> None:
        student = StudentTranslator(stepwise(make(hardware).student))
        rows = [[5, 6, 7], [], [9], [4, 5, 6], [11, 12, 13]]
        translations = [[4], [8, 8], [7, 6], [9, 9, 5, 8], []]
        together = list(scores_of(student, rows, translations, batch=2))
        order = [2, 0, 3, 4]  # by length; the empty sentence has none
        assert [len(scores) for scores in together] == [len(translations[i]) + 1 for i in order]
        for index, scores in zip(order, together, strict=True):
            (alone,) = scores_of(student, [rows[index]], [translations[index]])
            torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
        source, target = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[1, 9, 9, 5, 8]])
        whole = make(hardware).student(source, target, torch.zeros(1, 4))
        torch.testing.assert_close(together[2], whole[0], atol=1e-4, rtol=1e-4)

    def test_lines_out_are_lines_in(self, caplog: pytest.LogCaptureFixture) -> None:
        lines = ["abc", "", "   ", "z" * 100, "ab☃"]
        found = translate(make_teacher(), Words(), lines, SEARCH)
        assert len(found) == len(lines)
        assert found[1] == found[2] == ""
        assert "1 sentence(s) are longer than 11 tokens and were cut; the first is line 4" in (
            caplog.text
        )


def batches() -> Iterator[TextBatch]:
    source, target, _ = inputs(6)
    out = torch.cat([target[:, 1:], torch.full((6, 1), 2)], 1)
    out[3:, 5:] = 0
    source[2:, 7:] = 0
    while True:
        yield TextBatch(source, target.where(out != 0, 0), out)


class TestDistillation:
    @pytest.mark.parametrize("schedule", ["local", "joint", "progressive"])
    @pytest.mark.parametrize("hardware", ["arch5_matmul", "arch5"])
    def test_losses_fall(self, schedule: str, hardware: str) -> None:
        made = make(hardware)
        student = made.student.requires_grad_(True).train()
        for module in student.modules():
            if isinstance(module, TokenEmbedding):
                module.bias.requires_grad_(False)
        options = DistillConfig(
            schedule=schedule, steps=24, attention=schedule == "progressive", adaptation=True
        )
        paths = [tap.path for tap in student.taps]
        periods = plan_text(options, paths)
        teacher = TappedTeacher(made.teacher, paths)
        module = TextDistillation(teacher, student, periods, options, None, None)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(module.parameters(), 3e-4)
        batch = next(batches())
        last = periods[-1]
        first = float(sum(module._through_the_network(batch, last).values()))
        for period in periods:
            run = module._through_the_network if period.source is None else module._through_a_block
            for _ in range(30 if len(periods) < 3 else 6):
                loss = sum(run(batch, period).values())
                optimizer.zero_grad()
                loss.backward()  # type: ignore[union-attr]
                optimizer.step()
        assert float(sum(module._through_the_network(batch, last).values())) < 0.8 * first

    @pytest.mark.parametrize("hardware", ["arch5_matmul", "arch5"])
    def test_own_translations_follow_from_seed_and_step(self, hardware: str) -> None:
        student = make(hardware, bits=4).student.train()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        batch = next(batches())
        own = OwnTranslations(7)
        made = own(student, batch, 4, 0)
        assert student.training
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
        for again in (own(student, batch, 4, 0), OwnTranslations(7)(student, batch, 4, 0)):
            assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
        for others in (own(student, batch, 6, 0), own(student, batch, 4, 1)):
            assert others.target_in.shape != made.target_in.shape or not torch.equal(
                others.target_in, made.target_in
            )
        assert torch.equal(made.source, batch.source)
        for row in range(len(batch.source)):
            teachers = batch.target_out[row][batch.real[row]].tolist()
            found = made.target_out[row][made.real[row]].tolist()
            assert made.target_in[row, : len(found)].tolist() == [1, *found[:-1]]
            if row % 2:  # of step 4 the even ones are its own
                assert found == teachers
            else:
                assert found[-1] == 2
                assert len(found) <= batch.target_in.shape[1]
        changed = [
            made.target_out[row].tolist() != batch.target_out[row].tolist() for row in (0, 2, 4)
        ]
        assert any(changed)
        other_half = own(student, batch, 5, 0)
        assert other_half.target_out[0][other_half.real[0]].tolist() == (
            batch.target_out[0][batch.real[0]].tolist()
        )

    def test_only_the_last_steps_are_on_policy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, asked = make("arch5"), list[int]()
        paths = [tap.path for tap in made.student.taps]
        options = DistillConfig(schedule="joint", steps=10, on_policy=0.3)

        def own(student: Student, batch: TextBatch, step: int, rank: int) -> TextBatch:
            asked.append(step)
            return batch

        periods = plan_text(options, paths)
        teacher = TappedTeacher(made.teacher, paths)
        module = TextDistillation(teacher, made.student, periods, options, None, None, own)  # type: ignore[arg-type]
        batch = next(batches())
        for step in range(10):
            monkeypatch.setattr(TextDistillation, "global_step", step)
            module._through_the_network(batch, periods[0])
        assert asked == [7, 8, 9]

    def test_padding_takes_no_part(self) -> None:
        made = make("arch5")
        paths = [tap.path for tap in made.student.taps]
        options = DistillConfig(schedule="joint", steps=4, attention=True, adaptation=True)
        periods = plan_text(options, paths)
        teacher = TappedTeacher(made.teacher, paths)
        module = TextDistillation(teacher, made.student, periods, options, None, None)  # type: ignore[arg-type]
        batch = next(batches())
        changed = batch.target_in.clone()
        changed[3:, 6:] = 9  # behind the end of those sentences
        found = [
            module._through_the_network(b, periods[0])
            for b in (batch, batch._replace(target_in=changed))
        ]
        for path in paths:
            torch.testing.assert_close(found[0][path], found[1][path], atol=1e-5, rtol=1e-4)
