"""Runs in a tool's own interpreter: hands a request to a bridge, and writes down what it tells.

    python -I serve.py <bridge.py> <folder>

It imports the standard library and, where a bridge asks for arrays, numpy; nothing of archnet. With
``-I`` a module named like a bridge (`onnxruntime`) is the tool's, not the file beside this one. The
folder holds ``request.json``, the network's file and arrays (``.npy``); what the bridge tells goes
to ``answer.json`` and ``scores.npy`` at once, so that a tool which crashes later takes nothing
along. Whatever the tool prints goes to ``log`` there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Sequence  # noqa: UP035  # some tools live in Python 3.8

SECONDS = 2.0  # that a network is timed for
MOST_RUNS = 200


class Request:
    """What a bridge is asked, and where it tells its answer.

    Attributes:
        folder: scratch, removed afterwards.
        file: the network.
        chip: what the tool calls the chip; "" for a runtime of this computer.
        quantize: whether the tool shall quantize the network by itself, on ``calibration()``.
        outputs: the names of an ONNX file's outputs, in its order; none of another file.
    """

    def __init__(self, folder: Path) -> None:
        asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.file = folder / asked["file"]
        self.chip: str = asked["chip"]
        self.quantize: bool = asked["quantize"]
        self.outputs: list[str] = asked.get("outputs", [])
        self.package: str = asked["package"]
        self.pinned: str = asked["version"]
        self._answer: dict[str, Any] = {}

    def calibration(self) -> Any:
        """(N, ...) float32 that quantization looks at."""
        return self._array("calibration")

    def inputs(self) -> Any:
        """(N, ...) float32 to run; N may be 0."""
        return self._array("inputs")

    def log(self) -> str:
        """What the tool has printed so far."""
        flush()
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def tell(self, **parts: Any) -> None:
        """Add to the answer: ``operators``, ``figures``, ``scores``, ``error``.

        ``operators`` are dicts with ``name``, ``operator``, ``where`` and, where the tool says so,
        ``cycles`` and ``why`` (it runs there). ``figures`` are numbers and words by name.
        ``scores`` is (N, ...), what came out for `inputs`, see `joined`.
        """
        if "scores" in parts:
            import numpy as np

            np.save(self.folder / "scores.npy", np.asarray(parts.pop("scores"), np.float64))
        self._answer.update(parts)
        part = self.folder / ".answer.json"
        part.write_text(json.dumps(self._answer), encoding="utf-8")
        part.replace(self.folder / "answer.json")

    def run(self, run: Callable[[Any], Any]) -> None:
        """Run every input, a batch of one each, and tell the scores; time the first and tell
        ``milliseconds`` of one, the median.

        Args:
            run: gives the outputs of a batch of one, all of them in the file's order.
        """
        import numpy as np

        inputs = self.inputs()
        if not len(inputs):
            return
        self.tell(scores=np.stack([self.joined(run(item[None])) for item in inputs]))
        taken: list[float] = []
        while sum(taken) < SECONDS and len(taken) < MOST_RUNS:
            start = time.perf_counter()
            run(inputs[:1])
            taken.append(time.perf_counter() - start)
        figures = {
            **self._answer.get("figures", {}),
            "milliseconds": sorted(taken)[len(taken) // 2] * 1e3,
        }
        self.tell(figures=figures)

    @staticmethod
    def joined(outputs: Sequence[Any]) -> Any:
        """What a network gives for one sample: its only output (1, ...) without the batch, or the
        numbers of all outputs one behind the other, (numbers,).
        """
        import numpy as np

        # Copies: some tools hand out memory that the next run fills.
        arrays = [np.array(output, np.float64) for output in outputs]
        if len(arrays) == 1:
            return arrays[0].reshape(arrays[0].shape[1:])
        return np.concatenate([array.reshape(-1) for array in arrays])

    def nodes(self, profile: str) -> list[dict[str, Any]]:
        """The nodes of the graph that ONNX Runtime ran, each with the provider that it ran in.

        Args:
            profile: the file that it wrote of one run.
        """
        found = {}
        for event in json.loads(Path(profile).read_text(encoding="utf-8")):
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                about = event["args"]
                found[about.get("node_index", name)] = {
                    "name": name[: -len("_kernel_time")],
                    "operator": about.get("op_name", ""),
                    "where": about.get("provider", "").replace("ExecutionProvider", ""),
                }
        return list(found.values())

    def _array(self, name: str) -> Any:
        import numpy as np

        return np.load(self.folder / f"{name}.npy")


def flush() -> None:
    """Bring what was printed to the log, that of C and C++ libraries, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        ctypes.CDLL(None).fflush(None)


def serve(bridge: Path, folder: Path) -> None:
    """Answer one request."""
    request = Request(folder)
    try:
        found = metadata.version(request.package)
        request.tell(version=f"{request.package} {found}", pinned=found == request.pinned)
        if found != request.pinned:
            return
        spec = importlib.util.spec_from_file_location("bridge", bridge)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.run(request)
        request.tell(done=True)
    except metadata.PackageNotFoundError:
        request.tell(version="", pinned=False)
    except Exception as error:  # Whatever a tool raises is an answer.
        request.tell(error=f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str]) -> None:
    """Answer, and end at once: what a tool does while it is taken down is of no interest."""
    serve(Path(arguments[0]), Path(arguments[1]))
    flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
