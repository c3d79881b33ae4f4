"""What counts as an answer: the model stopped by itself, and said something.

`check_finish` looks at why the model stopped, `spoken` at what it said. A model that does not tell why it
stopped is taken at its word.

Reasoning that a provider leaves in the text is no part of the answer. What `spoken` takes for reasoning,
at the beginning of the text only:

* ``<think>`` to ``</think>``, once or several times.
* ``<think>`` that is never closed: all of the text. The model has thought to the end and not answered.
* Everything before a ``</think>`` that nothing opened: the templates of some models write the opening
  tag, so it is not in the answer. Between quotation marks or backticks it is spoken about, and stays.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from datasette_llm.responses.finish import refusal_words

from ..errors import AnswerError

if TYPE_CHECKING:
    from datasette_llm.responses.response import PromptResponse

_OPENED, _CLOSED = "<think>", "</think>"
# Marks that some models begin their answers with, and that nobody sees: they are not white space to Python.
_INVISIBLE = "\ufeff\u200b\u2060"
_REASONING = re.compile(rf"\A(?:\s*{_OPENED}.*?{_CLOSED})*", re.DOTALL)
_QUOTES = ("`", '"', "'")

# What models call the number of tokens that an answer may have, the commonest name first.
_LIMIT_NAMES = ("max_tokens", "max_output_tokens", "max_completion_tokens", "num_predict", "max_new_tokens")
_LIMIT_LIKE = re.compile(r"max.*tokens")


def spoken(text: str) -> str:
    """Return what an answer says: without reasoning before it and without white space around it."""
    said = _stripped(text)
    said = _stripped(_REASONING.sub("", said, count=1))
    if said.startswith(_OPENED):
        return ""
    closing = said.find(_CLOSED)
    if closing >= 0 and _OPENED not in said[:closing] and said[closing - 1 : closing] not in _QUOTES:
        return _stripped(said[closing + len(_CLOSED) :])
    return said


def fenced(text: str, *, last: bool = False) -> str:
    """Return the first fenced block of an answer, or the last, as llm finds it; else all of it."""
    from llm.utils import extract_fenced_code_block

    code = extract_fenced_code_block(text, last=last)
    # What the first line is indented by belongs to it.
    return code.strip("\r\n").rstrip() if code and code.strip() else text


def _stripped(text: str) -> str:
    return text.strip().strip(_INVISIBLE).strip()


def check_finish(response: PromptResponse, text: str, *, allow_cut: bool = False) -> None:
    """Refuse an answer whose model did not stop by itself.

    Args:
        response: the complete response.
        text: its text.
        allow_cut: an answer that ran out of tokens will do.

    Raises:
        AnswerError: it was cut off, filtered, refused or broken off, or is a call of a tool.
    """
    reason = response.finish_reason
    if reason == "length" and not allow_cut:
        raise AnswerError(_cut_off(response, text), kind="cut off")
    if reason == "content_filter":
        raise AnswerError(
            f"the provider's content filter stopped the answer{_quoted(text)}: {_OTHERWISE}", kind="filtered"
        )
    if reason == "refusal":
        raise _refused(response, text)
    if reason == "error":
        raise AnswerError(
            f"the provider broke the answer off with an error{_quoted(text)}", kind="broken off"
        )
    if reason == "tool_calls" and not spoken(text):
        raise AnswerError("the model called a tool instead of answering", kind="called a tool")


def of_the_answer(response: PromptResponse, error: Exception) -> Exception:
    """Return what a failure is for its row: of a plugin that raises a refusal, the same as of all others."""
    if response.error is not error or response.finish_reason != "refusal":
        return error
    refused = _refused(response, str(error))
    refused.__cause__ = error
    return refused


def _refused(response: PromptResponse, text: str) -> AnswerError:
    words = refusal_words(response) or text
    return AnswerError(f"the model refused to answer{_quoted(words)}: {_OTHERWISE}", kind="refused")


_OTHERWISE = "change the prompt or the row, or choose another model"


def _cut_off(response: PromptResponse, text: str) -> str:
    """Say where an answer was cut off, and what allows for more."""
    name = _limit_name(response.model)
    limit = getattr(response.prompt.options, name, None) if name is not None else None
    tokens = limit if isinstance(limit, int) else response.output_tokens
    said = f"the answer was cut off at {shown_tokens(tokens)}"
    if not spoken(text):
        said += " before it began (reasoning uses them too)"
    if name is None:
        return f"{said}, and the model has no option for more: ask for a shorter one"
    if limit is None:
        return f"{said}: allow more with --option {name} N, or ask for a shorter one"
    return f"{said}: raise it with --option {name} N"


def shown_tokens(tokens: Any) -> str:
    """Return a number of tokens for people; where it is not known, that there is a limit."""
    if not isinstance(tokens, int) or tokens <= 0:
        return "the limit of tokens"
    return f"{tokens:,} token{'s' if tokens != 1 else ''}"


def _limit_name(model: Any) -> str | None:
    """Return what this model calls the number of tokens that an answer may have."""
    names = getattr(getattr(model, "Options", None), "model_fields", {})
    known = [name for name in _LIMIT_NAMES if name in names]
    return next(iter(known + [name for name in names if _LIMIT_LIKE.fullmatch(name)]), None)


def _quoted(text: str) -> str:
    said = spoken(text)
    return f" ({beginning(said)})" if said else ""


def beginning(text: str, length: int = 80) -> str:
    """Return the beginning of an answer for an error message, on one line and in quotation marks."""
    flat = " ".join(text[: 4 * length].split())
    return repr(flat if len(flat) <= length and len(text) <= 4 * length else flat[:length] + "...")
