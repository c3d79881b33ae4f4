"""Notices when one of llm's own files changes, at the price of little more than one ``stat``.

Every lookup of a model asks, so it has to be cheap: files that do not exist are watched through
their directory, whose modification time changes when one is made. A file (or the directory) that
was modified within the last moments can be modified again without a visible difference, because
file systems stamp times in steps of some milliseconds: what was read of it counts as out of date.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import llm

MODEL_FILES = ("aliases.json", "extra-openai-models.yaml")
KEYS_FILE = "keys.json"

# Longer than a step of any usual file system's clock.
SETTLED_NS = 50_000_000


@dataclass(frozen=True, slots=True, eq=False)
class FileStates:
    """The files as they were when last looked at.

    Attributes:
        models: equal as long as the files that define models are the same.
        keys: equal as long as the file of keys is the same.
        keys_path: where that file is.
    """

    models: tuple[Any, ...]
    keys: Any
    keys_path: str
    directory: Any
    existing: tuple[tuple[str, Any], ...]


def latest() -> FileStates:
    """Return what `check` found last."""
    return _latest or check()


def check() -> FileStates:
    """Return the state of the files now; the same object if nothing has changed."""
    global _latest
    directory = _user_dir()
    known = _latest
    if known is not None and known.directory == _state(directory):
        for path, state in known.existing:
            if _state(path) != state:
                break
        else:
            return known
    paths = {name: os.path.join(directory, name) for name in (*MODEL_FILES, KEYS_FILE)}
    # The directory first: what appears afterwards changes it.
    directory_state = _settled_state(directory)
    states = {name: _settled_state(path) for name, path in paths.items()}
    _latest = FileStates(
        models=tuple((directory, states[name]) for name in MODEL_FILES),
        keys=(directory, states[KEYS_FILE]),
        keys_path=paths[KEYS_FILE],
        directory=directory_state,
        existing=tuple((paths[name], state) for name, state in states.items() if state is not None),
    )
    return _latest


_latest: FileStates | None = None
_directory: tuple[str | None, str] | None = None


def _user_dir() -> str:
    global _directory
    configured = os.environ.get("LLM_USER_PATH")
    if _directory is None or _directory[0] != configured:
        _directory = (configured, str(llm.user_dir()))
    return _directory[1]


def _state(path: str) -> tuple[int, ...] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _settled_state(path: str) -> Any:
    """Return the state of a file, or something equal to nothing while it may change unseen."""
    state = _state(path)
    if state is not None and abs(time.time_ns() - state[0]) < SETTLED_NS:
        return object()
    return state
