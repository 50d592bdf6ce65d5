"""Files written whole or not at all, checked when they are read, and folders of one process."""

import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from archnet.errors import ArchnetError

try:
    import fcntl
except ImportError:  # a system without these locks
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: of the disk, of a quota, of a limit
_PROBE = 1 << 20  # bytes that a disk with room takes
_TEMPORARY = re.compile(r"\..+\.(\d+)")


def temporary_beside(path: Path) -> Path:
    """Where this process writes what will be ``path``; `remove_leftovers` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def discard_output() -> None:
    """Discard output that nobody reads any more (`... --help | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def atomic(
    path: Path, error: type[ArchnetError] = ArchnetError, advice: str = ""
) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place once the block has written it.

    A block that fails, a full disk included, leaves what was at ``path`` before.

    Args:
        path: the file; its folder is made.
        error: what to raise when it cannot be written, ``advice`` being added to the message.

    Raises:
        ArchnetError: the file cannot be written (as the class that ``error`` names).
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What lies there in a folder from somebody else may be a link to anywhere.
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as cause:
        raise error(_unwritten(path, cause, advice)) from cause
    except (RuntimeError, SafetensorError) as cause:
        # Torch and safetensors say in their own words that a write has failed. The half file is
        # still there, so that a disk without room has none now either.
        refusal = write_refusal(path.parent)
        if refusal is None:
            raise
        raise error(_unwritten(path, refusal, advice)) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritten(path: Path, cause: OSError, advice: str) -> str:
    way_out = (
        f"make room on the disk of {path.parent}"
        if cause.errno in FULL
        else f"see that files can be written in {path.parent}"
    )
    return (
        f"{path} cannot be written ({cause.strerror or cause}); "
        f"what was there is untouched: {way_out}{advice}"
    )


def write_refusal(folder: Path) -> OSError | None:
    """Why nothing can be written in a folder, or where it will be; None: a megabyte can."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def full_disk(error: OSError, folders: Iterable[Path]) -> str | None:
    """Name the disk that is full, if that caused ``error``; else None.

    Args:
        error: it seldom names a file.
        folders: where the failed work writes; the first one that has no room is named.
    """
    if error.errno not in FULL:
        return None
    named = [Path(error.filename).parent] if isinstance(error.filename, str) else []
    for folder in [*named, *folders, Path(tempfile.gettempdir())]:
        refusal = write_refusal(folder)
        if refusal is not None and refusal.errno in FULL:
            return f"the disk of {folder} is full"
    return "the disk is full"


def remove_leftovers(folder: Path) -> None:
    """Remove files that ended processes left half written in a folder, but not below it.

    Processes of other machines cannot be seen: two that share a folder must not begin at a time.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            _log.info("removed %s, left by a process that is gone", path)
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(path: Path, error: type[ArchnetError], what: str) -> Iterator[None]:
    """Hold a lock file, which the system releases when this process ends, however it ends.

    Args:
        path: the lock file; it stays, and holds the number of the process that has or had it.
        error: what to raise when another process holds it.
        what: what is locked, the subject of that message.

    Raises:
        ArchnetError: another process holds it, or the file cannot be written.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as cause:
        raise error(f"{path} cannot be written: {cause.strerror}") from cause
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as cause:
                holder = os.read(file, 20).decode("ascii", "replace").strip()
                process = f"process {holder}" if holder.isdigit() else "another process"
                raise error(
                    f"{what} is in use by {process}: wait until it has ended, or stop it"
                ) from cause
            except OSError as cause:  # some network file systems have no locks
                _log.warning("%s cannot be locked (%s): start no second process", path, cause)
        with suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # Closing releases it here; children of a fork may hold the file open for longer.
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def digest(*paths: Path) -> str:
    """SHA-256 of the content of files, one after another."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()
