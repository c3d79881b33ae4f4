"""Which API keys are in use, and texts without them.

Providers quote the key they refuse, whole or shortened, and whoever prints or stores their error repeats it.
So what leaves this package as text goes through `redacted()`: log records (by a filter on the loggers), what
the command prints, what is stored in a table, what a page shows. The exceptions that plugins get are the
provider's own objects, unchanged.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections import OrderedDict
from functools import lru_cache
from threading import Lock
from urllib.parse import quote

#: Keys that are remembered; beyond that, the one that was used longest ago is forgotten.
MOST_KEYS = 256

#: What stands for a key, or for what is left of it.
REDACTED = "***"

# Shorter ones are no secrets, but a word that stands for "no key".
_SHORTEST = 4
# So many characters of a key in a row are part of it, not a coincidence.
_WINDOW = 8
# From this length on, the first or last few characters of a key, as a word, are taken for a part of it.
_LONG = 16

_keys: OrderedDict[str, None] = OrderedDict()
_windows: set[str] | None = None
_lock = Lock()


def keep_secret(key: object) -> None:
    """Remember a key that is in use, so that no text of ours shows it.

    Args:
        key: a key; what is no text, or too short to be one, is passed over.
    """
    global _windows
    if not isinstance(key, str) or len(key) < _SHORTEST:
        return
    with _lock:
        if key in _keys:
            _keys.move_to_end(key)
            return
        _keys[key] = None
        if len(_keys) > MOST_KEYS:
            _keys.popitem(last=False)
        _windows = None


def redacted(text: str) -> str:
    """Return a text without the keys in use, neither whole nor shortened as providers do it.

    Shortened means: the first characters, the last ones, or both around dots or stars, or any eight in a row.
    """
    if not _keys or not text:
        return text
    with _lock:
        keys, windows = list(_keys), _all_windows()
    for key in keys:
        if len(key) >= _WINDOW:
            for spelling in _spellings(key):
                text = text.replace(spelling, REDACTED)
    text = _without_windows(text, windows)
    for key in keys:
        text = _pattern(key).sub(REDACTED, text)
    return text


def _all_windows() -> set[str]:
    global _windows
    if _windows is None:
        _windows = {
            form[start : start + _WINDOW]
            for key in _keys
            for form in _spellings(key)
            for start in range(len(form) - _WINDOW + 1)
            if _is_no_word(form[start : start + _WINDOW])
        }
    return _windows


def _is_no_word(piece: str) -> bool:
    """Whether a piece of a key can't be taken for a word: those of ``sk-no-key-required`` can."""
    mixed = piece.lower() != piece and piece.upper() != piece
    return not any(map(str.isspace, piece)) and (mixed or any(map(str.isdigit, piece)))


def _without_windows(text: str, windows: set[str]) -> str:
    """Replace each stretch of the text that is made of windows of a key."""
    pieces: list[str] = []
    kept = start = 0
    last = len(text) - _WINDOW
    while start <= last:
        if text[start : start + _WINDOW] not in windows:
            start += 1
            continue
        pieces += [text[kept:start], REDACTED]
        while start <= last and text[start : start + _WINDOW] in windows:
            start += 1
        kept = start = start + _WINDOW - 1
    if not pieces:
        return text
    return "".join([*pieces, text[kept:]])


@lru_cache(maxsize=MOST_KEYS)
def _spellings(key: str) -> set[str]:
    """How a key is written: as it is, in a URL, in JSON, in a ``repr()``."""
    return {key, quote(key, safe=""), quote(key), json.dumps(key)[1:-1], repr(key)[1:-1]}


_MASK = r"(?:[*.•·…#_xX-]|\\u2026|\[[^\]\s]{0,12}\]|<[^>\s]{0,12}>)"


@lru_cache(maxsize=MOST_KEYS)
def _pattern(key: str) -> re.Pattern[str]:
    """What of a key the windows do not find: a short one, and the ends around a mask."""
    first = _any_of(key[:length] for length in range(min(len(key) - 1, _WINDOW), 1, -1))
    last = _any_of(key[-length:] for length in range(min(len(key) - 1, _WINDOW), 1, -1))
    before, after = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
    mask = rf"(?:{_MASK}{{2,}}|…)"
    forms = [
        rf"{before}{_any_of(_spellings(key))}{after}",
        rf"{before}{first}{mask}{last}{after}",
        rf"{mask}{last}{after}",
        rf"{before}{first}{mask}",
    ]
    if len(key) >= _LONG:
        ends = [key[:length] for length in range(_WINDOW, 5, -1)]
        ends += [key[-length:] for length in range(_WINDOW, 3, -1)]
        if ends := [end for end in ends if _is_no_word(end)]:
            forms.append(rf"{before}{_any_of(ends)}{after}")
    return re.compile("|".join(forms))


def _any_of(texts: object) -> str:
    return "(?:" + "|".join(map(re.escape, texts)) + ")"  # type: ignore[call-overload]


class _Redact(logging.Filter):
    """Takes keys out of what is logged, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not _keys:
            return True
        try:
            message = record.getMessage()
        except Exception:  # logging itself will say what is wrong with it
            return True
        clean = redacted(message)
        if clean != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[1] is not None:
            told = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            clean = redacted(told)
            if clean != told:
                # Formatters print this text; handlers that look at the exception itself find none.
                record.exc_text, record.exc_info = clean, None
        return True


# httpx logs the address of each request, and some providers take their key in it.
for _name in ("datasette_llm", "httpx"):
    logging.getLogger(_name).addFilter(_Redact())
