"""Attachments that are only an address: their types and contents are had without llm asking for them.

llm finds the type of such an attachment, and its content where a model sends that, with requests of its own
made inside of the event loop, where every page and every other prompt waits for them. Here an async client
asks, which the prompts share, and what types it found is remembered. Whatever the host of a file answers
concerns that one prompt: it says nothing about the provider, its limits, or the key.

Types are found before there is a prompt. Contents only when a model asks: its code is stopped there, the
content is fetched, and the model begins again; nothing has been sent by then (see ``contents``).
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
from .http_answers import watched

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

#: How many addresses' types are remembered, and how long, in seconds.
MOST_REMEMBERED = 10_000
REMEMBERED_SECONDS = 600.0

#: How long the host of a file may take, in seconds.
HOST_SECONDS = 20.0

#: How long a content may take that a model asks for, in seconds.
CONTENT_SECONDS = 120.0

#: As llm does.
MOST_REDIRECTS = 3

_known: OrderedDict[str, tuple[float, str]] = OrderedDict()


class AttachmentError(ValueError):
    """The type or the content of a file that a prompt points to cannot be had."""


class ContentNeeded(Exception):
    """A model asks for the content of an attachment that has yet to be fetched."""

    def __init__(self, attachment: LinkedAttachment) -> None:
        super().__init__(f"the content of {attachment.url} has not been fetched")
        self.attachment = attachment


class LinkedAttachment(llm.Attachment):
    """An attachment that is an address, of which the type is known."""

    #: The shared clients that ask its host, if there are any.
    clients: ClientSets | None = None
    #: Its content, for as long as a model call needs it.
    fetched: bytes | None = None

    def content_bytes(self) -> Any:
        """Return the content.

        Raises:
            ContentNeeded: a model call asks that can fetch it without blocking the event loop.
            AttachmentError: the host does not give it.
        """
        if self.fetched is not None:
            return self.fetched
        if not self.content and watched():
            raise ContentNeeded(self)
        try:
            return super().content_bytes()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise AttachmentError(_words(str(self.url), error)) from None


def need_finding(arguments: Mapping[str, Any]) -> bool:
    """Say whether among the arguments of a prompt there are attachments that are only an address."""
    return any(map(_is_left, arguments.get("attachments") or ())) or any(
        map(_is_left, _in_messages(arguments.get("messages")))
    )


def without_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a prompt without attachments, to see whether llm takes the others."""
    return {name: value for name, value in arguments.items() if name != "attachments"}


async def with_types(
    clients: ClientSets | None, arguments: Mapping[str, Any], takes: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a prompt, attachments with their types where finding these takes a request.

    Args:
        clients: the shared clients of whoever owns the prompt, if they belong to this event loop.
        arguments: as a prompt is given them; neither they nor the attachments are changed.
        takes: the types that the model takes, if that is known.

    Raises:
        AttachmentError: a host does not say what there is, or cannot be reached, or it is of another type.
    """
    found = dict(arguments)
    if arguments.get("attachments"):
        found["attachments"] = await find_types(clients, arguments["attachments"], takes)
    if any(map(_is_left, _in_messages(arguments.get("messages")))):
        found["messages"] = [await _message(clients, message) for message in arguments["messages"]]
    return found


async def find_types(
    clients: ClientSets | None, attachments: Iterable[llm.Attachment], takes: Collection[str] = ()
) -> list[llm.Attachment]:
    """Do the same for attachments alone."""
    found = [await _find_type(clients, attachment) for attachment in attachments]
    for attachment in found:
        if takes and isinstance(attachment, LinkedAttachment) and attachment.type not in takes:
            raise AttachmentError(not_taken(str(attachment.url), str(attachment.type), takes))
    return found


def not_taken(name: str, kind: str, takes: Collection[str]) -> str:
    """Return what is said of an attachment that a model does not take."""
    return f"the attachment {name} is {kind}, which the model does not take, only {', '.join(sorted(takes))}"


def _in_messages(messages: Any) -> Iterator[Any]:
    for message in messages if isinstance(messages, (list, tuple)) else ():
        for part in getattr(message, "parts", None) or ():
            yield getattr(part, "attachment", None)


async def _message(clients: ClientSets | None, message: Any) -> Any:
    if not any(map(_is_left, _in_messages([message]))):
        return message
    parts = [
        replace(part, attachment=await _find_type(clients, part.attachment))
        if _is_left(getattr(part, "attachment", None))
        else part
        for part in message.parts
    ]
    return replace(message, parts=parts)


def _is_left(attachment: Any) -> bool:
    """Whether this is an attachment that is only an address, and was not seen here before."""
    return (
        isinstance(attachment, llm.Attachment)
        and not isinstance(attachment, LinkedAttachment)
        and bool(attachment.url)
        and not attachment.path
    )


async def _find_type(clients: ClientSets | None, attachment: llm.Attachment) -> llm.Attachment:
    if not _is_left(attachment):
        return attachment
    kind = attachment.type or await _type_of(clients, str(attachment.url))
    linked = LinkedAttachment(**{**vars(replace(attachment)), "type": kind})
    linked.clients = clients
    return linked


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
    with anyio.move_on_after(HOST_SECONDS) as scope:
        headers, _ = await _request(clients, "HEAD", url)
    if scope.cancelled_caught:
        raise AttachmentError(_words(url, TimeoutError()))
    kind = str(headers.get("content-type") or "").partition(";")[0].strip()
    if not kind:
        raise AttachmentError(f"the attachment {url}: its host does not say what type it is of")
    return kind


async def fetch(attachment: LinkedAttachment) -> None:
    """Fetch the content of an attachment; whoever asked for it forgets it afterwards.

    Raises:
        AttachmentError: the host does not give it.
    """
    url = str(attachment.url)
    with anyio.move_on_after(CONTENT_SECONDS) as scope:
        _, attachment.fetched = await _request(attachment.clients, "GET", url)
    if scope.cancelled_caught:
        raise AttachmentError(_words(url, TimeoutError()))


async def _request(clients: ClientSets | None, method: str, url: str) -> tuple[Mapping[str, str], bytes]:
    library = library_that(llm.models)
    # Those of another event loop, or of a group that has ended, are of no use.
    sets = ClientSets() if clients is None or clients.closed else clients
    client = sets.lease("hosts of files", lambda: _make(library))
    try:
        response = await client.request(method, url)
        response.raise_for_status()
    except Exception as error:
        raise AttachmentError(_words(url, error)) from None
    finally:
        if sets is not clients:
            await sets.aclose()
    return response.headers, response.content


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
