"""Attachments as llm takes them: read, and their types found as llm finds them. Blocks: for threads.

The type of an address is found by the prompt that sends it (`datasette_llm.calls.attachments`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.calls.attachments import find_types, not_taken

from .errors import EnrichInputError, RowError
from .reading.attached import Attached, AttachmentError, unreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import llm

#: So many rows are looked at before anything is sent, and for so long, in seconds.
FIRST_ROWS = 5
FIRST_SECONDS = 10.0


def load(attached: Sequence[Attached], takes: frozenset[str]) -> list[llm.Attachment]:
    """Return these attachments, read.

    Args:
        takes: the types that the model takes.

    Raises:
        AttachmentError: a file cannot be read, or nobody knows of what type something is, or the model does
            not take that.
    """
    return [_load(each, takes) for each in attached]


def _load(attached: Attached, takes: frozenset[str]) -> llm.Attachment:
    import llm
    from llm.utils import mimetype_from_path, mimetype_from_string

    if isinstance(attached.value, bytes):
        found = llm.Attachment(type=mimetype_from_string(attached.value), content=attached.value)
    elif attached.kind == "url":
        return llm.Attachment(url=attached.value)
    else:
        path = attached.value
        try:
            with open(path, "rb") as file:
                content = file.read()
            found = llm.Attachment(type=mimetype_from_path(path), path=path, content=content)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
    name = f"of {attached}" if attached.kind == "content" else str(attached)
    if not found.type:
        raise AttachmentError(f"the attachment {name} is of no type that llm knows")
    if found.type not in takes:
        raise AttachmentError(not_taken(name, found.type, takes))
    return found


async def check_first(rows: Sequence[Sequence[Attached]], model_id: str, takes: frozenset[str]) -> None:
    """Refuse what the model takes of no row: the types of the first rows are found before anything is sent.

    Raises:
        EnrichInputError: the types of some are known, and the model takes none of them.
    """
    refused: list[str] = []
    taken: list[Any] = []

    async def look(attached: Attached) -> None:
        try:
            [found] = await anyio.to_thread.run_sync(load, [attached], takes)
            taken.extend(await find_types(None, [found], takes))
        except (RowError, ValueError) as error:
            if "does not take" in str(error):
                refused.append(str(error))

    with anyio.move_on_after(FIRST_SECONDS):
        async with anyio.create_task_group() as tasks:
            for row in rows[:FIRST_ROWS]:
                for attached in row:
                    tasks.start_soon(look, attached)
    if refused and not taken:
        raise EnrichInputError(f"Nothing that the first rows have attached suits {model_id!r}: {refused[0]}")
