"""Vendors' tools: what their bridges say of themselves, where they are installed, and how they are
run: in an interpreter of their own, with a limit, their noise kept in a log.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archnet.config import nearest
from archnet.errors import ArchnetError, printable
from archnet.files import atomic, remove

PLACE = "ARCHNET_CHIPS"  # names a folder of environments, in place of the user's cache
TIMEOUT = 1800  # seconds; a large network takes a compiler some minutes
NO_DEPS = "# --no-deps"  # behind this line of a requirements file pip looks for no dependencies
READY = ".ready"  # in an environment: the requirements that it was made of
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_PATH = re.compile(r"(/[\w.@+-]+){2,}")
_LARGEST_ANSWER = 1 << 28  # bytes
_READ_OF_LOG = 1 << 26  # bytes, of a log its end
_ERRORS = (r"(\w+\.)*\w+(Error|Exception): ", r"(?i).*\berror\b")  # lines that say what went wrong


class ChipError(ArchnetError):
    """A tool that is unknown, not installed, of another version, or that fails."""


@dataclass(frozen=True)
class Placed:
    """An operator as a tool compiled it, and where it runs.

    Args:
        name: the tool's, often that of a node of the file.
        operator: as the tool calls it; several of the file may be fused.
        where: as the tool calls it.
        cycles: None where the tool tells none.
        why: it runs there, in the tool's own words, where it has any.
        origin: the layer of the teacher, a module path, where the file says so.
    """

    name: str
    operator: str
    where: str
    cycles: int | None = None
    why: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Compiled:
    """What a tool makes of one file.

    Args:
        version: of the tool.
        operators: as it compiled them; none where it does not tell, or failed before.
        accelerator: what the tool calls the place where operators should run.
        figures: its estimates, by name: ``cycles``, ``inferences_per_second``,
            ``milliseconds`` (measured on this computer), ``sram_bytes``, ...
        scores: float64 of its simulator or runtime, (N, ...) of a network with one output,
            (N, numbers) of all outputs one behind the other; None where nothing was run.
        error: what went wrong, one line; "" where nothing did.
        seconds: all of it.
        log: what it printed; None where that is not kept.
        made: the file that a converter has made; None of other tools, and where it failed.
    """

    version: str
    operators: tuple[Placed, ...]
    accelerator: str
    figures: Mapping[str, Any]
    scores: NDArray[np.float64] | None = field(repr=False)
    error: str
    seconds: float
    log: Path | None = None
    made: bytes | None = field(default=None, repr=False)

    @property
    def off(self) -> tuple[Placed, ...]:
        """The operators that are not on the accelerator."""
        return tuple(row for row in self.operators if row.where != self.accelerator)

    def summary(self) -> dict[str, Any]:
        """As plain data (JSON)."""
        return {
            "version": self.version,
            "operators": len(self.operators),
            "off": [
                {"name": row.name, "operator": row.operator, "why": row.why, "layer": row.origin}
                for row in self.off
            ],
            "figures": dict(self.figures),
            "error": self.error,
            "seconds": round(self.seconds, 1),
            "log": self.log.name if self.log else "",
        }


@dataclass(frozen=True)
class Bridge:
    """One tool: ``<name>.py`` beside this file, with its pinned requirements in ``<name>.txt``.

    The module imports its tool in functions alone, so that what it says of itself can be read here:
    ``ABOUT``, ``PACKAGE``, ``CHIPS`` (a hardware target -> what the tool calls such chips, the
    default first; none for a runtime of this computer), ``ACCELERATOR`` (what it calls the place
    where operators should run), ``SUFFIX`` of the files it takes, ``MAKES`` (the suffix of the file
    that it makes, of a converter, at ``made`` in the request's folder), ``IR`` (the newest version
    of ONNX's format that it reads), ``FORM`` (that it takes quantized students in; None: that of
    most tools), ``QUANTIZES`` (whether it quantizes a float network by itself), ``TORCH`` (whether
    it needs archnet's), ``ERRORS`` and ``MARK`` (patterns of lines that say what went wrong, and
    of what stands in front of its words), and ``run(request)``, see `archnet.chips.serve`.
    """

    name: str

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(f"archnet.chips.{self.name}")

    def says(self, name: str, otherwise: Any = None) -> Any:
        """What the bridge says of itself under a name."""
        return getattr(self.module, name, otherwise)

    @property
    def requirements(self) -> str:
        return files("archnet.chips").joinpath(f"{self.name}.txt").read_text(encoding="utf-8")

    @property
    def version(self) -> str:
        """The tool's version that the bridge was written for."""
        package = re.escape(self.says("PACKAGE"))
        found = re.search(rf"^{package}==(\S+)", self.requirements, re.MULTILINE)
        assert found is not None
        return found[1]

    @property
    def chips(self) -> Mapping[str, tuple[str, ...]]:
        """The chips of every target that it compiles for, the one taken by default first."""
        return self.says("CHIPS", {})

    def chip(self, hardware: str, chip: str | None = None) -> str:
        """What the tool calls the chip of a target.

        Args:
            hardware: the target's name.
            chip: one of those of the target, as the tool calls it; None: the default.

        Raises:
            ChipError: the tool does not compile for that target, or does not know the chip.
        """
        if not self.chips:
            if chip is not None:
                raise ChipError(
                    f"chip={chip}: tool={self.name} runs on this computer, leave it out"
                )
            return ""
        if hardware not in self.chips:
            raise ChipError(
                f"tool={self.name} does not compile for hardware={hardware}; "
                f"it does for {', '.join(self.chips)}"
            )
        known = self.chips[hardware]
        if chip is not None and chip not in known:
            raise ChipError(
                f"chip={chip} is not one of {', '.join(known)}; nearest: {nearest(chip, known)}"
            )
        return chip or known[0]

    @property
    def environment(self) -> Path:
        """Its folder, whether it is there or not."""
        given = os.environ.get(PLACE)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return (Path(given) if given else cache / "archnet" / "chips") / self.name

    @property
    def python(self) -> Path:
        folder = self.environment / ("Scripts" if os.name == "nt" else "bin")
        return folder / "python"

    @property
    def missing(self) -> str:
        """Why the tool cannot be run, and what to do; "" where it can."""
        if self.python.exists():
            return ""
        return (
            f"tool={self.name} is not installed in {self.environment}: "
            f"archnet compile --install {self.name}"
        )

    def install(self, python: str | None = None) -> Path:
        """Make its environment, unless it is there with just these requirements.

        Args:
            python: the interpreter that it is made of; None: this one.

        Returns:
            Its folder.

        Raises:
            ChipError: the interpreter is none that fits, or pip fails; nothing is left.
        """
        place, stamp = self.environment, self.environment / READY
        if stamp.is_file() and stamp.read_text() == self.requirements:
            return place
        interpreter = shutil.which(python or sys.executable)
        if interpreter is None:
            raise ChipError(f"--python={python}: there is no such program")
        if self.says("TORCH") and _version_of(interpreter) != _version_of(sys.executable):
            raise ChipError(
                f"--python={python}: tool={self.name} uses the torch of archnet, and so the same "
                f"version of Python, {_version_of(sys.executable)}: leave it out"
            )
        remove(place)
        try:
            self._make(interpreter)
        except BaseException:
            remove(place)
            raise
        with atomic(stamp, ChipError) as part:
            part.write_text(self.requirements)
        return place

    def _make(self, interpreter: str) -> None:
        _called([interpreter, "-m", "venv", str(self.environment)], self.name)
        plain, _, alone = self.requirements.partition(NO_DEPS)
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        with tempfile.TemporaryDirectory() as folder:
            for text, more in ((plain, []), (alone.partition("\n")[2], ["--no-deps"])):
                if text.strip():
                    (Path(folder) / "requirements.txt").write_text(text)
                    _called([*pip, *more, "-r", f"{folder}/requirements.txt"], self.name)
        if self.says("TORCH"):
            torch = importlib.util.find_spec("torch")
            assert torch is not None
            assert torch.origin is not None
            (packages,) = self.environment.glob("lib/python*/site-packages")
            (packages / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")

    def compile(
        self,
        content: bytes,
        chip: str = "",
        inputs: NDArray[Any] | None = None,
        calibration: NDArray[Any] | None = None,
        *,
        timeout: float = TIMEOUT,
        log: Path | None = None,
        origins: Mapping[str, str] | None = None,
        outputs: Sequence[str] = (),
    ) -> Compiled:
        """Have the tool compile a file, and run it.

        Args:
            content: the file's.
            chip: as the tool calls it; "" for a runtime.
            inputs: (N, ...) float32, to run one by one; None: nothing is run.
            calibration: (N, ...) float32; given, the tool quantizes a float network by itself.
            timeout: seconds.
            log: where to keep what the tool prints; None: nowhere.
            origins: name of a node of the file -> the teacher's layer.
            outputs: the names of an ONNX file's outputs, in its order; () of another file.

        Returns:
            What it said; what went wrong on the way is its ``error``, beside all it had said.

        Raises:
            ChipError: the tool is not there, or of another version than its bridge.
        """
        if self.missing:
            raise ChipError(self.missing)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="archnet-chip-") as place:
            folder = Path(place)
            self._ask(folder, content, chip, inputs, calibration, outputs)
            ended = self._run(folder, timeout)
            answer = _answer(folder / "answer.json")
            text = _text(folder / "log")
            if log is not None:
                with atomic(log, ChipError) as part:
                    shutil.copyfile(folder / "log", part)
            if answer.get("pinned") is False:
                raise ChipError(self._other(answer.get("version", "")))
            error = self._error(ended, answer, text)
            where = folder / "scores.npy"
            scores = np.load(where, allow_pickle=False) if where.is_file() else None
            file = folder / "made"
            made = file.read_bytes() if file.is_file() and not error else None
        return Compiled(
            answer.get("version", f"{self.says('PACKAGE')} {self.version}"),
            tuple(_placed(row, origins or {}) for row in answer.get("operators", [])),
            self.says("ACCELERATOR"),
            answer.get("figures", {}),
            scores,
            error,
            time.monotonic() - start,
            log,
            made,
        )

    def _ask(
        self,
        folder: Path,
        content: bytes,
        chip: str,
        inputs: NDArray[Any] | None,
        calibration: NDArray[Any] | None,
        outputs: Sequence[str],
    ) -> None:
        name = f"network{self.says('SUFFIX')}"
        (folder / name).write_bytes(content)
        for what, array in (("inputs", inputs), ("calibration", calibration)):
            values = np.zeros((0, 1), np.float32) if array is None else array
            np.save(folder / f"{what}.npy", np.asarray(values, np.float32))
        request = {
            "file": name,
            "chip": chip,
            "quantize": calibration is not None,
            "outputs": list(outputs),
            "package": self.says("PACKAGE"),
            "version": self.version,
        }
        (folder / "request.json").write_text(json.dumps(request))

    def _run(self, folder: Path, timeout: float) -> str:
        """Run the bridge; how it ended, "" as it should."""
        here = Path(str(files("archnet.chips")))
        # No PYTHON... of this process: the tool has an environment of its own.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        bin_first = f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}"
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    str(self.python),
                    "-I",
                    str(here / "serve.py"),
                    str(here / f"{self.name}.py"),
                    str(folder),
                ],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**kept, "PATH": bin_first},
                start_new_session=True,
            )
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                return f"not done after {timeout:g} s (timeout=<seconds> gives it more)"
            finally:
                # Whatever it has started goes with it.
                _kill(process)
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return f"it ended with status {status}" if status else ""

    def _other(self, version: str) -> str:
        found = version or f"no {self.says('PACKAGE')}"
        return (
            f"tool={self.name}: {self.environment} has {found}, and its bridge is for "
            f"{self.version}: remove that folder, then archnet compile --install {self.name}"
        )

    def _error(self, ended: str, answer: Mapping[str, Any], log: str) -> str:
        """What went wrong, with the tool's own words; "" where nothing did."""
        told = str(answer.get("error", ""))
        if not ended and not told:
            return "" if answer.get("done") else "it ended without an answer"
        begun = _plain(ended or ("" if "Traceback" in told else told.strip().partition("\n")[0]))
        said = self.first_error(f"{told}\n{log}")
        if not begun or not said or said in begun:
            return begun or said or "it failed without a word"
        return said if begun in said else _plain(f"{begun}: {said}")

    def first_error(self, text: str) -> str:
        """The line of a tool's output that says what went wrong; "" where none does."""
        lines = [_COLOUR.sub("", line).strip() for line in text.splitlines()]
        lines = [line for line in lines if line and "Traceback" not in line]
        for mark in self.says("ERRORS", _ERRORS):
            for line in lines:
                if re.match(mark, line):
                    return _plain(re.sub(self.says("MARK", r"^$"), "", line))
        return ""


def bridges() -> list[str]:
    """The names of all bridges."""
    return sorted(
        path.name.removesuffix(".txt")
        for path in files("archnet.chips").iterdir()
        if path.name.endswith(".txt")
    )


def tools() -> list[str]:
    """The names of those that compile or run a file; converters, which make one, are not asked
    for by ``tool=``.
    """
    return [name for name in bridges() if not Bridge(name).says("MAKES")]


def bridge(name: str) -> Bridge:
    """The bridge of a tool.

    Raises:
        ChipError: there is none; the message names the nearest.
    """
    if name not in bridges():
        known = tools()
        raise ChipError(
            f"tool={name} is not one of {', '.join(known)}; nearest: {nearest(name, known)}"
        )
    return Bridge(name)


def tool_of(hardware: str) -> str:
    """The tool that compiles for a target; "" where none does."""
    return next((name for name in tools() if hardware in Bridge(name).chips), "")


def _placed(row: Mapping[str, Any], origins: Mapping[str, str]) -> Placed:
    name = str(row["name"])
    return Placed(
        name,
        str(row["operator"]),
        str(row["where"]),
        row.get("cycles"),
        str(row.get("why", "")),
        origin_of(name, origins),
    )


def origin_of(name: str, origins: Mapping[str, str]) -> str:
    """The teacher's layer of what a tool calls ``name``: that of the node with the longest name in
    it, for tools add to the names of nodes, and join those that they fuse.
    """
    inside = [node for node in origins if node and node in name]
    return origins[max(inside, key=len)] if inside else ""


def _called(command: Sequence[str], tool: str) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        told = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in told if "error" in line.lower()]
        said = (errors or told or [f"exit code {done.returncode}"])[0]
        raise ChipError(f"tool={tool} cannot be installed: {_plain(said)}")


def _version_of(python: str) -> str:
    said = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):
        process.kill()
    process.wait()


def _answer(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > _LARGEST_ANSWER:
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """The end of a log, which may be huge."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _READ_OF_LOG))
        return file.read().decode("utf-8", "replace")


def _plain(line: str) -> str:
    """A line of a tool's output without the folders of this machine."""
    return printable(_PATH.sub(lambda path: Path(path[0]).name, line), 300)
