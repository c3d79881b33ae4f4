"""The contents of linked attachments that a model asks for in the middle of a call.

llm's interface for them is not async. So whoever asks is stopped by an exception, the content is fetched
while the event loop goes on, and the model is asked again. That happens before it has sent anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attachments import ContentNeeded, fetch

if TYPE_CHECKING:
    from .attachments import LinkedAttachment

#: How far the causes of an exception are followed: models wrap what stops them.
MOST_CAUSES = 10


class Contents:
    """What was fetched for one model call; forgotten with it, since files are large."""

    __slots__ = ("_fetched",)

    def __init__(self) -> None:
        self._fetched: list[LinkedAttachment] = []

    async def provide(self, error: Exception) -> bool:
        """Fetch what a call was stopped for.

        Returns:
            whether the call may be made again; an exception of any other kind is not for this.

        Raises:
            AttachmentError: the host does not give it.
        """
        needed = _needed(error)
        if needed is None or needed in self._fetched:
            return False
        await fetch(needed)
        self._fetched.append(needed)
        return True

    def forget(self) -> None:
        """Let go of the contents: the call is over."""
        for attachment in self._fetched:
            attachment.fetched = None
        self._fetched.clear()


def _needed(error: BaseException | None) -> LinkedAttachment | None:
    for _ in range(MOST_CAUSES):
        if error is None:
            return None
        if isinstance(error, ContentNeeded):
            return error.attachment
        error = error.__cause__ or error.__context__
    return None
