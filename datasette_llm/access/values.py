"""The kinds of values a configuration has, and what is said of one that is not of its kind.

Text from ``$env`` counts as the number or the truth it spells. What is said of a value never shows it: any of
them may be a secret.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

# A provider's key pasted where the name of a secret belongs would end up on the page of secrets.
LOOKS_LIKE_A_KEY = re.compile(r"(sk|pk|gsk|hf|r8)[-_][A-Za-z0-9_-]{16,}|AIza|xai-|Bearer ")
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


def problem(message: str) -> PydanticCustomError:
    """Return a mistake that is described in these words."""
    # Braces would be read as placeholders of a template.
    return PydanticCustomError("datasette_llm", "{message}", {"message": message})


def _number(value: Any) -> Any:
    """Let numbers through, and their text (``$env`` gives text); true and false are no numbers."""
    if isinstance(value, bool):
        raise problem("must be a number, not true or false")
    return value


def _truth(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise problem(f"must be true or false, not {kind_of(value)}")
    return value


def text(value: Any) -> Any:
    """Let text through that says something."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise problem("must be text, not a number: put it in quotes")
    if isinstance(value, str) and not value.strip():
        raise problem("must not be empty")
    return value


def _secret_name(value: Any) -> Any:
    if isinstance(value, str) and (LOOKS_LIKE_A_KEY.match(value) or not SECRET_NAME.fullmatch(value)):
        raise problem("must be the name of a secret, such as MY_OPENAI_KEY, not the key itself")
    return value


Whole = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Dollars = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Money = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Truth = Annotated[bool, BeforeValidator(_truth)]
Text = Annotated[str, BeforeValidator(text)]
SecretName = Annotated[str, BeforeValidator(_secret_name), BeforeValidator(text)]


def kind_of(value: Any) -> str:
    """Say what kind of value stands in the configuration, without the value."""
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "nothing"),
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "a mapping"),
)
