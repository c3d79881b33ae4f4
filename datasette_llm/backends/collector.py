"""Keeps Python's garbage collector away from what was there before much is done at once.

A hundred prompts in flight keep so many young objects alive that the collector goes over everything
in the process every few seconds: with Datasette and llm loaded that is 130 milliseconds in which no
page is answered (measured: four times in 13 seconds, for 3,000 rows). Where Dask is loaded too it was
40 % of the CPU of a process that has its prompts answered by workers (409 to 240 us a prompt).
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# CPython 3.12 begins with 375 of its own.
FROZEN_BY_PYTHON = 1_000

# Event loops of several threads may have blocks.
_lock = threading.Lock()

# What was made just after the block that is open froze the older objects. To count those means to go over all
# of them, which takes as long as a collection; this tells without.
_witness: list[None] | None = None

# Once for the process, for the same reason.
_frozen_by_others = False


@contextmanager
def spare_older_objects() -> Iterator[None]:
    """Leave out of garbage collections, while inside, what exists at the beginning.

    Reference counts free objects as always; cycles among the older ones wait for the end. Of blocks that
    overlap only the first one freezes, and ends it: freezing again would keep the garbage of every block
    until none is open, which in a busy server is never. A process that has frozen objects itself
    (``gc.freeze()``), before or meanwhile, is left as it is, from then on.
    """
    global _witness, _frozen_by_others
    with _lock:
        ours = _witness is None and not _frozen_by_others
        if ours and gc.get_freeze_count() > FROZEN_BY_PYTHON:
            ours, _frozen_by_others = False, True
        if ours:
            gc.freeze()
            _witness = []
    try:
        yield
    finally:
        if ours:
            with _lock:
                witness, _witness = _witness, None
                # What is frozen is not listed.
                _frozen_by_others = not any(found is witness for found in gc.get_objects())
                if not _frozen_by_others:
                    gc.unfreeze()
