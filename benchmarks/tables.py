"""The tables of results, from the rows of ``benchmarks/results``.

    python benchmarks/tables.py

writes docs/results.md, and the rows of `SELECTED` between the two markers in README.md. Of rows
that differ in nothing but their figures the last one counts; a table without rows is left out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from record import ROOT, read

BEGIN, END = "<!-- results: benchmarks/tables.py -->", "<!-- end of results -->"
INTRODUCTION = """# Results

`python benchmarks/tables.py` writes this page from the rows of `benchmarks/results/*.csv`. Each row
carries the command that reproduces it, versions, seed, data and cost;
`python benchmarks/record.py <run folder> --into <table>` adds one for a finished run. What was
tried on the way, and what the figures mean, is in [experiments.md](experiments.md); what vendors'
compilers make of students is in [chips.md](chips.md).

How to read the tables:

- *bits*: W2A4 means 2-bit weights and 4-bit activations. The first and the last layer have 8 bits.
- *agreement*: the share of test inputs on which student and teacher predict the same.
- *MACs* are multiply-accumulates. *BOPs* are MACs times weight bits times activation bits, given as
  a multiple of those of the teacher at 8 bits. *weights* are bytes, packed to their width.
- *image-steps* (*sentence-steps*): how many training inputs went through the whole student.
  *unlabelled*: how many different ones there were.
- *minutes* are those of distillation, on two CPU cores where no other device is named.

"""
Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table of results: rows of one file, told apart by ``keys``."""

    name: str
    title: str
    text: str
    keys: tuple[str | Callable[[Row], str], ...]
    columns: Mapping[str, Callable[[Row], str]]

    def rows(self) -> list[Row]:
        """The rows that count; those that share the first key are neighbours."""
        last = {
            tuple(row.get(key, "") if isinstance(key, str) else key(row) for key in self.keys): row
            for row in read(self.name)
        }
        order = list(dict.fromkeys(key[0] for key in last))
        return [last[key] for key in sorted(last, key=lambda key: order.index(key[0]))]

    def markdown(self) -> str:
        """Title, text and table; empty without rows."""
        rows = self.rows()
        return f"## {self.title}\n\n{self.text}\n\n{_lines(self.columns, rows)}" if rows else ""


def _lines(columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(row) for show in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _bits(row: Row) -> str:
    if row["weight_bits"] == "32":
        return "float"
    uniform = f"W{row['weight_bits']}A{row['act_bits']}"
    if row.get("budget"):
        return f"mixed, {row['budget']} of {uniform}'s {row['budget_of']}"
    if row.get("copies", "") not in ("", "1"):
        return f"{uniform}, {row['copies']} copies"
    return uniform


def _fitted(row: Row) -> str:
    """Whether a float student is as its conversion left it."""
    return str(row["weight_bits"] == "32" and row["inputs_seen"] == "0")


def _plain(column: str) -> Callable[[Row], str]:
    return lambda row: row.get(column, "")


def _number(column: str, form: str = ".2f", unit: float = 1) -> Callable[[Row], str]:
    return lambda row: format(float(row[column]) / unit, form) if row.get(column) else ""


def _minutes(row: Row) -> str:
    """Those of training, with what it ran on where that is no CPU."""
    device = row.get("device") or "cpu"
    return f"{float(row['minutes']):.1f}" + ("" if device == "cpu" else f" ({device})")


def _variant(row: Row) -> str:
    parts = [
        row["schedule"] + (f" ({row['block_inputs']} features)" if row["block_inputs"] else ""),
        "TAM" if row["attention"] == "True" else "no TAM",
        "RFA" if row["adaptation"] == "True" else "no RFA",
        {"lsq": "LSQ", "dorefa": "DoReFa"}[row["method"]],
        f"{row['start']} start",
    ]
    return ", ".join(parts)


_COST = {
    "MACs, x teacher": _number("macs_ratio"),
    "BOPs, x W8A8 teacher": _number("bops_ratio", ".3f"),
    "weights, kB": _number("weight_bytes", ",.0f", 1000),
}
_ACCURACY = {
    "teacher": _plain("teacher"),
    "bits": _bits,
    "teacher, %": _number("teacher_value"),
    "student, %": _number("student_value"),
    "agreement, %": _number("agreement"),
    **_COST,
    "image-steps": _number("inputs_seen", ",.0f"),
    "unlabelled": _number("unlabelled", ",.0f"),
    "minutes": _minutes,
    "command": lambda row: f"`{row['command']}`",
}

TABLES = (
    Table(
        "digits",
        "Digits (mnist5k)",
        "`make demo` gives the first row: 5,000 MNIST digits, 1,000 of them for the test. The rows "
        "of the ConvNeXt are right after its conversion, without any training; with "
        "`convert.norm_hinges=0` 89.50 % of its float student's predictions agree.",
        ("teacher", "weight_bits", "act_bits", "budget", "budget_of"),
        _ACCURACY,
    ),
    Table(
        "cifar10",
        "CIFAR-10 (JPEG re-encoding)",
        "The images are a copy that was re-encoded as JPEG, which costs accuracy, so the figures "
        "cannot be compared with published ones for CIFAR-10. Distillation sees at most 30,000 "
        "images and no labels; schedules were chosen on a validation split.",
        ("teacher", "weight_bits", "act_bits", "budget", "budget_of"),
        _ACCURACY,
    ),
    Table(
        "approximate",
        "Teachers without an exact form, CIFAR-10",
        "These teachers have operators that five operators can only approximate: a ConvNeXt (7x7 "
        "depthwise, layer norm, GELU), a ViT (patches of 4x4, class token) and inverted residuals "
        "with squeeze-excitation and hardswish, all trained here on the same split. A row with no "
        "image-steps was measured right after the fit to 256 unlabelled images. A command with "
        "`convert.student` starts from the student of another row, whose steps come on top. "
        "Earlier and cheaper variants are in `benchmarks/results/approximate.csv`.",
        ("teacher", _bits, _fitted),
        _ACCURACY,
    ),
    Table(
        "goal",
        "Promises",
        "Runs that found their recipe themselves (`goal`, [recipe.md](recipe.md)), with no other "
        "key than teacher, task, bits, data and goal. *promised* and *validation* are points below "
        "the teacher on validation data, by which the student was chosen; accuracies are of the "
        "test split. Every trial is in `benchmarks/results/search/`.",
        ("teacher", "task", "hardware", "weight_bits", "act_bits", "goal_cost", "seed"),
        {
            "teacher": _plain("teacher"),
            "task": _plain("task"),
            "bits": _bits,
            "promised": _number("goal_drop", "g"),
            "validation": _number("val_drop"),
            "kept": lambda row: "yes" if row["kept"] == "True" else "no",
            "teacher, %": _number("teacher_value"),
            "student, %": _number("student_value"),
            "agreement, %": _number("agreement"),
            "BOPs, x W8A8 teacher": _number("bops_ratio", ".3f"),
            "trials": _plain("trials"),
            "minutes": _minutes,
            "command": lambda row: f"`{row['command']}`",
        },
    ),
    Table(
        "scenes",
        "Segmentation of scenes of digits",
        "`python train.py experiment=scenes`: generated pictures of digits with masks. Mean "
        "intersection over union, and the share of pixels that student and teacher decide alike.",
        ("teacher", "weight_bits", "act_bits", "budget", "budget_of"),
        {
            "teacher": _plain("teacher"),
            "bits": _bits,
            "teacher, mIoU": _number("teacher_value"),
            "student, mIoU": _number("student_value"),
            "pixels alike, %": _number("agreement"),
            **_COST,
            "image-steps": _number("inputs_seen", ",.0f"),
            "minutes": _minutes,
            "command": lambda row: f"`{row['command']}`",
        },
    ),
    *(
        Table(
            name,
            title,
            about,
            ("teacher", "hardware", "weight_bits", "act_bits", "budget", "budget_of"),
            {
                "student": _plain("hardware"),
                "bits": _bits,
                "teacher, BLEU": _number("teacher_value"),
                "student, BLEU": _number("student_value"),
                "chrF, both": lambda row: f"{row['chrf_teacher']}, {row['chrf_student']}",
                "same sentences, %": _number("agreement", ".1f"),
                **_COST,
                "sentence-steps": _number("inputs_seen", ",.0f"),
                "minutes": _minutes,
                "command": lambda row: f"`{row['command']}`",
            },
        )
        for name, title, about in (
            (
                "multi30k",
                "Multi30k, English to German",
                "sacreBLEU on test_2016_flickr, raw text, beam 5; the signature is in the rows. "
                "Students are trained on the teacher's own translations of the training sources. "
                "`arch5_matmul` keeps attention, `arch5` has five operators and nothing else. "
                "Costs are those of reading and writing 16 tokens, and the student's embeddings "
                "count as layers on one-hot inputs. A command with `convert.student` starts from "
                "the student of another row, whose steps and minutes come on top.",
            ),
            (
                "phrases",
                "Phrases generated from CLDR",
                "`python train.py experiment=phrases`: dates, quantities and names. The row shows "
                "that the way from teacher to file works; it says nothing of real text.",
            ),
        )
    ),
    Table(
        "ablation",
        "Ablation: CIFAR-10, W2A4, one equal budget",
        "`python benchmarks/ablation.py`; accuracy and agreement on the validation split.",
        ("schedule", "block_inputs", "attention", "adaptation", "method", "start"),
        {
            "variant": _variant,
            "student, %": _number("val_accuracy"),
            "agreement, %": _number("val_agreement"),
            "image-steps": _number("inputs_seen", ",.0f"),
            "minutes": _minutes,
        },
    ),
    Table(
        "imagenet_sample",
        "Published ImageNet teachers, float students",
        "The 500 images are probably of ImageNet's training split: the table shows that conversion "
        "changes nothing, not an accuracy on ImageNet. The last two columns compare the exported "
        "file with the student.",
        ("teacher",),
        {
            "teacher": _plain("teacher"),
            "teacher, %": _number("teacher_value"),
            "student, %": _number("student_value"),
            "predictions kept, %": _number("agreement"),
            "MACs, x teacher": _number("macs_ratio"),
            "changed in ONNX Runtime": _plain("parity_mismatches"),
            "largest difference": _number("parity_max_abs_diff", ".1e"),
        },
    ),
    Table(
        "cost",
        "Cost of exact students at 224x224",
        "`python benchmarks/cost.py`; target `arch5`, W2A4 with 8 bits in the first and the last "
        "layer. The teacher's weights are counted at 8 bits.",
        ("teacher", "hardware"),
        {
            "teacher": _plain("teacher"),
            "teacher, GMACs": _number("teacher_macs", ".2f", 1e9),
            "student, GMACs": _number("student_macs", ".2f", 1e9),
            **_COST,
            "teacher W8, kB": _number("teacher_w8a8_weight_bytes", ",.0f", 1000),
            "relative error in float": _plain("relative_error"),
        },
    ),
    Table(
        "speed",
        "Speed of distillation",
        "`python benchmarks/speed.py`; ResNet-18 at 224x224, W2A4, all block taps with TAM and "
        "RFA, the adapters of the paper. With `local` an image "
        "counts once it has been through every block.",
        ("schedule", "threads", "batch_size"),
        {
            "schedule": _plain("schedule"),
            "threads": _plain("threads"),
            "batch": _plain("batch_size"),
            "images/s": _number("student_value"),
            "teacher forward alone, images/s": _number("teacher_images_per_s"),
            "peak memory, MB": _number("peak_mb", ",.0f"),
        },
    ),
    Table(
        "attention",
        "What attention becomes",
        "`python benchmarks/attention.py <run>`; error of each replacement, |replacement - "
        "attention| / |attention|, on images that neither the fit nor the training saw, averaged "
        "over the teacher's attentions. `convert.attention` chooses; `context` is its default.",
        ("teacher", "form"),
        {
            "teacher": _plain("teacher"),
            "form": _plain("form"),
            "MACs, M": _number("macs", ".2f", 1e6),
            "error after the fit": _plain("fitted"),
            "after training": _plain("student_value"),
            "minutes": _plain("minutes"),
        },
    ),
    Table(
        "verify",
        "Trained students against their golden integer models",
        "`python benchmarks/verify.py <run>`; outputs compared bit by bit, in units of the last "
        "layer's accumulator.",
        ("task", "weight_bits", "act_bits"),
        {
            "task": _plain("task"),
            "bits": _bits,
            "inputs": _number("inputs", ",.0f"),
            "PyTorch": _plain("pytorch float32"),
            "qdq": _plain("qdq"),
            "subbyte": _plain("subbyte"),
            "QONNX": _plain("qonnx"),
            "predictions changed in these": _plain("changed"),
            "OpenVINO, int8 kernels": _plain("openvino"),
            "OpenVINO in floats": _plain("openvino in floats"),
        },
    ),
    Table(
        "deploy",
        "Files and latency in ONNX Runtime",
        "`python benchmarks/deploy.py <run>`; one thread, batch 1, median of interleaved "
        "runs, on the CPU that the row names. The last column but one is the most that its 8-bit "
        "kernels gain.",
        ("task", "weight_bits", "act_bits", "as_trained"),
        {
            "task": _plain("task"),
            "bits": _bits,
            "float, kB": _number("float_bytes", ",.0f", 1000),
            "qdq, kB": _number("qdq_bytes", ",.0f", 1000),
            "subbyte, kB": _number("subbyte_bytes", ",.0f", 1000),
            "float student, ms": _number("float_student_ms"),
            "qdq student, ms": _number("student_value"),
            "times faster": _number("speedup"),
            "one large convolution, times faster": _number("convolution_speedup"),
            "CPU": _plain("cpu"),
        },
    ),
    Table(
        "decoding",
        "Speed of translating",
        "`python benchmarks/decoding.py <run>`; sentences a second on the first sentences of the "
        "test split, with the run's own beam.",
        ("task", "hardware", "weight_bits", "act_bits", "network", "runtime", "batch", "threads"),
        {
            "network": lambda row: (
                f"student, {row['hardware']}, {_bits(row)}" if row["hardware"] else "teacher"
            ),
            "runtime": _plain("runtime"),
            "batch": _plain("batch"),
            "beam": _plain("beam"),
            "threads": _plain("threads"),
            "sentences/s": _plain("per_second"),
        },
    ),
    Table(
        "memory",
        "Memory of translation's data",
        "`python benchmarks/memory.py`; tokenizer, encoding and an epoch of batches, as the "
        "training text grows.",
        ("times", "tokenizer_sentences"),
        {
            "pairs": _number("pairs", ",.0f"),
            "sentences the tokenizer reads": _number("tokenizer_sentences", ",.0f"),
            "peak, MB": _number("peak_mb", ",.0f"),
            "seconds": _number("seconds", ".0f"),
        },
    ),
    Table(
        "vela",
        "Arm Ethos-U55-128, estimated by Vela",
        "`python benchmarks/vela.py <run>`; the int8 TFLite form, the teacher by the same route. "
        "Widths below 8 bits are the same int8 file: Vela compresses their weights.",
        ("task", "weight_bits", "act_bits", "as_trained"),
        {
            "task": _plain("task"),
            "bits": _bits,
            "inferences/s": _number("student_value", ",.0f"),
            "teacher int8, inferences/s": _number("teacher_value", ",.0f"),
            "encoded weights, kB": _number("encoded_weight_bytes", ",.0f", 1000),
            "teacher's, kB": _number("teacher_encoded_weight_bytes", ",.0f", 1000),
            "SRAM, kB": _number("sram_bytes", ",.0f", 1000),
            "operators on the CPU": _plain("cpu_operators"),
        },
    ),
)


# The rows of the README: a table, and how the command of its row begins.
SELECTED = (
    ("digits", "python train.py experiment=demo"),
    ("cifar10", "python train.py experiment=cifar10_w4a4"),
    ("multi30k", "python train.py experiment=multi30k_w4a4"),
)
_METRICS = {"accuracy": "accuracy, %", "bleu": "BLEU"}
_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "data": _plain("task"),
    "teacher": lambda row: row["teacher"].split(",")[0],
    "bits": _bits,
    "metric": lambda row: _METRICS.get(row["metric"].lower(), row["metric"]),
    "teacher's": _number("teacher_value"),
    "student's": _number("student_value"),
    "MACs, x teacher": _number("macs_ratio"),
    "BOPs, x W8A8 teacher": _number("bops_ratio", ".3f"),
    "minutes": _minutes,
    "command": lambda row: f"`{row['command']}`",
}


def selected() -> str:
    """The table of the README.

    Raises:
        ValueError: a row of `SELECTED` is not there.
    """
    named = {table.name: table for table in TABLES}
    rows = []
    for name, command in SELECTED:
        found = [
            row for row in named[name].rows() if f"{row['command']} ".startswith(f"{command} ")
        ]
        if not found:
            raise ValueError(f"benchmarks/results/{name}.csv has no row of {command}")
        rows.append(found[-1])
    return _lines(_COLUMNS, rows)


def page() -> str:
    """docs/results.md as the rows are now."""
    return INTRODUCTION + "\n".join(filter(None, (table.markdown() for table in TABLES)))


def filled(readme: str) -> str:
    """The text of the README with its table as the rows are now."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{selected()}\n{END}{after}"


def main() -> None:
    """Write the page, and the README's table."""
    (ROOT / "docs" / "results.md").write_text(page())
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
