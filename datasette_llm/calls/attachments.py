"""Attachments that are only an address: their types are found before llm asks for them.

llm finds the type of such an attachment with a request of its own, made inside of the event loop, where
every page and every other prompt waits for it. Here an async client asks, which the prompts share, and what
it found is remembered. Whatever the host of a file answers concerns that one prompt: it says nothing about
the provider, its limits, or the key.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import llm

from .clients.leases import ClientSets, Made
from .clients.transport import http_options, library_that

if TYPE_CHECKING:
    from collections.abc import Iterable

#: How many addresses' types are remembered, and how long, in seconds.
MOST_REMEMBERED = 10_000
REMEMBERED_SECONDS = 600.0

#: How long the host of a file may take, in seconds.
HOST_SECONDS = 20.0

#: As llm does.
MOST_REDIRECTS = 3

_known: OrderedDict[str, tuple[float, str]] = OrderedDict()


class AttachmentError(ValueError):
    """The type or the content of a file that a prompt points to cannot be had."""


class LinkedAttachment(llm.Attachment):
    """An attachment that is an address, of which the type is known."""

    def content_bytes(self) -> Any:
        """Return the content.

        Raises:
            AttachmentError: the host does not give it.
        """
        try:
            return super().content_bytes()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise AttachmentError(_words(str(self.url), error)) from None


async def find_types(
    clients: ClientSets | None, attachments: Iterable[llm.Attachment]
) -> list[llm.Attachment]:
    """Return these attachments, each with its type where finding that takes a request.

    Args:
        clients: the shared clients of whoever owns the prompt, if they belong to this event loop.
        attachments: as a prompt is given them; they are not changed.

    Raises:
        AttachmentError: a host does not say what there is, or cannot be reached.
    """
    return [await _find_type(clients, attachment) for attachment in attachments]


def need_finding(attachments: Any) -> bool:
    """Say whether there are attachments that are only an address."""
    return bool(attachments) and any(_is_only_address(attachment) for attachment in attachments)


def _is_only_address(attachment: Any) -> bool:
    return isinstance(attachment, llm.Attachment) and bool(attachment.url) and not attachment.path


async def _find_type(clients: ClientSets | None, attachment: llm.Attachment) -> llm.Attachment:
    if not _is_only_address(attachment):
        return attachment
    url = str(attachment.url)
    kind = attachment.type or await _type_of(clients, url)
    values = {**vars(replace(attachment)), "type": kind}
    return LinkedAttachment(**values)


async def _type_of(clients: ClientSets | None, url: str) -> str:
    now = time.monotonic()
    known = _known.get(url)
    if known is not None and now - known[0] < REMEMBERED_SECONDS:
        return known[1]
    kind = await _ask(clients, url)
    _known[url] = now, kind
    _known.move_to_end(url)
    if len(_known) > MOST_REMEMBERED:
        _known.popitem(last=False)
    return kind


async def _ask(clients: ClientSets | None, url: str) -> str:
    library = library_that(llm.models)
    sets = ClientSets() if clients is None else clients
    client = sets.lease("hosts of files", lambda: _make(library))
    try:
        with anyio.fail_after(HOST_SECONDS):
            response = await client.head(url)
            response.raise_for_status()
    except Exception as error:
        raise AttachmentError(_words(url, error)) from None
    finally:
        if sets is not clients:
            await sets.aclose()
    kind = str(response.headers.get("content-type") or "").partition(";")[0].strip()
    if not kind:
        raise AttachmentError(f"the attachment {url}: its host does not say what type it is of")
    return kind


def _make(library: Any) -> Made:
    options = http_options(library, None, {"follow_redirects": True, "max_redirects": MOST_REDIRECTS})
    del options["event_hooks"]
    client = library.AsyncClient(**options)
    return Made(client, client.aclose)


def _words(url: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the attachment {url}: its host answered {status}"
    return f"the attachment {url}: {str(error) or type(error).__name__}"
