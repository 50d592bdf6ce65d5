"""Several processes: as many as there are devices, and none that outlives the one that leads."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archnet.config import Config
from archnet.errors import ArchnetError
from archnet.jobs import conductor
from archnet.runs import device as run_device
from archnet.runs.device import require_device
from conftest import ROOT

Make = Callable[..., Config]

RANK = """
import os, sys, time
from archnet import ranks
if sys.argv[1] == "another system":
    sys.platform = "another"
    ranks._LOOK_EVERY = 0.01
if sys.argv[1] == "too late":
    os.environ[ranks.LEADER] = "999999999"
print("ready", flush=True)
ranks.follow_leader()
while True:
    time.sleep(1)
"""
LEADER = """
import os, subprocess, sys
from archnet import ranks
os.environ[ranks.LEADER] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("how", ["linux", "another system"])
def test_a_rank_ends_when_its_leader_is_killed(how: str) -> None:
    """However long it takes: the pipe is at its end when the last process that has it is gone.

    The rank may not yet follow when its leader is killed, which must not matter.
    """
    if how == "linux" and sys.platform != "linux":
        pytest.skip("the kernel's signal is Linux's")
    command = [sys.executable, "-c", LEADER, RANK, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        leader.kill()
        assert leader.stdout.read() == ""


def test_a_rank_that_comes_when_the_leader_is_gone_ends() -> None:
    done = subprocess.run([sys.executable, "-c", RANK, "too late"], check=False)
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(run_device._cores() < 2, reason="one core")
def test_no_rank_of_a_run_outlives_its_leader(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", "distill=joint",
               "trainer.progress_seconds=0", "teacher.train=false", "distill.steps=1000000",
               "distill.val_every=1000000", "task.data.batch_size=16",
               f"output_dir={tmp_path}"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as leader:
        assert leader.stdout is not None
        lines = []
        for line in leader.stdout:
            lines.append(line)
            if line.startswith("distillation: step"):
                break
        else:
            pytest.fail("".join(lines))
        children = Path(f"/proc/{leader.pid}/task/{leader.pid}/children")
        assert not children.exists() or children.read_text().split(), "there is no rank"
        leader.kill()
        leader.stdout.read()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_more_processes_than_cores_end_before_anything_is_made(
    accelerator: str, make_config: Make, tmp_path: Path
) -> None:
    config = make_config("trainer.devices=1000", f"trainer.accelerator={accelerator}")
    count = run_device._cores()
    with pytest.raises(ArchnetError, match=rf"has {count} CPU cores .*nearest valid: {count}"):
        conductor.run(config)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be pinned here")
def test_cores_are_those_that_the_process_may_use(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("trainer=ddp_cpu").trainer
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    require_device(config)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ArchnetError, match=r"trainer\.devices=2, but this machine has 1 CPU"):
        require_device(config)


def test_more_processes_than_gpus_end_before_anything_is_made(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    require_device(make_config("trainer.devices=3").trainer)
    with pytest.raises(ArchnetError, match="has 3 GPUs; nearest valid: 3"):
        require_device(make_config("trainer.devices=4").trainer)
