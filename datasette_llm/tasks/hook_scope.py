"""The plugins' wrappers around a prompt: how they are found, entered and left, and what they see.

A wrapper is an async context manager that another plugin gives with the ``llm_prompt_context`` hook.
Wrappers nest in the order in which pluggy calls the hook, the first one outermost. They are entered and
left in the task that runs the prompt, so an exception of the model is thrown into each of them in turn,
and what one raises is what the next one outside sees.
"""

from __future__ import annotations

from functools import partial
from inspect import iscoroutine
from typing import TYPE_CHECKING, Any

from ..backends import datasette_side
from ..hookspecs import plugin_manager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    import llm

    from ..calls.choice import Choice
    from .group import Group

    DoneCallback = Callable[[llm.AsyncResponse], Awaitable[Any] | Any]
    Wrapper = Callable[["PromptResult"], AbstractAsyncContextManager[Any]]


class PromptResult:
    """What a wrapper knows of its prompt: nothing before its ``yield``, everything after it.

    Attributes:
        response: llm's response object; of a chain the latest one. ``None`` until the model is called.
        responses: every response so far; one, or one per turn of a chain.
        purpose: what the prompt is for.
        group: the ``Group`` the prompt belongs to, or ``None``.
        is_chain: whether this is a chain of prompts and tool calls.
        chain_complete: whether the chain came to its own end (not paused, cancelled or failed).
    """

    def __init__(self, *, purpose: str | None, group: Group | None, is_chain: bool = False) -> None:
        self.response: llm.AsyncResponse | None = None
        self.responses: list[llm.AsyncResponse] = []
        self.purpose = purpose
        self.group = group
        self.is_chain = is_chain
        self.chain_complete = False
        self._callbacks: list[DoneCallback] = []
        self._answered = 0

    async def on_response_done(self, callback: DoneCallback) -> None:
        """Have a callback called with each response that succeeds, those so far included.

        Args:
            callback: a function taking llm's response, sync or async. It has finished before any
                reader gets the answer; an exception of it becomes the error of the response.
        """
        self._callbacks.append(callback)
        for response in self.responses[: self._answered]:
            await _awaited(callback(response))

    def _attempt(self, response: llm.AsyncResponse) -> None:
        """A model call begins: a turn's first, or another attempt at it."""
        if len(self.responses) > self._answered:
            self.responses.pop()
        self.response = response
        self.responses.append(response)

    async def _succeeded(self) -> None:
        """The model call that began last has its answer: run the callbacks registered before."""
        self._answered = len(self.responses)
        if self.response is not None:
            for callback in list(self._callbacks):
                await datasette_side.call(callback, self.response)


async def _awaited(value: Any) -> Any:
    # A wrapper calls on_response_done from Datasette's side already, so what its callback returns is
    # awaited right there.
    return await value if hasattr(value, "__await__") else value


def hooks_wrap_prompts() -> bool:
    """Whether any plugin has something to say about prompts; it may still have no wrapper for one."""
    hook = plugin_manager().hook.llm_prompt_context
    return bool(hook.get_hookimpls())


async def find_wrappers(datasette: Any, choice: Choice, prompt: str | None) -> list[Wrapper]:
    """Ask every plugin for its wrapper around this prompt.

    Returns:
        the wrappers, outermost first; empty for most installations.

    Raises:
        TypeError: a plugin returned something that is not a wrapper.
    """
    wrappers = []
    for answer in plugin_manager().hook.llm_prompt_context(
        datasette=datasette,
        model_id=choice.model_id,
        prompt=prompt,
        purpose=choice.purpose,
        actor=choice.actor,
    ):
        wrapper = await datasette_side.resolve(answer)
        if wrapper is None:
            continue
        if not callable(wrapper):
            raise TypeError(
                "llm_prompt_context must return a function that takes a PromptResult and returns an async"
                f" context manager, or None; a plugin returned {type(wrapper).__name__}"
            )
        wrappers.append(wrapper)
    return wrappers


def entered(wrapper: Wrapper, result: PromptResult) -> AbstractAsyncContextManager[Any]:
    """Return the context manager that enters and leaves a wrapper, on Datasette's side.

    Entering it raises what the plugin raised, or ``TypeError`` if the wrapper returned something else
    than an async context manager.
    """
    return datasette_side.context_manager(partial(_manager_of, wrapper, result))


def _manager_of(wrapper: Wrapper, result: PromptResult) -> AbstractAsyncContextManager[Any]:
    manager = wrapper(result)
    if not hasattr(manager, "__aenter__") or not hasattr(manager, "__aexit__"):
        if iscoroutine(manager):
            manager.close()
        raise TypeError(
            "the function that llm_prompt_context returns must return an async context manager;"
            f" a plugin's returned {type(manager).__name__}"
        )
    return manager
