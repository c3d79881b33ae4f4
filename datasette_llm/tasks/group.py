"""A group as plugins see it: who it is for, its responses and figures. What runs it is `group_supervisor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..calls.choice import Choice
    from ..responses.response import PromptResponse
    from .stats import GroupStats


class Responses:
    """The responses of a group, as its hooks see them.

    ``len()`` counts all prompts of the group. Those of ``prompt()`` are kept until the group is gone;
    those of ``map()`` are only counted, since there may be millions.
    """

    def __init__(self) -> None:
        self._kept: list[PromptResponse] = []
        self._uncounted = 0

    def __len__(self) -> int:
        return len(self._kept) + self._uncounted

    def __iter__(self) -> Iterator[PromptResponse]:
        return iter(self._kept)

    def __getitem__(self, index: int) -> PromptResponse:
        return self._kept[index]

    def add(self, response: PromptResponse, *, keep: bool) -> None:
        """Count a response, and keep it if it is one that somebody will look for."""
        if keep:
            self._kept.append(response)
        else:
            self._uncounted += 1


class Group:
    """A group of prompts, as hooks receive it: one object for the group's whole life.

    Attributes:
        model_id: the model of the group.
        purpose: what its prompts are for.
        actor: who they are for.
        closed: whether the block has been left.
    """

    def __init__(self, choice: Choice, read_stats: Callable[[], GroupStats]) -> None:
        self.model_id = choice.model_id
        self.purpose = choice.purpose
        self.actor: dict[str, Any] | None = choice.actor
        self.closed = False
        self._responses = Responses()
        self._read_stats = read_stats

    @property
    def stats(self) -> GroupStats:
        """What happened so far; cheap enough to read many times a second."""
        return self._read_stats()

    def __repr__(self) -> str:
        return f"<Group {self.model_id} purpose={self.purpose!r} prompts={len(self._responses)}>"
