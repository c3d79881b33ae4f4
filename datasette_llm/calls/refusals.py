"""Which failures no other prompt of the same model and key can escape: tables of what providers say.

A wrong key, no money, no such model, a quota that is used up. Status, code and words are looked for in
everything that an exception and its causes carry. The tables hold what OpenAI, Anthropic, Gemini, Mistral,
Groq, OpenRouter, xAI, DeepSeek, Ollama and litellm's proxy answer; another provider's answer is another
line in a table.
"""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: What is wrong: the key, the account's money, the model's name or the right to use it, the quota.
Reason = Literal["key", "money", "model", "quota"]

#: Statuses that say it by themselves. 403 and 404 may be about one request, or about a wrong URL.
_STATUSES: dict[int, Reason] = {401: "key", 402: "money"}

#: Where words count: with these statuses, or where there is none (a plugin passes on the words alone).
_STATUSES_WITH_WORDS = frozenset({None, 400, 401, 402, 403, 404, 410, 429})

#: Codes, types and statuses of error objects, in lower case.
_CODES: dict[str, Reason] = {
    "invalid_api_key": "key",  # OpenAI, Groq
    "account_deactivated": "key",
    "unsupported_country_region_territory": "key",
    "authentication_error": "key",  # Anthropic
    "invalid_authentication_error": "key",
    "api_key_invalid": "key",  # Gemini
    "unauthenticated": "key",
    "no_db_connection": "key",  # litellm, to a key that is not its master key
    "token_not_found_in_db": "key",
    "expired_key": "key",
    "organization_restricted": "key",  # Groq
    "insufficient_quota": "money",  # OpenAI: the account has no money left; waiting does not help
    "billing_not_active": "money",
    "billing_hard_limit_reached": "money",
    "billing_error": "money",  # Anthropic
    "budget_exceeded": "money",  # litellm
    "insufficient_balance": "money",
    "insufficient_credits": "money",
    "exceeded_current_quota_error": "money",
    "model_not_found": "model",  # OpenAI, Groq
    "model_not_available": "model",
    "model_decommissioned": "model",
    "model_terms_required": "model",
    "invalid_model": "model",  # Mistral
    "deploymentnotfound": "model",  # Azure
    "key_model_access_denied": "model",  # litellm
    "team_model_access_denied": "model",
}

#: Words, in lower case; the first that match decide.
_WORDS: tuple[tuple[re.Pattern[str], Reason], ...] = (
    (
        re.compile(
            r"credit balance is too low|insufficient (?:balance|credits?|funds)|out of credits"
            r"|used all available credits|monthly spending limit|requires more credits"
            r"|budget has been exceeded|exceededbudget|billing hard limit|payment required"
            r"|account is not active, please check your billing|'insufficient_quota'"
            # OpenAI's words, where a proxy has lost the code: Gemini uses them for any quota.
            r"|exceeded your current quota, please check your plan(?!.*(?:retry in|ai\.google))",
            re.DOTALL,
        ),
        "money",
    ),
    (
        re.compile(
            r"(?:incorrect|invalid) (?:api[- ]key|x-api-key|authentication)"
            r"|api key (?:not valid|expired|not found)"
            r"|no (?:auth credentials|api[- ]key|cookie auth)|reported as leaked|no connected db"
            r"|api has not been used in project .{1,80}or it is disabled|user location is not supported"
            r"|country, region,? or territory not supported|consumer .{1,80}has been suspended"
            r"|account (?:is|has been) (?:deactivated|suspended|disabled)|invalid subscription key"
        ),
        "key",
    ),
    (
        re.compile(
            r"model \S{1,100} (?:does not exist|not found|is not available|is not supported|was not found)"
            r"|invalid model\b|is not a valid model|no endpoints found|unknown model|no such model"
            r"|\S{1,100} is not found for api version|try pulling it first|not allowed to access model"
            r"|not have access to (?:the )?model|has been (?:decommissioned|retired|shut down)"
            r"|not_found_error.{1,40}model: |deployment .{1,60}does not exist"
        ),
        "model",
    ),
    (
        re.compile(
            r"\bper[- _]?(?:day|week|month)\b|perday|free-models-per-day|\((?:rpd|tpd)\)"
            r"|\b(?:daily|weekly|monthly) (?:\S{1,40} )?(?:quota|limit|budget)"
            r"|reached your specified api usage limits"
        ),
        "quota",
    ),
)

#: What is about one request, whatever else is said: its content, its length.
_ABOUT_ONE = re.compile(
    r"content[_ ]?(?:filter|policy)|content management policy|moderation|flagged|safety|context[_ ]length"
    r"|maximum context|too (?:long|large|many tokens)|string_above_max_length|invalid_prompt"
)

_WAIT = re.compile(r"(?:re)?try (?:again )?(?:in|after) ((?:\d+(?:\.\d+)? ?(?:ms|milli|s|m|h|d)[a-z]* ?)+)")
_PART = re.compile(r"(\d+(?:\.\d+)?) ?(ms|milli|s|m|h|d)")
_UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_ACCESS_FROM = re.compile(r"regain access on (\d{4}-\d\d-\d\d) at (\d\d:\d\d) utc")

#: So much of an error's text is looked at.
_CHARACTERS = 4_000


def recognise(errors: Iterable[BaseException], status: int | None) -> Reason | None:
    """Say what no other prompt can escape, if that is what a failed call was told.

    Args:
        errors: the exception and its causes.
        status: the HTTP status of the answer, if there was one.
    """
    errors = list(errors)
    for code in _codes(errors):
        if code in _CODES:
            return _CODES[code]
    if status not in _STATUSES_WITH_WORDS:
        return None
    text = text_of(errors)
    # What is said for 401 and 402 concerns everybody.
    if status not in _STATUSES and _ABOUT_ONE.search(text):
        return None
    for words, reason in _WORDS:
        if words.search(text):
            return reason
    return _STATUSES.get(status) if status is not None else None


def said(error: BaseException, status: int | None) -> str:
    """Return a provider's refusal in its own words, as short as they are: "402 Insufficient credits"."""
    words = str(error)
    for part in _error_objects(_body(error)):
        message = part.get("message") or part.get("detail") or part.get("error")
        if isinstance(message, str):
            words = message
    words = " ".join(words.split())
    return words if status is None or str(status) in words else f"{status} {words}"


def is_about_one_request(errors: Iterable[BaseException]) -> bool:
    """Whether a refusal names a request's own content or length as its cause."""
    return _ABOUT_ONE.search(text_of(errors)) is not None


def wait_in_words(text: str) -> float | None:
    """Return the seconds that "please retry in 34.5s", "try again in 8m38s" and the like ask to wait."""
    text = text.lower()
    found = _WAIT.search(text)
    if found is not None:
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(found.group(1)))
    found = _ACCESS_FROM.search(text)
    if found is not None:
        moment = datetime.datetime.fromisoformat(f"{found.group(1)}T{found.group(2)}+00:00")
        return max(0.0, (moment - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    return None


def text_of(errors: Iterable[BaseException]) -> str:
    """Return what exceptions and the answers they carry say, in lower case."""
    parts = []
    for error in errors:
        parts.append(str(error)[:_CHARACTERS])
        body = _body(error)
        if body is not None:
            parts.append(str(body)[:_CHARACTERS])
    return "\n".join(parts).lower()


def _codes(errors: Iterable[BaseException]) -> Iterator[str]:
    for error in errors:
        for holder in (error, *_error_objects(_body(error))):
            for name in ("code", "type", "status", "reason"):
                value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
                if isinstance(value, str):
                    yield value.lower()


def _error_objects(body: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in which a provider's answer may name its error."""
    if isinstance(body, list) and body:
        body = body[0]  # Gemini's, when it was asked for a stream
    if not isinstance(body, dict):
        return
    yield body
    inner = body.get("error")
    if isinstance(inner, dict):
        yield from _error_objects(inner)
    details = body.get("details")
    if isinstance(details, list):
        yield from (detail for detail in details if isinstance(detail, dict))


def _body(error: BaseException) -> Any:
    """Return the answer that an SDK's exception carries: its JSON as data, or its text."""
    body = getattr(error, "body", None)
    if body is None:
        response = getattr(error, "response", None)
        try:
            body = getattr(response, "text", None)
        except Exception:  # httpx: a streamed answer that nobody has read
            return None
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        try:
            return json.loads(body)
        except ValueError:
            return body
    return body
