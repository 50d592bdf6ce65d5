"""`archnet coverage`: what converts of the published families, or of your own network."""

import argparse
import difflib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archnet.errors import ArchnetError

if TYPE_CHECKING:
    from archnet.coverage import Coverage
    from archnet.teachers import Member

HELP = "what converts, exactly or nearly, and its cost: published families or your own network"
PAGE = Path("docs/coverage.md")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    # Without a default of its own it leaves alone what --model has said.
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="package.module:callable that returns your network (default: published families)",
    )
    parser.add_argument("--model", help="the same as key=value")
    parser.add_argument(
        "--input", default="3x224x224", help="your network's inputs, comma-separated (3x224x224)"
    )
    parser.add_argument("--hardware", default="arch5", help="target (default: arch5)")
    parser.add_argument("--families", help="families or networks, comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (1)")
    parser.add_argument(
        "--output", type=Path, help=f"Markdown file (default: {PAGE} where all families are asked)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the rows and write the page; 1 if your own network does not convert to a pure file."""
    from archnet.hardware import Target

    Target.named(options.hardware)
    if options.model:
        return _own(options)
    if options.jobs < 1:
        raise ArchnetError(f"jobs={options.jobs} must be at least 1")
    members, left_out = _members(options.families)
    output = options.output or (None if options.families else PAGE)
    began, rows = time.perf_counter(), []
    for row in _measured(members, options.hardware, options.jobs):
        rows.append(row)
        print(f"[{len(rows)}/{len(members)}] {_line(row)}", flush=True)
    minutes = (time.perf_counter() - began) / 60
    spent = os.times()  # of the processes that have ended, which on a busy machine says more
    cpu = (spent.children_user + spent.children_system) / 60
    measured = (
        f"in {minutes:.0f} minutes ({cpu:.0f} of CPU) on {os.cpu_count()} cores, "
        f"{options.jobs} at a time"
    )
    _write(output, rows, options.hardware, measured, left_out)
    return 0


def _own(options: argparse.Namespace) -> int:
    from rich.table import Table

    from archnet.coverage import COLUMNS, cells, gaps, measure
    from archnet.report.table import plain_console
    from archnet.teachers import from_factory

    inputs = _shapes(options.input)
    if options.families:
        raise ArchnetError("families= and a network of your own exclude each other")
    network = from_factory(options.model, {}, "model")
    row = measure(network.eval(), inputs, options.hardware, "", options.model)
    table = Table(show_header=False)
    for name, cell in zip(COLUMNS, cells(row), strict=True):
        if cell:
            table.add_row(name, cell)
    console = plain_console()
    console.print(table)
    for line in [f"stops: {row.stopped}", *gaps(row)] if row.stopped else gaps(row):
        console.print(line, markup=False, soft_wrap=True)
    _write(options.output, [row], options.hardware, "one network", [])
    return 0 if row.violations == 0 and not row.stopped else 1


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        shapes = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or any(size < 1 for shape in shapes for size in shape):
        raise ArchnetError(f"input={text}: write sizes without the batch, such as 3x224x224")
    return shapes


def _members(names: str | None) -> tuple[list["Member"], list[str]]:
    """The networks asked for that can be built here, and a line on those that cannot."""
    from archnet.teachers import MEMBERS

    members = list(MEMBERS)
    if names:
        keys = {key.lower() for item in members for key in (item.family, item.name)}
        asked = [name.strip().lower() for name in names.split(",")]
        for name in asked:
            if name not in keys:
                (near,) = difflib.get_close_matches(name, keys, 1, 0.0)
                raise ArchnetError(f"families={name} is not one of them; nearest: {near}")
        members = [m for m in members if {m.family.lower(), m.name} & set(asked)]
    absent = [m for m in members if m.source == "timm" and find_spec("timm") is None]
    if not absent:
        return members, []
    line = f"{', '.join(m.name for m in absent)} need the extra: pip install 'archnet[timm]'"
    print(f"left out: {line}", flush=True)
    return [m for m in members if m not in absent], [line]


def _line(row: "Coverage") -> str:
    if row.stopped:
        return f"{row.name}: stops: {row.stopped}"
    return (
        f"{row.name}: converts {row.converts}, {row.macs_ratio:.2f} x MACs, {row.seconds:.1f} s, "
        f"{'not pure' if row.violations else 'pure'}"
    )


def _write(
    output: Path | None,
    rows: Sequence["Coverage"],
    hardware: str,
    measured: str,
    left_out: Sequence[str],
) -> None:
    from archnet.coverage import page
    from archnet.files import atomic

    if output is None:
        return
    with atomic(output) as part:
        part.write_text(page(rows, hardware, measured, left_out), encoding="utf-8")
    print(f"written to {output}")


# Processes ----------------------------------------------------------------------------------


def _measured(members: Sequence["Member"], hardware: str, jobs: int) -> Iterator["Coverage"]:
    """The rows as they are ready, each network in a process of its own."""
    from archnet.coverage import Coverage

    def work(member: "Member") -> Coverage:
        try:
            return isolated(_measure_member, member, hardware)
        except ArchnetError as error:
            shape = (3, member.size, member.size)
            return Coverage(member.family, member.name, (shape,), stopped=str(error))

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(work, members)


def _measure_member(member: "Member", hardware: str) -> "Coverage":
    import torch

    from archnet.coverage import measure
    from archnet.teachers import random_network

    torch.set_num_threads(1)
    shape = (3, member.size, member.size)
    return measure(random_network(member), [shape], hardware, member.family, member.name)


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a fresh process: its memory comes back.

    Raises:
        ArchnetError: the function failed (its traceback goes to stderr), or its process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        result, failure = ours.recv()
    except EOFError:
        process.join()
        result, failure = None, f"its process died with exit code {process.exitcode}"
    process.join()
    if failure:
        raise ArchnetError(failure)
    return result


def _answer(answer: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        answer.send((function(*arguments), ""))
    except Exception as error:
        traceback.print_exc()
        answer.send((None, f"{type(error).__name__}: {error}"))
