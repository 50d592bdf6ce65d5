"""Who made a run folder, and whether its config is still the one it was made with.

``origin.json`` holds the keys that say what a run computes, and a message authentication code of
them (HMAC-SHA256) under a key that only this user can read. A folder whose code does not verify
was made by somebody else, by an older archnet, or edited: it is data, and what its config would
run, such as a teacher's factory, waits for an explicit yes.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_KEY_BYTES = 32

Record = dict[str, Any]


def record(values: Mapping[str, Any]) -> Record:
    """Config values by key as JSON would give them back."""
    return json.loads(json.dumps(dict(values), default=_plain))


def seal(values: Record) -> str | None:
    """The code of a record, in hexadecimal; None where no key can be kept for this user."""
    key = _key(make=True)
    return None if key is None else _code(key, values)


def verifies(values: Record, code: Any) -> bool:
    """Whether this user has sealed a record."""
    key = _key(make=False)
    if key is None or not isinstance(code, str) or not code.isascii():
        return False
    return hmac.compare_digest(_code(key, values), code)


def key_file() -> Path:
    """Where this user's key is: in the folder for state of the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # Only absolute paths count, says that specification.
    root = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return root / "archnet" / "key"


def _code(key: bytes, values: Record) -> str:
    content = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    try:
        path = key_file()
        found = _read(path)
        if found is None and make:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(path)
            found = _read(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        _log.debug("no key for run folders: %s", error)
        return None
    return found


def _read(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        found = path.read_bytes()
        # A short one, which a full disk has left, would be easy to guess.
        return found if len(found) == _KEY_BYTES else None
    return None


def _write(path: Path) -> None:
    """Write a new key, for this user's eyes only; of several processes, one has its way."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(file, secrets.token_bytes(_KEY_BYTES))
            os.fsync(file)
        finally:
            os.close(file)
        if path.exists():  # in pieces
            part.replace(path)
            return
        # Unlike a replacement, a link fails where another process was faster.
        with suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
