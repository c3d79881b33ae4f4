"""Answers that could not be written, in a file beside the database: the next run takes them up.

The file is ``<database>-llm-answers.jsonl``, one JSON object a line: table, key, columns and values of one
row, and a fingerprint of the columns that its prompt was made from, so that an answer to a question that
is no longer asked can be told. A failure has its error instead of values. Where there can be no file
beside the database (its disk is full, say) there is one in a directory of this user's own below the
system's for temporary files.

Several jobs may have lines in one file, each for a table and columns of its own; nobody but the job that
holds the lock on these (see `lock`) adds, reads or removes their lines. The file itself changes under
another lock, by appending (a line that is torn is no line) or by replacing it as a whole.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import stat
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..telling.kinds import group_of
from .lock import Held, hold_lock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..sql import SQLValue
    from .results import Result

logger = logging.getLogger("datasette_llm")

LOCK_SECONDS = 10.0
LOCK_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Line:
    """What the file says of one row.

    Attributes:
        key: the row's key.
        values: by column; ``None`` for a failure.
        asked_of: the columns that the prompt was made from.
        fingerprint: of their values.
        overwrite: a value that the row has is to be replaced.
        model: the id of the model that answered.
        kind: of a failure.
        message: of a failure.
        attempts: of a failure.
        question: the hash of what was asked, if it is known.
        tokens: what the answer took, in and out.
    """

    key: tuple[SQLValue, ...]
    values: Mapping[str, SQLValue] | None
    asked_of: tuple[str, ...]
    fingerprint: str
    overwrite: bool
    model: str | None
    kind: str = ""
    message: str = ""
    attempts: int = 0
    question: bytes | None = None
    tokens: tuple[int | None, int | None] = (None, None)


class SideFile:
    """The lines of one table and its output columns.

    Attributes:
        path: where the newest lines went, once there are any.
    """

    def __init__(self, database: str | None, table: str, columns: Sequence[str]) -> None:
        """Say whose lines they are.

        Args:
            database: the path of the database; one in memory has no file beside it.
        """
        self.path: Path | None = None
        self._database = None if database is None else Path(database).resolve()
        self._table = table
        self._columns = tuple(columns)

    def append(self, results: Iterable[Result], *, model: str | None, overwrite: bool) -> None:
        """Add lines, and have the disk take them.

        Raises:
            OSError: neither file can be written; then neither has any of them.
        """
        lines = (self._text_of(result, model, overwrite) for result in results)
        data = "".join(line + "\n" for line in lines).encode()
        problem: OSError = FileNotFoundError("a database in memory has no file beside it")
        for find in (self._beside, self._elsewhere):
            try:
                path = find(make=True)
                if path is not None:
                    with _locked(path):
                        _append(path, data, self._mode())
                    self.path = path
                    return
            except OSError as error:
                problem = error
        raise problem

    def read(self) -> list[Line]:
        """Return what there is."""
        found = []
        for path in self._existing():
            for text in path.read_bytes().splitlines():
                record = self._own(text)
                if record is not None:
                    found.append(_line_of(record))
        return found

    def forget(self) -> None:
        """Remove the lines; a file that has no others is removed.

        Raises:
            OSError: it cannot be written.
        """
        for path in self._existing():
            with _locked(path):
                texts = path.read_bytes().splitlines()
                others = [text for text in texts if _parsed(text) is not None and self._own(text) is None]
                if others:
                    _replace(path, b"".join(text + b"\n" for text in others), self._mode())
                else:
                    path.unlink()
                _sync_directory(path.parent)
        self.path = None

    def _beside(self, *, make: bool = False) -> Path | None:
        if self._database is None:
            return None
        return self._database.with_name(f"{self._database.name}-llm-answers.jsonl")

    def _elsewhere(self, *, make: bool = False) -> Path | None:
        """Return the path below the directory for temporary files.

        Raises:
            OSError: the directory is not this user's own, or cannot be made.
        """
        if self._database is None:
            return None
        user = "" if sys.platform == "win32" else f"-{os.getuid()}"
        directory = Path(tempfile.gettempdir()) / f"datasette-llm{user}"
        if make:
            directory.mkdir(mode=0o700, exist_ok=True)
        about = directory.lstat()
        if sys.platform != "win32" and (
            not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022
        ):
            raise PermissionError(f"{directory} is not a directory that only this user can write to")
        digest = hashlib.sha256(os.fsencode(self._database)).hexdigest()[:12]
        return directory / f"{self._database.name}-{digest}-llm-answers.jsonl"

    def _existing(self) -> list[Path]:
        paths = []
        for find in (self._beside, self._elsewhere):
            with contextlib.suppress(OSError):
                path = find()
                if path is not None and path.is_file():
                    paths.append(path)
        return paths

    def _mode(self) -> int:
        """Return the permission bits of the database: nobody reads here who may not read there."""
        try:
            return stat.S_IMODE(os.stat(str(self._database)).st_mode)
        except OSError:
            return 0o600

    def _text_of(self, result: Result, model: str | None, overwrite: bool) -> str:
        row = result.row
        record: dict[str, Any] = {
            "table": self._table,
            "key": [_encoded(value) for value in row.key],
            "columns": list(self._columns),
            "asked_of": list(row.values),
            "fingerprint": fingerprint(row.values.values()),
            "overwrite": overwrite,
            "model": model,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if result.values is not None:
            record["values"] = [_encoded(value) for value in result.values]
            if result.question is not None:
                record["question"] = result.question.hex()
                record["tokens"] = [result.input_tokens, result.output_tokens]
        else:
            kind = group_of(result.error, result.kind)
            record |= {"kind": kind, "error": result.message, "attempts": result.attempts}
        return json.dumps(record)

    def _own(self, text: bytes) -> dict[str, Any] | None:
        """Return the record on a line, if it is one of this table and these columns."""
        record = _parsed(text)
        if record is None:
            return None
        try:
            own = record["table"].lower() == self._table.lower() and {
                name.lower() for name in record["columns"]
            } == {name.lower() for name in self._columns}
            _line_of(record)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # Of another version, perhaps: left where it is.
        return record if own else None


def fingerprint(values: Iterable[SQLValue]) -> str:
    """Return what stands for the values of a row's columns."""
    text = json.dumps([_encoded(value) for value in values])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _encoded(value: SQLValue) -> Any:
    if isinstance(value, bytes):
        return {"$base64": True, "encoded": base64.b64encode(value).decode()}
    return value


def _decoded(value: Any) -> SQLValue:
    plain: SQLValue = base64.b64decode(value["encoded"]) if isinstance(value, dict) else value
    return plain


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _line_of(record: dict[str, Any]) -> Line:
    values = None
    if "values" in record:
        decoded = [_decoded(value) for value in record["values"]]
        values = dict(zip(record["columns"], decoded, strict=True))
    return Line(
        tuple(_decoded(value) for value in record["key"]),
        values,
        tuple(record["asked_of"]),
        record["fingerprint"],
        bool(record["overwrite"]),
        record["model"],
        record.get("kind", ""),
        record.get("error", ""),
        int(record.get("attempts", 0)),
        bytes.fromhex(record["question"]) if "question" in record else None,
        tuple(record.get("tokens", (None, None))),
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file of lines; held elsewhere for moments only.

    Raises:
        OSError: somebody does not let go of it.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(path.with_name(path.name + ".lock")))
            except Held as held:
                if time.monotonic() > deadline:
                    raise OSError(f"{path} is locked by {held}") from None
                time.sleep(LOCK_PAUSE_SECONDS)
            else:
                break
        yield


def _append(path: Path, data: bytes, mode: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    new = not path.exists()
    descriptor = os.open(path, flags, mode)
    try:
        size = os.fstat(descriptor).st_size
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                data = b"\n" + data  # The line before is torn.
        try:
            _write(descriptor, data)
        except OSError:
            os.ftruncate(descriptor, size)
            if not size:
                path.unlink()
            raise
    finally:
        os.close(descriptor)
    if new:
        _sync_directory(path.parent)


def _replace(path: Path, data: bytes, mode: int) -> None:
    new = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), mode)
        try:
            _write(descriptor, data)
        finally:
            os.close(descriptor)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        return  # A directory cannot be opened there.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
