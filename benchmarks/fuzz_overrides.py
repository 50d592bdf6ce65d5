"""Random command lines: each composes, or ends in one line, and none runs code or hangs.

    python benchmarks/fuzz_overrides.py --count 2000 --seed 0 --record

draws overrides (every key and group, with and without prefixes; values of other types, out of
range, not finite, quoted, nested, interpolated, swept) and gives them to `archnet.compose.check`.
A finding is printed with the command line that leads to it; the exit code is 1 if there is any.
The drawing depends on the seed alone. ``--record`` adds a row to ``results/robustness.csv``.
"""

import argparse
import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import append_robustness

from archnet.compose import check
from archnet.config import Config, keys
from archnet.errors import ConfigError

CONF = Path(__file__).resolve().parents[1] / "conf"
# Of processor time, so that a busy machine makes no finding.
LONGEST = 10.0
FINDINGS = ("traceback", "hang", "executed")
DEFAULTS = dict(keys(Config()))
KEYS = list(DEFAULTS)
GROUPS = {path.name: [file.stem for file in path.glob("*.yaml")] for path in sorted(CONF.iterdir())
          if path.is_dir()}  # fmt: skip
GROUPS = {group: sorted(options) for group, options in GROUPS.items() if options}
GROUPS["hardware"] = ["arch5", "arch5_matmul", "ethos_u55", "imx500", "rk3588"]
OTHER_KEYS = [
    *("quant", "task", "task.data", "teacher.fit", "trainer", "logger.wandb", "hardware.limits"),
    *("teacher.kwargs.width", "teacher.kwargs.a.b", "hardware.limits.conv", "seed.of", "quant.bts"),
    *("hardware.limits.conv.kernel", "hardware.sources.lanes", "hydra.run.dir", "hydra.verbose"),
    *("hydra/launcher", "hydra/sweeper", "hydra.launcher._target_", "hydra.searchpath", "hydra"),
    *("quant@x", "task@", "_target_", "__class__", "quant.__init__", "", ".", "a..b", "defaults"),
    *("task/name", "experiment@_global_", "hydra.sweeper.params", "schema", "command_line"),
]  # fmt: skip
VALUES = [
    *("0", "1", "2", "4", "8", "32", "-1", "9", "1.5", "-0.0", "1e3", "1e400", "-1e400", "1e-400"),
    *("inf", "-inf", "nan", "NaN", "+inf", "100000000000000000000", "9" * 5000, "0x10", "1_000"),
    *("true", "false", "null", "None", "yes", "~", "''", '""', "", " ", "???", "'???'", "*", "&a"),
    *("[]", "{}", "[1]", "[nan]", "[inf,1]", "[null]", "[[1]]", "[1,", "{a:1}", "{a:nan}", "{a:"),
    *("{a:{b:[1e400]}}", "{_target_:os.system}", "{bits:2}", "{name:../x}", "[true]", "[a,b]"),
    *("../x", "/etc/passwd", ".", "..", "a/b", "a\\b", "C:\\x", "~root", "[brackets]", "a b"),
    *("é", "日本語", "\u202egnp.exe", "\ud800", "a\nb", "a\x00b", "\x1b[31mred"),
    *("'a\nb'", "a\u2028b", "\t"),
    *("'it''s'", '"unbalanced', "'unbalanced", "\\", "\\,", "a=b", "=", "%s%n", "{0}", "a" * 300),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${now:}", "${now:%Y}", "${quant.bits}"),
    *("${seed}", "${.bits}", "${..seed}", "${nothing}", "${", "${}", "${hydra:job.name}", "$HOME"),
    *("${oc.decode:'1e400'}", "${oc.create:{a:1}}", "${oc.select:seed}", "${oc.dict.keys:quant}"),
    *("${oc.deprecated:seed}", "${quant}", "${task.data.mean}", "${oc.env:${oc.env:HOME}}", "`ls`"),
    *("$(touch x)", "subprocess:getoutput", "os:system", "!!python/object/apply:os.system [ls]"),
    *("2,4,8", "2,9", "range(0,3)", "range(0,10,0)", "range(0,1e400)", "range(3)", "range(5,0)"),
    *("range(0,1000000000)", "range(0.0,1.0,0.25)", "interval(0,1)", "glob(*)", "choice(2,4)"),
    *("choice()", "sort(3,1)", "shuffle(range(0,3))", "int(4)", "float(2)", "str(8)", "bool(1)"),
    *("int(nan)", "json_str({a:1})", "tag(x,1,2)", "extend_list(1)", "sum(1,2)", "[" * 200),
    *("(" * 50, "{a:" * 100, "[" * 900 + "]" * 900, "lsq", "none", "demo", "debug", "4.0", "1e1"),
]  # fmt: skip
FLAGS = [["-m"], ["--multirun"], ["--cfg", "job"], ["--config-name", "nothing"], ["--resolve"],
         ["--config-dir", "nowhere"], ["--config-path", "nowhere"], ["--no-such-flag"], ["-x"],
         ["--experimental-rerun", "x.pickle"], ["--config-name", "../x"], ["-p", "x"]]  # fmt: skip


def words(seed: int, index: int) -> list[str]:
    """The ``index``-th command line of a seed, without the program's name."""
    drawn = random.Random(f"{seed}/{index}")
    found = [_override(drawn) for _ in range(drawn.choice((1, 1, 1, 2, 2, 3, 5)))]
    if drawn.random() < 0.25:
        found = [*found, *drawn.choice(FLAGS[:2] * 6 + FLAGS)]
    return found


def _override(drawn: random.Random) -> str:
    kind = drawn.random()
    if kind < 0.25:
        group = drawn.choice(list(GROUPS))
        values = [drawn.choice(GROUPS[group]), drawn.choice(GROUPS[group]), drawn.choice(VALUES)]
        text = f"{group}={drawn.choice([values[0], values[0], ','.join(values[:2]), values[2]])}"
    elif kind < 0.85:
        key = drawn.choice(KEYS)
        text = f"{key}={drawn.choice([str(DEFAULTS[key]).lower(), drawn.choice(VALUES)])}"
    elif kind < 0.97:
        text = f"{drawn.choice(OTHER_KEYS)}={drawn.choice(VALUES)}"
    else:
        text = drawn.choice([drawn.choice(VALUES), drawn.choice(KEYS), f"={drawn.choice(VALUES)}"])
    return drawn.choice((*[""] * 12, "+", "++", "~")) + text


class Hang(BaseException):
    """A command line took longer than `LONGEST`."""


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `Hang` after so much processor time."""

    def end(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_ran: list[str] = []
_PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir")


@contextmanager
def _watched() -> Iterator[list[str]]:
    """What is run, made or written meanwhile, by Python's audit events."""
    if not hasattr(_watched, "hooked"):
        sys.addaudithook(_note)
        _watched.hooked = True  # type: ignore[attr-defined]  # hooks cannot be taken away
    _ran.clear()
    yield _ran


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _PROGRAMS:
        _ran.append(f"{event}{arguments[:1]}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _ran.append(f"open{arguments[:2]}")


def outcome(arguments: list[str]) -> tuple[str, str]:
    """What a command line ends in.

    Returns:
        ``config``, ``error`` or one of `FINDINGS`, and what was said.
    """
    said, kind = "", "config"
    with _watched() as ran:
        try:
            with _limited():
                check(CONF, arguments)
        except ConfigError as error:
            said, kind = str(error), "error"
            if not said or len(said.splitlines()) != 1:
                kind = "traceback"
        except Hang:
            kind = "hang"
        except BaseException as error:  # whatever it is, it is the finding
            if isinstance(error, KeyboardInterrupt):
                raise
            said, kind = f"{type(error).__name__}: {error}", "traceback"
        if ran:
            said, kind = f"ran {ran}", "executed"
    return kind, said


def main(arguments: list[str] | None = None) -> int:
    """Draw, try, and print what should not be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every line, not only findings")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    for index in range(options.count):
        drawn = words(options.seed, index)
        kind, said = outcome(drawn)
        counts[kind] += 1
        if options.show or kind in FINDINGS:
            line = ascii(" ".join(shlex.quote(word[:100]) for word in drawn))
            print(f"{kind} {index}: {line}: {ascii(said)[:300]}", flush=True)
    print(", ".join(f"{kind}: {counts[kind]}" for kind in ("config", "error", *FINDINGS)))
    if options.record:
        append_robustness(
            "random command lines of train.py",
            options.count,
            {
                "tracebacks": counts["traceback"],
                "hangs": counts["hang"],
                "crashes": 0,  # it would end this process
                "executed": counts["executed"],
            },
            time.monotonic() - began,
            f"python benchmarks/fuzz_overrides.py --count {options.count} --seed {options.seed}",
            options.seed,
        )
    return 1 if any(counts[kind] for kind in FINDINGS) else 0


if __name__ == "__main__":
    sys.exit(main())
