"""The examples run as they are, and the notebook's outputs are those of its code."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import ROOT
from test_translation_run import SHORT

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells() -> list[dict]:
    text = (EXAMPLES / "own_classifier.ipynb").read_text()
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_executed() -> None:
    assert [cell["execution_count"] for cell in cells()] == [*range(1, len(cells()) + 1)]
    said = json.dumps([cell["outputs"] for cell in cells()])
    assert "labels are dropped" in said
    assert "100 %" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state, names = torch.random.get_rng_state(), dict[str, object]()
    for cell in cells():
        # Less of the same: fewer steps.
        source = "".join(cell["source"]).replace("steps=300", "steps=20")
        exec(compile(source, "own_classifier.ipynb", "exec"), names)
    torch.random.set_rng_state(state)
    archnet, student = names["archnet"], names["student"]
    found = archnet.compare(names["teacher"], student, names["val_loader"])
    assert found.teacher > 90
    assert found.agreement > 90
    assert archnet.verify(student, "student.onnx", names["val_loader"], inputs=200).equal


@pytest.mark.slow
def test_the_translation_runs(tmp_path: Path) -> None:
    words = [*SHORT, f"teacher.cache_dir={tmp_path}/t", f"task.text.cache_dir={tmp_path}/x"]
    folder = load("translation").main(*words, outputs=str(tmp_path))
    found = {path.name for path in folder.iterdir()}
    assert {"student.encoder.onnx", "student.decoder.onnx", "metrics.json"} <= found
