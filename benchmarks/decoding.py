"""Sentences a second of teacher and students, in PyTorch and ONNX Runtime, batch 1 and 32.

    python benchmarks/decoding.py <run folder>... --threads 1

translates the first sentences of the test split with the run's own search. The teacher is measured
with the first run. Sentences of one length run together, up to the batch; rows go to
``results/decoding.csv``.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import append

from archnet.convert import stepwise
from archnet.deploy import OnnxTranslator
from archnet.jobs import conductor
from archnet.jobs.translation import Translation
from archnet.runs import RunFolder
from archnet.runs.student import load_student
from archnet.tasks import TranslationData
from archnet.translate import StudentTranslator, Translator, translate

BATCHES = (1, 32)


def translation_of(folder: RunFolder) -> Translation:
    """The job of a run of a translation task."""
    job = conductor.job_of(folder)
    assert isinstance(job, Translation), f"{folder.path} is no run of a translation task"
    return job


def networks(folder: RunFolder, threads: int, teacher: bool) -> dict[tuple[str, str], Any]:
    """What is measured, by network and runtime."""
    found: dict[tuple[str, str], Any] = {}
    if teacher:
        job = translation_of(folder)
        vocabulary = len(job.tokenizer())
        found["teacher", "pytorch"] = job.translator("teacher", "pytorch", vocabulary)
    student = load_student(folder)
    found["student", "pytorch"] = StudentTranslator(stepwise(student))
    found["student", "onnxruntime"] = OnnxTranslator(folder.path, threads)
    return found


def measure(network: Translator, folder: RunFolder, sentences: Sequence[str], batch: int) -> float:
    """Sentences a second, after a short warm-up."""
    job = translation_of(folder)
    tokenizer, options = job.tokenizer(), job.search
    translate(network, tokenizer, sentences[:4], options, batch=batch)
    began = time.perf_counter()
    translate(network, tokenizer, sentences, options, batch=batch)
    return len(sentences) / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every network of every run and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="run", help="finished run folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for number, path in enumerate(options.runs):
        folder = RunFolder.open(path)
        config = folder.config()
        data = TranslationData(config.task, config.seed)
        sentences, _ = data.pairs("test", options.sentences)
        for (name, runtime), network in networks(folder, options.threads, number == 0).items():
            for batch in BATCHES:
                row = {
                    "task": config.task.name,
                    "teacher": config.teacher.name,
                    "hardware": config.hardware.name if name == "student" else "",
                    "weight_bits": config.quant.weight_bits if name == "student" else 32,
                    "act_bits": config.quant.act_bits if name == "student" else 32,
                    "metric": "sentences_per_second",
                    "network": name,
                    "runtime": runtime,
                    "batch": batch,
                    "beam": config.task.text.beam,
                    "threads": options.threads,
                    "sentences": len(sentences),
                    "per_second": round(measure(network, folder, sentences, batch), 2),
                    "seed": config.seed,
                    "command": f"python benchmarks/decoding.py <run> --threads {options.threads}",
                }
                print(append("decoding", row), name, runtime, batch, row["per_second"])


if __name__ == "__main__":
    main()
