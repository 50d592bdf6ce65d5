"""Processes that train together: the others end when the one that leads them does."""

import ctypes
import os
import signal
import sys
import threading
import time

# What the leader tells the processes that Lightning starts: the run, and whom they follow.
RUN_FOLDER = "ARCHNET_RUN_FOLDER"
LEADER = "ARCHNET_LEADER"

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LOOK_EVERY = 1.0  # seconds, where the kernel does not tell


def follow_leader() -> None:
    """End this process as soon as the leader is gone, however that ended: also by SIGKILL.

    Left alone, a rank would wait in the next exchange of gradients for half an hour. Linux sends
    the signal itself; elsewhere a thread looks whether the parent is still the same.
    """
    leader = int(os.environ[LEADER])  # the parent, unless it is gone already
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    threading.Thread(target=_watch, args=(leader,), daemon=True, name="leader-watch").start()


def _watch(leader: int) -> None:
    while os.getppid() == leader:
        time.sleep(_LOOK_EVERY)
    # No clean-up: the exchange with the leader would never return.
    os._exit(1)
