"""Finding the JSON objects in an answer: in a fence, after prose, in a list, under a key of a wrapper.

The text is read once, however many braces are in it. What begins like an object and turns out not to be
one is passed over as far as it could be read, and nothing inside of it is taken for an answer: a part of
a broken object is not what was asked for.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# More things that begin like an object than this, and the text is not read further: each one that is none
# costs an exception that has counted the lines before it.
MOST_OBJECTS = 200

_BEGINNING = re.compile(r'\{\s*["}]')
_DECODER = json.JSONDecoder()


class NotJSON(ValueError):
    """There is no JSON object in a text, or too many things that look like one."""


def whole(text: str) -> Any:
    """Return the value that a text is.

    Raises:
        NotJSON: the text is not JSON from its beginning to its end.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotJSON(str(error)) from None


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost objects in a text that has other things in it.

    Raises:
        NotJSON: there are more than anybody can mean.
    """
    position = 0
    for _ in range(MOST_OBJECTS):
        beginning = _BEGINNING.search(text, position)
        if beginning is None:
            return
        try:
            found, position = _DECODER.raw_decode(text, beginning.start())
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                return  # It would have ended at the next quotation mark: there is none.
            position = max(error.pos, beginning.start() + 1)
        except (ValueError, RecursionError):
            return  # Thousands of digits, or of braces: nobody's answer, and no saying how far it goes.
        else:
            yield found
    raise NotJSON(f"more than {MOST_OBJECTS} things in it look like JSON")


def inside(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects that are the values of an object, or elements of a list, one level down."""
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict):
            yield inner
        elif isinstance(inner, list) and isinstance(value, dict):
            yield from (element for element in inner if isinstance(element, dict))
