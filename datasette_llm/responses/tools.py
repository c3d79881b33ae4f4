"""Running a turn's tool calls as child tasks, with llm's own meaning of each outcome.

llm runs async tools with ``asyncio.create_task``, which trio does not have. Handed a plain function that
returns an awaitable it awaits that in place, on either backend; so each call goes to llm alone, in a
child task of the caller, and llm still does everything else (hooks, errors as results, attachments).
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

import anyio
import llm
from llm.parts import AttachmentPart, Message, ToolCallPart, ToolResultPart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    #: Opens a context around a tool call; what it yields is told the error that the call ends with.
    Around = Callable[[llm.ToolCall], AbstractContextManager[Callable[[BaseException | None], None]]]

#: What ends the program, not one prompt.
PROGRAM_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def unobserved(call: llm.ToolCall) -> AbstractContextManager[Callable[[BaseException | None], None]]:
    """Stand for the context around a tool call that nobody observes."""
    return nullcontext(lambda error: None)


async def execute_tool_calls(
    response: llm.AsyncResponse,
    calls: list[llm.ToolCall],
    *,
    before_call: Any = None,
    after_call: Any = None,
    tools: list[Any] | None = None,
    around: Around = unobserved,
) -> list[llm.ToolResult]:
    """Run tool calls: async tools at the same time, sync tools in their place in the order.

    A tool's exception becomes its result. A sync tool that pauses, or a hook that fails, keeps the calls
    behind it from starting; those already running are waited for. Cancelling the caller cancels them.

    Args:
        response: the one that asked for them.
        calls: what it asked for.
        before_call: llm's hook of this name.
        after_call: llm's hook of this name.
        tools: the tools that may be called, if not those of the response's prompt.
        around: opens a context around each call, and is told the error that it ends with.

    Returns:
        the results, in the order of the calls.

    Raises:
        llm.PauseChain: of the first call that paused; ``tool_results`` holds its siblings' results.
        Exception: the first one that ``before_call`` or ``after_call`` raised, bare.
    """
    given = response.prompt.tools if tools is None else tools
    known = {
        tool.name: tool
        for tool in llm.Prompt(None, model=response.model, tools=given).tools
        if isinstance(tool, llm.Tool)
    }
    inlined: list[Any] = [_awaited_in_place(tool) for tool in known.values()]
    execute = functools.partial(
        llm.AsyncResponse.execute_tool_calls,
        response,
        before_call=before_call,
        after_call=after_call,
        tools=inlined,
    )
    # Without calls llm only prepares the toolboxes: once, before the calls share them.
    await execute(tool_calls_list=[])

    results: dict[int, llm.ToolResult] = {}
    problems: dict[int, Exception] = {}

    async def run(index: int, call: llm.ToolCall) -> None:
        with around(call) as ended_with:
            try:
                results[index] = (await execute(tool_calls_list=[call]))[0]
                ended_with(results[index].exception)
            except Exception as problem:
                problems[index] = problem
                ended_with(None if isinstance(problem, llm.PauseChain) else problem)
            except BaseException as stop:
                if isinstance(stop, (*PROGRAM_STOPS, anyio.get_cancelled_exc_class())):
                    raise
                problems[index] = RuntimeError(f"the tool {call.name} raised {type(stop).__name__}: {stop}")
                problems[index].__cause__ = stop
                ended_with(stop)

    async with anyio.create_task_group() as tasks:
        for index, call in enumerate(calls):
            if iscoroutinefunction(getattr(known.get(call.name), "implementation", None)):
                tasks.start_soon(run, index, call)
            else:
                await run(index, call)
                if index in problems:
                    break
    ordered = [results[index] for index in sorted(results)]
    pauses = []
    for _, problem in sorted(problems.items()):
        if not isinstance(problem, llm.PauseChain):
            raise problem
        pauses.append(problem)
    if pauses:
        pauses[0].tool_results = ordered
        raise pauses[0]
    return ordered


def _awaited_in_place(tool: llm.Tool) -> llm.Tool:
    implementation = tool.implementation
    if not iscoroutinefunction(implementation):
        return tool

    def call(*args: Any, **kwargs: Any) -> Any:
        return implementation(*args, **kwargs)

    # llm finds the parameters and, for a toolbox's method, its instance through the function.
    plain: Callable[..., Any] = functools.wraps(implementation)(call)
    if hasattr(implementation, "__self__"):
        plain.__self__ = implementation.__self__  # type: ignore[attr-defined]
    return replace(tool, implementation=plain)


def tool_message(results: Sequence[llm.ToolResult]) -> list[Message]:
    """The messages that carry tool results back to a model, the files they returned included."""
    parts = [
        ToolResultPart(
            name=result.name,
            output=result.output,
            tool_call_id=result.tool_call_id,
            exception=_described(result.exception),
        )
        for result in results
    ]
    files = attachments_of(results)
    messages = [Message(role="tool", parts=list(parts))]
    if files:
        messages.append(Message(role="user", parts=[AttachmentPart(attachment=file) for file in files]))
    return messages


def attachments_of(results: Sequence[llm.ToolResult]) -> list[llm.Attachment]:
    """All files that these tool results returned."""
    return [file for result in results for file in result.attachments or []]


def _described(exception: BaseException | str | None) -> str | None:
    if exception is None or isinstance(exception, str):
        return exception
    return f"{type(exception).__name__}: {exception}"


def pending_tool_calls(messages: Sequence[Message]) -> list[llm.ToolCall]:
    """The tool calls at the end of a history that have no result yet.

    A history that went on after the calls (anything but tool results follows them) has none. Results
    without an id answer calls without one, by name, one each.
    """
    calls: list[ToolCallPart] = []
    answered: list[ToolResultPart] = []
    for message in messages:
        asked = [p for p in message.parts if isinstance(p, ToolCallPart) and not p.server_executed]
        if message.role == "assistant" and asked:
            calls, answered = asked, []
        elif message.role == "tool":
            answered += [part for part in message.parts if isinstance(part, ToolResultPart)]
        else:
            calls = []
    ids = {part.tool_call_id for part in answered if part.tool_call_id}
    names = [part.name for part in answered if not part.tool_call_id]
    pending = []
    for part in calls:
        if part.tool_call_id in ids:
            continue
        if not part.tool_call_id and part.name in names:
            names.remove(part.name)
            continue
        pending.append(
            llm.ToolCall(name=part.name, arguments=part.arguments or {}, tool_call_id=part.tool_call_id)
        )
    return pending
