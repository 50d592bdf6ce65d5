"""Damaged run folders and caches through every command that reads them.

    python benchmarks/fuzz_folders.py --count 60

makes one small finished run, damages a copy of it in one place, and opens that copy with every
command, each in a process of its own. A command may succeed, find something (exit code 1) or refuse
in one line (exit code 2). It may not print a traceback, take ten times as long as with the whole
folder (at least 10 s), die, or run code that the folder holds. A row goes to
``results/robustness.csv``.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from record import CONF, append_robustness

SHORTEST = 10.0  # seconds that a command may always take
TIMES = 10  # as many times as with the whole folder
COMMANDS = ("report", "export", "evaluate", "cost", "verify", "resume")
# What a process ends with where an exception has left the command.
ESCAPED = 99


# Damages ------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random, Path], None]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def truncated(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Only the beginning is left."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, max(2, len(content)))])


def empty(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Nothing is left."""
    path.write_bytes(b"")


def flipped(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Some bits are others."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 8, 64))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def another_kind(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Valid text of its format, of another kind: a list, a number, a mapping without keys."""
    path.write_text(
        rng.choice(("[]", "{}", "null", "3", '"text"', '[{"path": 1}]', '{"seconds": []}'))
    )


def folder_instead(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A folder stands where the file was."""
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A symbolic link that goes round in a circle."""
    path.unlink()
    path.symlink_to(path.name)


def endless(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A file without an end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Nobody may read it (which the superuser does nevertheless)."""
    path.chmod(0)


def pickled(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Pickled code that makes the sentinel."""
    import torch

    if rng.random() < 0.5:
        path.write_bytes(pickle.dumps(Touch(str(sentinel))))
    else:
        torch.save({"state": Touch(str(sentinel))}, path)


def large(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A number in it is enormous, or no number."""
    number = rng.choice(("1e400", "-1e400", "NaN", "9" * 400, "-1", "1e30", "10000000000000"))
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(_replaced(content, rng)).replace('"LARGE"', number))
        return
    text = path.read_text(errors="replace")
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    place = rng.choice(digits) if digits else 0
    path.write_text(text[:place] + number + text[place + 1 :])


def bracketed(path: Path, rng: random.Random, sentinel: Path) -> None:
    """Names that look like a terminal's colours, a page's tags, or a formula."""
    name = rng.choice(
        ("[bold]x[/]", "[/red]", "\x1b[31mx", "<script>x</script>", "$\\frac$", "${x}")
    )
    text = path.read_text(errors="replace")
    for word in ("digits", "mnist5k", "arch5", "blocks", "stem"):
        text = text.replace(word, json.dumps(name)[1:-1] if path.suffix == ".json" else name)
    path.write_text(text)


def odd_student(path: Path, rng: random.Random, sentinel: Path) -> None:
    """A student of sound tensors whose plain data are not: operators, sizes, wires, shapes."""
    import torch

    packed = torch.load(path, weights_only=True)
    graph, state = packed["architecture"], packed["state"]
    step = rng.choice(graph["steps"])
    tensor = rng.choice(sorted(state))
    numbers = [key for key, value in step["arguments"].items() if isinstance(value, int)]

    def size() -> None:
        if numbers:
            step["arguments"][rng.choice(numbers)] = rng.choice((0, -1, 10**6, 10**12, "3"))

    changes = (
        lambda: step.update(operator="Unheard"),
        lambda: step.update(inputs=["nowhere"]),
        lambda: step.update(inputs=[step["name"]]),
        lambda: step.update(arguments={"odd": 1}),
        size,
        lambda: graph.update(output="nowhere"),
        lambda: graph.update(taps=[{"path": "a", "node": "b", "value": "nowhere"}]),
        lambda: graph["shapes"].update({step["name"]: [10**9, 10**9]}),
        lambda: packed.pop(rng.choice(sorted(packed))),
        lambda: state.pop(tensor),
        lambda: state.update({tensor: torch.zeros(3, 1, 2)}),
        lambda: state.update({tensor: torch.full_like(state[tensor].float(), float("nan"))}),
        lambda: graph.update(steps=[]),
    )
    rng.choice(changes)()
    torch.save(packed, path)


def factory(path: Path, rng: random.Random, sentinel: Path) -> None:
    """The teacher is what a function returns that makes the sentinel."""
    import yaml

    tree = yaml.safe_load(path.read_text())
    name = rng.choice(("os:mkdir", "subprocess:getoutput", "builtins:exec"))
    argument = {
        "os:mkdir": {"path": str(sentinel)},
        "subprocess:getoutput": {"cmd": f"mkdir {sentinel}"},
        "builtins:exec": {"source": f"import os; os.mkdir({str(sentinel)!r})"},
    }[name]
    tree["teacher"].update(source="custom", factory=name, kwargs=argument)
    path.write_text(yaml.safe_dump(tree))


def tagged(path: Path, rng: random.Random, sentinel: Path) -> None:
    """YAML that asks its reader for objects, the environment, or an enormous text."""
    nested = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    call = f"!!python/object/apply:os.mkdir [{sentinel}]"
    path.write_text(
        rng.choice(
            (
                path.read_text() + f"name: {call}\n",
                path.read_text().replace("seed: 0", "seed: ${oc.env:HOME}"),
                path.read_text().replace("name: null", "name: ${oc.env:HOME}"),
                f"a0: &a0 [x]\n{nested}\n",
                "[" * 5000,
                path.read_text().replace("teacher:", "teacher: null\nother:"),
            )
        )
    )


def _replaced(content: object, rng: random.Random) -> object:
    """``content`` with one of its numbers replaced by LARGE."""
    places: list[tuple[object, object]] = []

    def collect(node: object) -> None:
        if isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                if isinstance(value, int | float):
                    places.append((node, key))
                collect(value)

    collect(content)
    if places:
        node, key = rng.choice(places)
        node[key] = "LARGE"  # type: ignore[index]
    return content


ANY: tuple[Damage, ...] = (
    truncated,
    empty,
    flipped,
    another_kind,
    folder_instead,
    link_to_itself,
    endless,
    pipe,
    unreadable,
)
TEXT = (*ANY, large, bracketed)
BINARY = (*ANY, pickled)
# Damages of every file that a run leaves, and of the cache of its teacher.
FILES: dict[str, tuple[Damage, ...]] = {
    "config.yaml": (*TEXT, factory, tagged),
    "origin.json": TEXT,
    "metrics.json": TEXT,
    "conversion.json": TEXT,
    "stages/teacher.json": TEXT,
    "stages/convert.json": TEXT,
    "stages/distill.json": TEXT,
    "stages/evaluate.json": TEXT,
    "stages/export.json": TEXT,
    "stages/audit.json": TEXT,
    "stages/parity.json": TEXT,
    "stages/cost.json": TEXT,
    "logs/csv/000/metrics.csv": TEXT,
    "checkpoints/student.pt": (*BINARY, odd_student),
    "checkpoints/calibrated.pt": (*BINARY, odd_student),
    "checkpoints/trained.pt": (*BINARY, odd_student),
    "checkpoints/teacher.pt": BINARY,
    "checkpoints/step*.ckpt": BINARY,
    "student.onnx": BINARY,
    "teachers/*/teacher.safetensors": BINARY,
    "teachers/*/teacher.json": ANY,
    ".lock": ANY,
}


# One case -----------------------------------------------------------------------------------


@dataclass
class Case:
    """One damage of one file, and how a command took it."""

    file: str
    damage: str
    command: str
    code: int
    seconds: float
    output: str
    verdict: str  # fine, traceback, hang, crash or executed


def make_run(folder: Path) -> Path:
    """A finished run of the digits with next to no training in it; returns what is copied."""
    from archnet.compose import compose
    from archnet.jobs import conductor

    root = folder / "whole"
    options = ["trainer=debug", "trainer.progress=false", "quant.weight_bits=2", "quant.act_bits=4"]
    options += ["distill.steps=10", "distill.joint_steps=5", "distill.checkpoint_every=5"]
    options += [f"output_dir={root}/outputs", f"teacher.cache_dir={root}/teachers"]
    made = conductor.run(compose(CONF, options))
    made.path.rename(root / "run")
    return root


def cases(root: Path, seed: int, only: str) -> Iterator[tuple[str, Damage]]:
    """Files that the run at ``root`` has, with damages: all pairs in an order drawn by ``seed``."""
    pairs = [
        (file, damage)
        for file, damages in FILES.items()
        if only in file and list(_base(root, file).glob(file))
        for damage in damages
    ]
    rng = random.Random(seed)
    while True:
        rng.shuffle(pairs)
        yield from pairs


def _base(root: Path, file: str) -> Path:
    return root if file.startswith("teachers") else root / "run"


def damaged(root: Path, place: Path, file: str, damage: Damage, seed: int) -> Path:
    """A damaged copy of the run at ``place``; returns its sentinel."""
    shutil.copytree(root, place, symlinks=True)
    sentinel = place / "executed"
    (path, *_) = sorted(_base(place, file).glob(file))
    if file.startswith("teachers") and damage is not unreadable:
        # The cache is read where the run's own copy has to be made again.
        (place / "run" / "stages" / "teacher.json").unlink()
        (place / "run" / "checkpoints" / "teacher.pt").unlink()
    # A damage that does not suit a file, such as odd numbers in an image, leaves it as it is.
    with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError, IndexError):
        damage(path, random.Random(seed), sentinel)
    return sentinel


def command_of(name: str, place: Path) -> Callable[[], int]:
    """What runs in the process of a case."""

    def run() -> int:
        from archnet.cli import main
        from archnet.compose import compose
        from archnet.errors import ArchnetError
        from archnet.jobs import conductor

        folder = place / "run"
        if name != "resume":
            options = ["inputs=4", "forms=qdq"] if name == "verify" else []
            return main([name, str(folder), *options])
        try:
            caches = [f"teacher.cache_dir={place}/teachers", f"output_dir={place}"]
            conductor.run(compose(CONF, [*caches, f"resume={folder}"]), ["resume"])
        except ArchnetError as error:
            print(f"archnet: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def isolated(work: Callable[[], int], output: Path, limit: float) -> tuple[int, float]:
    """Exit code (negative: the signal that ended it) and seconds of a child process."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(stream, number)
        # Whoever calls may have others than those two.
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = ESCAPED
        try:
            code = work()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else ESCAPED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        if time.monotonic() - began > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, time.monotonic() - began
        time.sleep(0.01)


def judge(code: int, seconds: float, limit: float, output: str, sentinel: Path) -> str:
    """What is wrong with how a command has ended."""
    if sentinel.exists():
        return "executed"
    if seconds > limit:
        return "hang"
    if code == ESCAPED or "Traceback (most recent call last)" in output:
        return "traceback"
    if code < 0:
        return "crash"
    errors = [line for line in output.splitlines() if line.startswith("archnet: ")]
    if code not in (0, 1, 2) or (code == 2 and len(errors) != 1):
        return "traceback"
    return "fine"


def fuzz(
    count: int,
    seed: int = 0,
    commands: Sequence[str] = COMMANDS,
    only: str = "",
    whole: Path | None = None,
    report: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """Damage ``count`` folders, and open each with every command.

    Args:
        count: of folders.
        seed: of what is drawn.
        commands: of `COMMANDS`, in order; each sees the folder as the damage left it.
        only: part of the names of files that are damaged; empty: all.
        whole: a folder with a finished run as ``run``, and the cache of its teacher as
            ``teachers``; None: one is made.
        report: called with every case.
    """
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        root, output = whole or make_run(work), work / "output"
        limits = {}
        for name in commands:
            place = work / "undisturbed"
            shutil.copytree(root, place, symlinks=True)
            code, seconds = isolated(command_of(name, place), output, 600)
            if code != 0:
                raise SystemExit(f"{name} fails on the whole folder:\n{output.read_text()}")
            limits[name] = max(SHORTEST, TIMES * seconds)
            shutil.rmtree(place)
        for number, (file, damage) in zip(range(count), cases(root, seed, only), strict=False):
            for name in commands:
                place = work / "damaged"
                sentinel = damaged(root, place, file, damage, seed + number)
                code, seconds = isolated(command_of(name, place), output, limits[name])
                text = output.read_text(errors="replace")
                verdict = judge(code, seconds, limits[name], text, sentinel)
                case = Case(file, damage.__name__, name, code, seconds, text, verdict)
                found.append(case)
                report(case)
                shutil.rmtree(place)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz, say what was found, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=60, help="damaged folders (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of damaged files")
    parser.add_argument("--verbose", action="store_true", help="how every command has ended")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def report(case: Case) -> None:
        if case.verdict != "fine" or options.verbose:
            lines = [line for line in case.output.splitlines() if line.strip()]
            last = lines if case.verdict == "traceback" else lines[-2:]
            print(f"{case.file} {case.damage} {case.command}: {case.verdict}, {case.code}")
            print("\n".join(f"    {line[:200]}" for line in last[-25:]), flush=True)

    # The key that seals run folders is not this user's own.
    with tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state
        found = fuzz(options.count, options.seed, only=options.only, report=report)
    verdicts = Counter(case.verdict for case in found)
    print(dict(verdicts), "codes", dict(Counter(case.code for case in found)))
    if options.only:
        return
    path = append_robustness(
        f"damaged run folders and caches, {len(COMMANDS)} commands each",
        options.count,
        {
            "tracebacks": verdicts["traceback"],
            "hangs": verdicts["hang"],
            "crashes": verdicts["crash"],
            "executed": verdicts["executed"],
        },
        time.monotonic() - began,
        f"python benchmarks/fuzz_folders.py --count {options.count} --seed {options.seed}",
        options.seed,
    )
    print(path)


if __name__ == "__main__":
    main()
