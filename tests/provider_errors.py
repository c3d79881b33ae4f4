"""What providers really answer when they refuse, as the exceptions of the SDKs that tests need not import."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import llm
import openai

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def openai_error(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Exception:
    """What the OpenAI client raises: for OpenAI itself, Groq, OpenRouter, DeepSeek, xAI, litellm."""
    request = httpx2.Request("POST", "http://provider.invalid/")
    response = httpx2.Response(status, headers=headers, request=request, json=body)
    return _openai_client()._make_status_error_from_response(response)


@functools.cache
def _openai_client() -> openai.OpenAI:
    return openai.OpenAI(api_key="sk-x", base_url="http://provider.invalid")


class AnthropicError(Exception):
    """As the Anthropic client's: the whole answer in ``body``."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
        super().__init__(f"Error code: {status} - {self.body}")
        self.status_code = status
        self.response = httpx.Response(status, json=self.body)


class OllamaError(Exception):
    """As the ollama client's ``ResponseError``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (status code: {status})")
        self.error, self.status_code = message, status


def http_error(status: int, body: Any, *, read: bool = True) -> Exception:
    """What plugins without an SDK raise, llm-mistral for one."""
    request = httpx.Request("POST", "http://provider.invalid/")
    response = httpx.Response(status, request=request, json=body)
    if not read:

        async def chunks() -> AsyncGenerator[bytes, None]:
            yield json.dumps(body).encode()

        response = httpx.Response(status, request=request, content=chunks())
    return httpx.HTTPStatusError(f"Client error '{status}'", request=request, response=response)


def error(message: str, code: Any = None, kind: str | None = None, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


NO_QUOTA = "You exceeded your current quota, please check your plan and billing details."

HOPELESS: dict[str, tuple[Exception, str]] = {
    "openai key": (
        openai_error(401, error("Incorrect API key provided: sk-x.", "invalid_api_key")),
        "key",
    ),
    "openai money": (openai_error(429, error(NO_QUOTA, "insufficient_quota", "insufficient_quota")), "money"),
    "openai billing": (
        openai_error(429, error("Not active.", "billing_not_active")),
        "money",
    ),
    "openai model": (
        openai_error(404, error("The model `x` does not exist.", "model_not_found")),
        "model",
    ),
    "openai project": (
        openai_error(403, error("Project `p` does not have access to model `m`", "model_not_found")),
        "model",
    ),
    "openai country": (
        openai_error(403, error("Country, region, or territory not supported")),
        "key",
    ),
    "openai requests per day": (
        openai_error(
            429,
            error(
                "Rate limit reached for m on requests per day (RPD): Limit 200, Used 200. "
                "Please try again in 7m12s.",
                "rate_limit_exceeded",
            ),
        ),
        "quota",
    ),
    "openai retry-after": (openai_error(429, error("Slow down"), {"retry-after": "3600"}), "quota"),
    "anthropic key": (AnthropicError(401, "authentication_error", "invalid x-api-key"), "key"),
    "anthropic money": (
        AnthropicError(400, "invalid_request_error", "Your credit balance is too low to access it."),
        "money",
    ),
    "anthropic model": (AnthropicError(404, "not_found_error", "model: claude-0"), "model"),
    "anthropic limit": (
        AnthropicError(
            400,
            "invalid_request_error",
            "You have reached your specified API usage limits. "
            "You will regain access on 2999-01-01 at 00:00 UTC.",
        ),
        "quota",
    ),
    "gemini key": (llm.ModelError("API key not valid. Please pass a valid API key."), "key"),
    "gemini key, body": (
        http_error(
            400,
            [
                {
                    "error": {
                        "code": 400,
                        "message": "bad",
                        "status": "INVALID_ARGUMENT",
                        "details": [{"reason": "API_KEY_INVALID"}],
                    }
                }
            ],
        ),
        "key",
    ),
    "gemini leaked": (llm.ModelError("Your API key was reported as leaked. Use another API key."), "key"),
    "gemini model": (
        llm.ModelError("models/x is not found for API version v1beta, or is not supported."),
        "model",
    ),
    "gemini day": (llm.ModelError(f"{NO_QUOTA} Please retry in 51234.5s."), "quota"),
    "gemini day, no time": (
        llm.ModelError("Quota exceeded for 'Gemini 2.5 Pro Requests per day per user per tier'"),
        "quota",
    ),
    "mistral key": (http_error(401, {"message": "Unauthorized"}), "key"),
    "mistral key, unread": (http_error(401, {"message": "Unauthorized"}, read=False), "key"),
    "mistral model": (
        http_error(400, {"object": "error", "message": "Invalid model: x", "type": "invalid_model"}),
        "model",
    ),
    "groq key": (openai_error(401, error("Invalid API Key", "invalid_api_key")), "key"),
    "groq tokens per day": (
        openai_error(
            429,
            error(
                "Rate limit reached for model `m` on tokens per day (TPD): Limit 100000. "
                "Please try again in 8m38.4s.",
                "rate_limit_exceeded",
                "tokens",
            ),
        ),
        "quota",
    ),
    "groq model gone": (
        openai_error(400, error("It is gone", "model_decommissioned")),
        "model",
    ),
    "openrouter money": (openai_error(402, error("Insufficient credits. Add more", 402)), "money"),
    "openrouter model": (openai_error(404, error("No endpoints found for x/y.", 404)), "model"),
    "openrouter id": (openai_error(400, error("x is not a valid model ID", 400)), "model"),
    "openrouter free": (
        openai_error(429, error("Rate limit exceeded: free-models-per-day. Add 10 credits", 429)),
        "quota",
    ),
    "xai money": (
        openai_error(
            403,
            {
                "code": "The caller does not have permission",
                "error": "Your team has either used all available credits or reached its limit.",
            },
        ),
        "money",
    ),
    "deepseek money": (openai_error(402, error("Insufficient Balance", "invalid_request_error")), "money"),
    "ollama model": (OllamaError(404, 'model "x" not found, try pulling it first'), "model"),
    "litellm key": (openai_error(400, error("No connected db.", "400", "no_db_connection")), "key"),
    "litellm model": (
        openai_error(400, error("Invalid model name passed in model=x. Call `/v1/models`", "400")),
        "model",
    ),
    "litellm budget": (
        openai_error(
            400,
            error("Budget has been exceeded! Current cost: 1", "400", "budget_exceeded"),
        ),
        "money",
    ),
    "litellm money behind it": (
        openai_error(429, error(f"OpenAIException - {NO_QUOTA}", "429", "insufficient_quota")),
        "money",
    ),
    "no key": (llm.NeedsKeyException("No key found"), "key"),
}

OTHERS: dict[str, tuple[Exception, str]] = {
    "throttled": (openai_error(429, error("Rate limit reached", "rate_limit_exceeded")), "throttled"),
    "throttled, shortly": (openai_error(429, error("Rate limit reached for m on tokens per min (TPM). "
                                                   "Please try again in 1.2s.")), "throttled"),
    "a day's quota that is back soon": (
        openai_error(429, error("on requests per day (RPD). Please try again in 9s.")),
        "throttled",
    ),
    "gemini minute": (llm.ModelError(f"{NO_QUOTA} Please retry in 34.07s."), "throttled"),
    "gemini burst": (llm.ModelError("Resource has been exhausted (e.g. check quota)."), "throttled"),
    "mistral busy": (http_error(429, {"message": "Service tier capacity exceeded"}), "throttled"),
    "maintenance": (openai_error(503, error("Later"), {"retry-after": "3600"}), "throttled"),
    "content": (openai_error(400, error("The response was filtered", "content_filter")), "permanent"),
    "length": (
        openai_error(400, error("maximum context length is 8192 tokens", "context_length_exceeded")),
        "permanent",
    ),
    "moderation": (
        openai_error(403, error("x/y requires moderation on z. Your input was flagged for: violence", 403)),
        "permanent",
    ),
    "forbidden": (openai_error(403, error("Forbidden")), "permanent"),
    "wrong url": (openai_error(404, {"detail": "Not Found"}), "permanent"),
    "bad request": (openai_error(400, error("Unknown parameter: 'foo'", "unknown_parameter")), "permanent"),
    "their fault": (openai_error(500, error("no such model loaded yet")), "transient"),
    "a model's own words": (ValueError("invalid api key"), "permanent"),
}  # fmt: skip
