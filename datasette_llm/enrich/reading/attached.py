"""What a row has attached to its prompt: an address, a file, or the bytes of one of its columns.

An attachment is a template as the prompt is one. Where it is a single expression, its value counts: the bytes
of a BLOB column are the content. Text is an address, or the name of a file where files may be read. NULL and
nothing are no attachment.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EnrichInputError, RowError
from ..telling.words import counted
from .template import PromptTemplate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..sql import SQLValue

_ADDRESS = re.compile(r"https?://\S", re.IGNORECASE)
#: Of a file that many rows have attached the hash is remembered.
_MOST_HASHES = 1_000


class AttachmentError(RowError):
    """What a row has attached cannot be had, or not be sent."""

    kind = "attachment"


@dataclass(frozen=True, slots=True)
class Attached:
    """One attachment of a row, not read yet.

    Attributes:
        value: an address, the name of a file, or the content itself.
    """

    kind: Literal["url", "file", "content"]
    value: str | bytes

    def identity(self) -> tuple[str, str]:
        """Return what tells it from others: an address, or a hash of the content. Reads a file.

        Raises:
            AttachmentError: the file cannot be read.
        """
        if isinstance(self.value, bytes):
            return "content", hashlib.blake2b(self.value, digest_size=16).hexdigest()
        if self.kind == "url":
            return "url", self.value
        try:
            found = Path(self.value).stat()
            return "content", _hash_of(self.value, found.st_mtime_ns, found.st_size)
        except (OSError, ValueError) as error:
            raise unreadable(self.value, error) from None

    def __str__(self) -> str:
        return counted(len(self.value), "byte") if isinstance(self.value, bytes) else self.value


class AttachmentTemplate:
    """A compiled template of an attachment.

    Attributes:
        columns: the columns it reads.
    """

    def __init__(self, source: str, columns: Sequence[str], *, files: bool) -> None:
        """Compile it.

        Args:
            files: whether it may name a file of this machine.

        Raises:
            EnrichInputError: the syntax is wrong, or a name is no column.
        """
        try:
            self._template = PromptTemplate(source, columns)
        except EnrichInputError as error:
            raise EnrichInputError(f"In the attachment {source!r}: {error}") from None
        self._files = files
        self.columns = self._template.columns

    def refer(self, values: Mapping[str, SQLValue]) -> Attached | None:
        """Return what a row has attached, if it has anything.

        Raises:
            AttachmentError: it is neither an address nor a file that may be read.
            RowError: the template fails on this row.
        """
        value: Any = self._template.value(values)
        if isinstance(value, bytes):
            return Attached("content", value) if value else None
        text = str(value).strip()
        if not text:
            return None
        if _ADDRESS.match(text):
            return Attached("url", text)
        if "://" in text or text.startswith("data:"):
            raise AttachmentError(f"the attachment {_shown(text)} is no address that begins with http")
        if not self._files:
            raise AttachmentError(
                f"the attachment {_shown(text)} is no address, and files are read for the command line only"
            )
        return Attached("file", text)


def unreadable(name: str, error: Exception) -> AttachmentError:
    """Return what is said of a file that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error)
    return AttachmentError(f"the attachment {_shown(name)} cannot be read: {reason}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


@lru_cache(maxsize=_MOST_HASHES)
def _hash_of(name: str, _changed: int, _size: int) -> str:
    state = hashlib.blake2b(digest_size=16)
    with open(name, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
