"""Run folders and caches that somebody else has made, or a disk has damaged: data, never code."""

import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml

from archnet import files, origin
from archnet.cli import main
from archnet.compose import compose
from archnet.config import Config, require_kinds
from archnet.distill.cache import FeatureCache
from archnet.errors import ArchnetError, ConfigError
from archnet.jobs import conductor
from archnet.runs import RunError, RunFolder, atomic, read_json
from archnet.runs.student import load_student
from archnet.runs.teacher import runs_code
from archnet.tasks import TranslationData, translation
from archnet.tasks.corpus import EncodedText
from archnet.teachers import fit
from archnet.tensors import DamagedError, read_tensors

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def finished(untrained: RunFolder) -> RunFolder:
    return untrained


def edit(folder: RunFolder, change: Callable[[dict], object]) -> None:
    """Change ``config.yaml`` as an editor would."""
    path = folder.path / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))


# Code ---------------------------------------------------------------------------------------


@pytest.fixture
def received(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A folder of another user, whose teacher is a factory that makes a file."""
    config = make_config("trainer=debug", "trainer.progress=false", "teacher.train=false")
    teacher = replace(
        config.teacher,
        source="custom",
        factory="os:mkdir",
        kwargs={"path": str(tmp_path / "executed")},
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "theirs"))
    folder = RunFolder.create(replace(config, teacher=teacher))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    return RunFolder.open(folder.path)


@pytest.mark.parametrize("command", ["evaluate", "cost", "verify"])
def test_a_received_factory_waits_for_a_yes(
    command: str, received: RunFolder, finished: RunFolder, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    student = received.checkpoints / "student.pt"
    student.write_bytes((finished.checkpoints / "student.pt").read_bytes())
    received.metrics.write_text("{}")
    assert main([command, str(received.path)]) == 2
    error = capsys.readouterr().err
    assert "would run teacher.factory=os:mkdir with teacher.kwargs=" in error
    assert error.strip().endswith("add trust=true")
    assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    # With the yes it runs, and is then refused for what it returns.
    assert main([command, str(received.path), "trust=true"]) == 2
    assert "not a torch.nn.Module" in capsys.readouterr().err
    assert (tmp_path / "executed").exists()


def test_resume_of_a_received_factory_waits_for_a_yes(
    received: RunFolder, make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="add trust=true"):
        conductor.run(make_config(f"resume={received.path}"), ["resume"])
    assert not (tmp_path / "executed").exists()
    assert not received.is_own()
    with pytest.raises(ArchnetError, match=r"not a torch\.nn\.Module"):
        conductor.run(make_config(f"resume={received.path}", "trust=true"), ["resume", "trust"])
    # Whoever goes on with a folder has made it: ranks and later commands ask no more.
    assert received.is_own()
    assert not received.config().trust


def test_a_folder_of_ones_own_runs_its_factory(make_config: Make) -> None:
    folder = RunFolder.create(make_config())
    RunFolder.open(folder.path).require_trust("this")
    edit(folder, lambda tree: tree["teacher"].update(kwargs={"width": 8}))
    with pytest.raises(RunError, match="would run this"):
        RunFolder.open(folder.path).require_trust("this")
    RunFolder.open(folder.path, trusted=True).require_trust("this")


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({"source": "custom", "factory": "a:b"}, True),
        ({"source": "timm", "name": "vit"}, False),
        ({"source": "timm", "name": "hf-hub:a/b"}, True),
        ({"source": "timm", "kwargs": {"checkpoint_path": "a.pth"}}, True),
        ({"source": "torchvision"}, False),
        ({"source": "archnet"}, False),
    ],
)
def test_what_a_teacher_runs(change: dict, runs: bool, make_config: Make) -> None:
    assert bool(runs_code(replace(make_config().teacher, **change))) == runs


@pytest.mark.parametrize("content", [b"", b"short", bytes(32), None])
def test_a_key_that_is_damaged_is_made_again(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    sealed = origin.seal({"a": 1})
    assert origin.verifies({"a": 1}, sealed)
    assert not origin.verifies({"a": 2}, sealed)
    assert origin.key_file().stat().st_mode & 0o777 == 0o600
    if content is None:
        origin.key_file().unlink()
    else:
        origin.key_file().write_bytes(content)
    assert not origin.verifies({"a": 1}, sealed)
    again = origin.seal({"a": 1})
    assert origin.verifies({"a": 1}, again)


@pytest.mark.parametrize("code", [None, 3, "", "é", ["a"]])
def test_a_code_of_any_kind_is_only_compared(code: object) -> None:
    origin.seal({})
    assert not origin.verifies({}, code)


def test_a_user_without_a_home_runs_and_seals_nothing(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    folder = RunFolder.create(make_config())
    folder.require_trust("what this process itself has made")
    assert not RunFolder.open(folder.path).is_own()


@pytest.mark.parametrize(
    "line",
    ["seed: ${oc.env:HOME}", "name: '${oc.env:PATH}'", "output_dir: a${seed}b"],
)
def test_a_stored_config_refers_to_nothing(line: str, make_config: Make) -> None:
    folder = RunFolder.create(make_config())
    key = line.partition(":")[0]
    path = folder.path / "config.yaml"
    lines = [line if text.startswith(f"{key}:") else text for text in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"config\.yaml, line \d+: .* is an interpolation") as caught:
        RunFolder.open(folder.path).config()
    assert os.environ["PATH"] not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "a: [",
        "\x00",
        "quant: null\nteacher: null",
        "quant: 3",
        "a: &a [x]\nb: *a",
        "seed: !!python/object/apply:os.getcwd []",
        "[" * 5000,
        "seed: 1\nseed: 2",
        "seed: " + "9" * 5000,
        "? [a]\n: b",
    ],
)
def test_yaml_of_any_kind_is_one_line(text: str, make_config: Make) -> None:
    folder = RunFolder.create(make_config())
    (folder.path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"config\.yaml") as caught:
        RunFolder.open(folder.path).config()
    assert "\n" not in str(caught.value)


WRONG = {
    "number": ("seed", "quant.bits", "trainer.devices", "distill.optimizer.lr", "quant.budget"),
    "truth": ("trust", "teacher.train", "quant.free_ends", "logger.wandb.enabled"),
    "list": ("quant.widths", "teacher.fit.restarts", "hardware.operators", "convert.taps"),
    "mapping": ("hardware.limits", "teacher.kwargs", "hardware.sources"),
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("number", [True, "3", [3], {"a": 3}, "-1"]),
        ("truth", [-1, 1, 0, 1.0, "1", "yes", [True]]),
        ("list", [True, 3, "3", {"a": 3}, [[2]], [{"a": 2}], [True]]),
        ("mapping", [True, 3, [3], "3"]),
    ],
)
def test_a_stored_value_of_another_type_names_its_key(
    kind: str, values: list[object], make_config: Make
) -> None:
    """Conversion would take true for 1, and -1 for true."""
    folder = RunFolder.create(make_config())
    whole = yaml.safe_load((folder.path / "config.yaml").read_text())
    for key, value in product(WRONG[kind], values):
        tree = deepcopy(whole)
        put(tree, key, value)
        with pytest.raises(ConfigError, match=rf"^{key} .* given"):
            require_kinds(tree)
    edit(folder, lambda tree: put(tree, WRONG[kind][0], values[0]))
    said = rf"config\.yaml cannot be read: {WRONG[kind][0]} takes .* given"
    with pytest.raises(RunError, match=said) as caught:
        RunFolder.open(folder.path).config()
    assert "\n" not in str(caught.value)


def put(tree: dict, key: str, value: object) -> None:
    *groups, name = key.split(".")
    for group in groups:
        tree = tree[group]
    tree[name] = value


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["student", "calibrated"])
def test_pickled_code_is_never_run(name: str, received: RunFolder, tmp_path: Path) -> None:
    path = received.checkpoints / f"{name}.pt"
    torch.save({"architecture": Touch(tmp_path / "executed")}, path)
    with pytest.raises(RunError, match=r"\.pt is damaged or holds more than tensors"):
        load_student(received, name)
    assert not (tmp_path / "executed").exists()


# Edits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["quant"].update(weight_bits=2), "quant.weight_bits=2, made with 8"),
        (lambda tree: tree["distill"].update(steps=7), "distill.steps=7, made with"),
        (lambda tree: tree["hardware"].update(lanes=4), "hardware.lanes=4, made with 16"),
        (lambda tree: tree["distill"].pop("steps"), "distill.steps=1000, made with"),
    ],
)
def test_an_edited_config_is_refused_on_resume(
    change: Callable[[dict], object], said: str, make_config: Make
) -> None:
    folder = RunFolder.create(make_config("distill.steps=50", "distill.joint_steps=5"))
    edit(folder, change)
    before = (folder.path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="was edited since this run was made") as caught:
        conductor.run(make_config(f"resume={folder.path}"), ["resume"])
    assert said in str(caught.value)
    assert "undo the edit, or start a new run" in str(caught.value)
    assert (folder.path / "config.yaml").read_text() == before


def test_where_a_run_computes_may_be_edited(make_config: Make) -> None:
    folder = RunFolder.create(make_config())
    edit(folder, lambda tree: tree["trainer"].update(threads=2))
    edit(folder, lambda tree: tree["logger"].update(csv=False))
    config = RunFolder.open(folder.path).resumed(make_config(), ["resume"])
    assert config.trainer.threads == 2
    assert RunFolder.open(folder.path).is_own()


def test_other_commands_say_what_was_edited(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.create(make_config())
    edit(folder, lambda tree: tree.update(seed=5))
    assert RunFolder.open(folder.path).config().seed == 5
    assert "was edited since this run was made: seed=5, made with 0" in caplog.text


# Locks and leftovers ------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from archnet.runs import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def held(make_config: Make) -> Iterator[tuple[RunFolder, subprocess.Popen]]:
    """A folder in which another process works."""
    folder = RunFolder.create(make_config())
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_until_the_first_is_gone(
    held: tuple[RunFolder, subprocess.Popen], make_config: Make
) -> None:
    folder, process = held
    with pytest.raises(RunError, match=f"is in use by process {process.pid}: wait until"):
        conductor.run(make_config(f"resume={folder.path}"), ["resume"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with folder.locked():
        pass


def test_a_lock_is_no_way_out_of_the_folder(make_config: Make, tmp_path: Path) -> None:
    folder = RunFolder.create(make_config())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder.path / ".lock").symlink_to(victim)
    with pytest.raises(RunError, match=r"\.lock cannot be written"), folder.locked():
        pass
    assert victim.read_text() == "precious"


def test_what_dead_processes_left_is_removed(make_config: Make) -> None:
    folder = RunFolder.create(make_config())
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    places = (folder.path, folder.checkpoints)
    left = [place / f".metrics.json.{process.pid}" for place in places]
    left.append(folder.path / f".a.b.{2**40}")
    kept = [folder.path / f".x.{os.getpid()}", folder.path / ".hidden", folder.path / "a.1"]
    kept.append(folder.path / f".x.{os.getppid()}")
    for path in [*left, *kept]:
        path.write_text("")
    (folder.path / f".folder.{process.pid}" / "in").mkdir(parents=True)
    with folder.locked():
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)
        assert not (folder.path / f".folder.{process.pid}").exists()


# Damages ------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.path, tmp_path / "copy")
    return RunFolder.open(tmp_path / "copy")


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("which", ["notes", "work"])
def test_every_file_that_can_be_rebuilt_is(
    which: str, copy: RunFolder, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    if which == "notes":
        damaged = [*sorted((copy.path / "stages").glob("*.json")), copy.metrics]
    else:
        damaged = [copy.checkpoints / f"{name}.pt" for name in ("calibrated", "trained")]
        damaged += [copy.path / "conversion.json", copy.onnx]
    before = {path: path.read_bytes() for path in damaged}
    for number, path in enumerate(damaged):
        if number % 3 == 0 or which == "work":
            flip(path)
        else:
            path.write_text(("", "[]")[number % 3 - 1])
    conductor.run(make_config(f"resume={copy.path}"), ["resume"])
    for path in damaged:
        assert f"{path} " in caplog.text
        if path.suffix == ".pt":
            state, old = (
                torch.load(source, weights_only=True)["state"]
                for source in (path, io.BytesIO(before[path]))
            )
            assert state.keys() == old.keys()
            assert all(torch.equal(state[name], old[name]) for name in old)
        elif which == "work":
            assert path.read_bytes() == before[path]
    metrics = read_json(copy.metrics)
    old = json.loads(before[copy.metrics]) if which == "notes" else metrics
    for key in ("teacher", "student", "cost", "audit", "parity", "data"):
        assert metrics[key] == old[key]


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.99])
def test_a_bit_in_a_file_of_tensors_is_not_overlooked(place: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = {"a": torch.arange(1000.0), "b": {"c": [1, 2, "x"]}}
    torch.save(content, path)
    whole = read_tensors(path)
    assert torch.equal(whole["a"], content["a"])
    flip(path, place)
    if found := _damage(path):
        assert str(path) in found
        assert "\n" not in found
    else:  # between the parts nothing is said
        again = read_tensors(path)
        assert torch.equal(again["a"], content["a"])
        assert again["b"] == content["b"]


def _damage(path: Path) -> str:
    try:
        read_tensors(path)
    except DamagedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "change",
    [
        lambda packed, step: step.update(operator="Unheard"),
        lambda packed, step: step.update(inputs=["nowhere"]),
        lambda packed, step: step.update(arguments={"odd": 1}),
        lambda packed, step: step["arguments"].update(out_channels=10**12),
        lambda packed, step: packed["architecture"].update(outputs=["nowhere"]),
        lambda packed, step: packed["architecture"]["shapes"].update({step["name"]: [10**9] * 3}),
        lambda packed, step: packed["architecture"].update(steps=[]),
        lambda packed, step: packed["architecture"].pop("taps"),
        lambda packed, step: packed["state"].popitem(),
        lambda packed, step: packed["state"].update(x=torch.zeros(1)),
        lambda packed, step: packed.pop("quantizers"),
        lambda packed, step: packed.update(state=[]),
    ],
)
def test_a_student_of_another_kind_is_one_line(
    change: Callable[[dict, dict], object], copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy.checkpoints / "student.pt"
    packed = torch.load(path, weights_only=True)
    steps = packed["architecture"]["steps"]
    change(packed, next(step for step in steps if step["operator"] == "Convolution"))
    torch.save(packed, path)
    assert main(["export", str(copy.path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} holds no student" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "{}", "", "null", '{"task": 3}', "[" * 10**5, "1e400"])
def test_metrics_of_any_kind_are_one_line(
    content: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.metrics.write_text(content)
    assert main(["report", str(copy.path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"archnet: {copy.metrics}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "step,loss\nx,y\n", "loss\n1\n", "step,loss\n1e400,3\n", 'step,loss\n1,"', "\0\0"]
)
def test_a_damaged_log_is_left_out_of_the_report(text: str, copy: RunFolder) -> None:
    log = copy.path / "logs" / "csv" / "007" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(text)
    assert main(["report", str(copy.path)]) == 0


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/red]", ":smile:", "\x1b[31mx", "$\\frac$"])
def test_odd_names_are_shown_as_they_are(
    name: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = read_json(copy.metrics)
    metrics["task"] = metrics["teacher"]["name"] = name
    metrics["audit"]["violations"] = [name]
    copy.metrics.write_text(json.dumps(metrics))
    log = copy.path / "logs" / "csv" / "007" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(f"step,loss/{name}\n1,2\n2,3\n")
    renamed = copy.path.rename(copy.path.parent / name.replace("/", "-"))
    assert main(["report", str(renamed)]) == 0
    out = capsys.readouterr().out
    shown = name.replace("\x1b", "\\x1b")
    assert out.count(shown) >= 3
    assert "\x1b" not in out


# Full disks ---------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> str:
    """What ``work`` raises in a process whose files may not grow beyond 64 kB."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            work()
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 4000).decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("kind", ["torch", "safetensors", "bytes"])
def test_a_disk_without_room_is_said_whoever_writes(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path, tensor = tmp_path / "weights", torch.zeros(1 << 18)

    def write() -> None:
        with atomic(path) as temporary:
            if kind == "torch":
                torch.save({"a": tensor}, temporary)
            elif kind == "safetensors":
                save_file({"a": tensor}, temporary)
            else:
                temporary.write_bytes(bytes(1 << 20))

    said = in_child(write)
    assert said.startswith(f"RunError: {path} cannot be written (File too large)")
    assert f"make room on the disk of {tmp_path}" in said
    assert not list(tmp_path.iterdir())


def test_other_failures_of_a_write_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), atomic(tmp_path / "a"):
        raise RuntimeError("something else")


def test_the_folder_whose_disk_is_full_is_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    full = tmp_path / "full"

    def refusal(folder: Path) -> OSError | None:
        return error if folder == full else None

    before, files.write_refusal = files.write_refusal, refusal
    try:
        assert files.full_disk(error, [tmp_path, full]) == f"the disk of {full} is full"
        assert files.full_disk(error, [tmp_path]) == "the disk is full"
        assert files.full_disk(OSError(errno.EACCES, "no"), [full]) is None
    finally:
        files.write_refusal = before


# Caches -------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit": flip,
    "another kind": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_damaged_teacher_is_not_taken_from_the_cache(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = SimpleNamespace(facts=dict, accuracy=0.0)
    fit._keep(torch.nn.Linear(300, 3), tmp_path, cast(Any, learner), 1.0)
    path = tmp_path / "teacher.safetensors"
    assert fit._taken(torch.nn.Linear(300, 3), path)
    damage(path)
    assert fit._taken(torch.nn.Linear(300, 3), path) is False
    assert f"{path}" in caplog.text
    assert "trained again" in caplog.text


@damages
@pytest.mark.parametrize("name", ["source.tokens", "target.ends", "facts.json"])
def test_damaged_text_is_encoded_again(
    name: str, damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, pairs = tmp_path / "train", [([5, 6, 7], [8, 9])] * 50
    EncodedText.write(folder, iter(pairs), 10, "text")
    found = EncodedText.found(folder)
    assert found is not None
    assert [side.tolist() for side in found.pair(49)] == [[5, 6, 7], [8, 9]]
    damage(folder / name)
    assert EncodedText.found(folder) is None
    assert f"{folder} is damaged" in caplog.text
    assert len(EncodedText.write(folder, iter(pairs), 10, "text")) == 50
    assert EncodedText.found(folder) is not None


@damages
def test_damaged_tokenizers_and_translations_are_made_again(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    config = compose(ROOT / "conf", ["task=phrases", f"task.text.cache_dir={tmp_path}",
                                     "task.text.vocabulary=300"])  # fmt: skip

    def opened() -> TranslationData:
        data = TranslationData(config.task, 0)
        data.text = SimpleNamespace(  # type: ignore[assignment]
            pairs=lambda split: iter([(f"one {n} two", f"eins {n} zwei") for n in range(200)]),
            fingerprint=str,
        )
        data.setup()
        return data

    data = opened()
    model, before = data.folder / "tokenizer.model", data.tokenizer.identity
    damage(model)
    assert opened().tokenizer.identity == before
    asked = []

    def translate(rows: list[list[int]]) -> list[list[int]]:
        asked.append(len(rows))
        if len(asked) in (2, 3):
            raise KeyboardInterrupt
        return [[row] for row in rows]

    before_size, translation.TRANSLATED = translation.TRANSLATED, 100
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                data.translated("x", translate)
        assert asked == [100, 100, 100]  # the first hundred were kept
        damage(data.folder / "translated-x.parts" / "000000000.json")
        assert len(data.translated("x", translate)) == 200
        assert asked == [100] * 5
    finally:
        translation.TRANSLATED = before_size


@damages
def test_damaged_features_are_written_again(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = torch.randn(40, 3, 4, 4)
    FeatureCache(tmp_path).write(["a"], 40, [[features[:25]], [features[25:]]])
    cache = FeatureCache(tmp_path)
    assert "a" in cache
    assert torch.equal(torch.from_numpy(cache.read("a").copy()), features.half())
    cache.read("a")._mmap.close()
    damage(tmp_path / "a.npy")
    again = FeatureCache(tmp_path)
    assert "a" not in again
    again.write(["a"], 40, [[features]])
    assert "a" in FeatureCache(tmp_path)


def test_a_full_disk_names_the_feature_cache(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path), torch.zeros(64, 1 << 10)
    said = in_child(lambda: cache.write(["a"], 64, [[features]]))
    assert said.startswith(f"DistillError: the disk of {tmp_path} has no room")
    assert "distill.cache_images" in said


def test_no_damage_ends_in_anything_but_a_line(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few draws of the driver; `python benchmarks/fuzz_folders.py --count 60` makes more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fuzz_folders

    shutil.copytree(finished.path, tmp_path / "whole" / "run")
    found = fuzz_folders.fuzz(6, 1, ("report", "export", "resume"), whole=tmp_path / "whole")
    assert len(found) == 18
    wrong = [(c.file, c.damage, c.command, c.output) for c in found if c.verdict != "fine"]
    assert not wrong
