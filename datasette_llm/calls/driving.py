"""Let a model answer: chunk by chunk or whole, and what becomes of it when that fails or is not wanted.

The innermost part of a call. It knows llm's response and nothing of who asked, so it is the same where the
prompt's owner lives and in a worker process.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import anyio

from .._compat import BaseExceptionGroup
from ..backends import native_cancel
from ..backends.closing import close_quietly
from ..backends.datasette_side import backend
from .completeness import check_complete
from .http_answers import HttpAnswers, watch
from .listening import listen_for
from .wording import in_words

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    import llm

logger = logging.getLogger("datasette_llm")

#: How long closing a model's generator may take, in seconds, when its answer is not wanted any more.
CLOSE_SECONDS = 5.0


async def drive(observed: llm.AsyncResponse, publish: Callable[[Any], object]) -> Mapping[str, str]:
    """Let the model answer; afterwards its generator is closed, whatever happened.

    Args:
        observed: llm's response, which asks for a stream or does not.
        publish: called with each event of a stream, as it comes.

    Returns:
        the headers of the provider's answer, as far as they were seen.

    Raises:
        Exception: what the model raised, in words where it stumbled. The response then counts as failed.
    """
    events: AsyncGenerator[Any, None] | None = None
    answers = HttpAnswers()
    watch(answers)
    listen_for(observed)
    try:
        if observed.stream:
            events = observed.astream_events()
            async for event in events:
                if not isinstance(event.chunk, str):
                    raise _wrong_chunk(observed, event.chunk)
                publish(event)
        else:
            # Half the layers, for an answer that comes in one piece.
            await observed
            _check_text(observed)
        check_complete(observed)
        return answers.headers
    except BaseException as error:
        await _close(events)
        await _close(getattr(observed, "_generator", None))  # llm before 0.36 leaves it to us
        answers.attach(error)
        _give_up(observed)
        if isinstance(error, AssertionError) and not error.args:
            # llm asserts that a chunk is not None, and says no more than that.
            raise _wrong_chunk(observed, None) from error
        if not _is_ours(error):
            raise RuntimeError(f"the model raised {type(error).__name__}: {error}") from error
        worded = in_words(error, observed)
        if worded is not error:
            raise worded from error
        raise
    finally:
        watch(None)
        listen_for(None)
        await answers.aclose()


async def _close(generator: AsyncGenerator[Any, None] | None) -> None:
    """Close a model's generator, however it takes that."""
    if generator is None:
        return
    with anyio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
        await close_quietly(generator, "the generator of a model")
    if scope.cancelled_caught:
        logger.warning("Abandoned the generator of a model: closing it took more than %g s", CLOSE_SECONDS)


def _give_up(observed: llm.AsyncResponse) -> None:
    """Make of llm's response one that has failed: it calls no model again and is no turn of anything."""
    observed._done = True
    observed._end = time.monotonic()
    conversation = observed.conversation
    if conversation is not None and observed in conversation.responses:
        conversation.responses.remove(observed)


def _is_ours(error: BaseException) -> bool:
    """Whether an exception from a model goes on as it is: errors, and what stops prompt or program."""
    if isinstance(error, BaseExceptionGroup):
        if backend() == "trio":
            # Tasks that a library ran side by side, to connect say, are cancelled together: the scope
            # that was cancelled takes the cancellations out of the group.
            _, rest = error.split(anyio.get_cancelled_exc_class())
            if rest is None:
                return True
            error = rest
        return isinstance(error, Exception) or error.subgroup(_PROGRAM_STOPS) is not None
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return not native_cancel.is_stray(error)
    return isinstance(error, (Exception, *_PROGRAM_STOPS))


def _check_text(observed: llm.AsyncResponse) -> None:
    for event in observed._stream_events:
        if not isinstance(event.chunk, str):
            raise _wrong_chunk(observed, event.chunk)


_PROGRAM_STOPS = (KeyboardInterrupt, SystemExit)


def _wrong_chunk(observed: llm.AsyncResponse, chunk: Any) -> TypeError:
    return TypeError(
        f"model {observed.model.model_id} yielded {type(chunk).__name__}; a model yields text or StreamEvent"
    )
