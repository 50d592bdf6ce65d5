"""Peak memory of translation's data when the training files grow tenfold, and of a long training.

    python benchmarks/memory.py --root ../shared/data/wmt_news

copies the training text once and ten times, each line numbered so that no two are alike, and for
both, in a process of its own, trains the tokenizer, encodes the text and draws every batch of an
epoch. A row a size goes to ``results/memory.csv``.

    python benchmarks/memory.py --steps 5000

trains a student of the digits for so many steps and looks at its process every second: a row says
how much memory it has when training begins, at its largest, and in the end.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from record import CONF, append

TIMES = (1, 10)
TRAINING = ("distill=joint", "quant.bits=4", "task.data.batch_size=32", "teacher.fit.epochs=1",
            "trainer=cpu", "trainer.threads=1", "trainer.progress=false")  # fmt: skip


def measure(root: Path, cache: Path, sentences: int) -> dict[str, float]:
    """Set the task up and draw an epoch; what it took."""
    from archnet.compose import compose
    from archnet.tasks import TranslationData
    from archnet.tasks.batches import batches_an_epoch

    def peak() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    loaded = peak()
    options = [
        "task=wmt14",
        f"task.data.root={root}",
        f"task.text.cache_dir={cache}",
        "task.text.vocabulary=8000",
        f"task.text.tokenizer_sentences={sentences}",
    ]
    config = compose(CONF, options)
    data, began = TranslationData(config.task, 0), time.monotonic()
    data.setup()
    ready = peak()
    steps = batches_an_epoch(data.train, config.task.text.batch_tokens, 0)
    seen = sum(len(batch.source) for batch in data.step_batches(data.train, steps))
    return {
        "pairs": len(data.train),
        "batches": steps,
        "pairs_drawn": seen,
        "loaded_mb": loaded,
        "setup_mb": ready,
        "peak_mb": peak(),
        "seconds": round(time.monotonic() - began, 1),
    }


def resident(steps: int) -> dict[str, float]:
    """Megabytes of a process that distils a student of the digits, all blocks at once."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, str(CONF.parent / "train.py"), *TRAINING]
        command += [f"distill.steps={steps}", f"output_dir={temporary}"]
        command += [f"teacher.cache_dir={temporary}/teachers"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        sizes, began = list[float](), time.monotonic()
        while process.poll() is None:
            logged = any(Path(temporary).glob("*/*/logs/csv/*/metrics.csv"))
            if logged and not any(Path(temporary).glob("*/*/stages/distill.json")):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                sizes.append(pages * resource.getpagesize() / 2**20)
            time.sleep(1)
        if process.returncode or len(sizes) < 4:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "steps": steps,
        "begin_mb": round(sizes[0], 1),
        "peak_mb": round(max(sizes), 1),
        "end_mb": round(median(sizes[-10:]), 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def grow(root: Path, folder: Path, times: int) -> None:
    """The text in ``root`` with its training part repeated under other numbers."""
    folder.mkdir()
    for path in root.glob("*.*"):
        if not path.name.startswith("train."):
            shutil.copyfile(path, folder / path.name)
            continue
        with (folder / path.name).open("w", encoding="utf-8") as file:
            for copy in range(times):
                with path.open(encoding="utf-8", newline="\n") as lines:
                    file.writelines(f"{copy} {line}" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every size and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--root", type=Path, help="train.en, train.de and so on")
    parser.add_argument("--steps", type=int, help="of a training on the digits, instead of text")
    parser.add_argument("--sentences", type=int, default=20000, help="that the tokenizer reads")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only is not None:
        print(json.dumps(measure(options.root, options.only, options.sentences)))
        return
    if options.steps is not None:
        figures = resident(options.steps)
        row = {"task": "mnist5k", "metric": "peak_mb", "seed": 0, **figures}
        row["command"] = f"python benchmarks/memory.py --steps {options.steps}"
        print(append("training_memory", row), figures)
        return
    if options.root is None:
        parser.error("--root or --steps is needed")
    for times in TIMES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "text"
            grow(options.root, folder, times)
            command = [sys.executable, __file__, "--root", str(folder)]
            command += ["--sentences", str(options.sentences), "--only", f"{temporary}/cache"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
        row = {
            "task": "wmt14",
            "metric": "peak_mb",
            "times": times,
            "tokenizer_sentences": options.sentences,
            "seed": 0,
            "command": f"python benchmarks/memory.py --root {options.root} "
            f"--sentences {options.sentences}",
            **figures,
        }
        print(append("memory", row), figures)


if __name__ == "__main__":
    main()
