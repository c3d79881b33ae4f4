"""What a person sees while a job runs: a bar on a terminal, lines of text anywhere else."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tqdm import tqdm

from datasette_llm.secrecy import redacted

from .stopped import clock_time
from .words import counted, dollars, duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .report import EnrichProgress

# With fewer columns than this the bar itself has no room beside the numbers.
NARROW_COLUMNS = 70
# The same beside a sentence.
ROOMY_COLUMNS = 100
# Lines in a log: often enough to see that it lives, seldom enough to leave the log readable.
LINE_SECONDS = 10.0
LATER_LINE_SECONDS = 60.0


class Display(Protocol):
    """Shows the progress of one job."""

    def update(self, progress: EnrichProgress) -> None:
        """Show how far the job is."""

    def note(self, text: str) -> None:
        """Show a sentence, without disturbing the rest."""

    def close(self) -> None:
        """Leave the terminal as it was."""


@contextmanager
def warnings_through(display: Display) -> Iterator[None]:
    """Have this package's warnings shown as notes, which leave a bar whole."""
    handler = _Notes(display)
    logger = logging.getLogger("datasette_llm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._display.note(redacted(record.getMessage()))
        except Exception:
            self.handleError(record)


def open_display(*, quiet: bool, stream: TextIO | None = None) -> Display:
    """Return the display that fits where stderr goes."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Silence(stream)
    return Bar(stream) if stream.isatty() else Lines(stream)


class Silence:
    """Shows notes only: somebody who presses Ctrl-C gets an answer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, progress: EnrichProgress) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class Lines(Silence):
    """A line of text every so often, for pipes and logs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._next = LINE_SECONDS
        self._waits = False

    def update(self, progress: EnrichProgress) -> None:
        waits = progress.quota_seconds is not None
        if waits and not self._waits:
            self._next = 0.0  # Said at once, or a log would look as if it had stopped.
        self._waits = waits
        if progress.elapsed >= self._next:
            self._next = progress.elapsed + (LINE_SECONDS if progress.elapsed < 60 else LATER_LINE_SECONDS)
            self.note(line(progress))


class _Tqdm(tqdm):  # type: ignore[type-arg]
    # No thread that watches for a stalled bar: the job reports often enough by itself.
    monitor_interval = 0


class Bar:
    """tqdm's progress bar; in a narrow terminal the same without the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None

    def update(self, progress: EnrichProgress) -> None:
        if self._bar is None:
            # The smallest delay: nothing is drawn before the first numbers are there. No smoothing: the time
            # left is told from all of the run, and does not jump when a cooldown ends.
            self._bar = _Tqdm(file=self._stream, unit=" rows", mininterval=0, smoothing=0, delay=1e-9)
        bar = self._bar
        columns = shutil.get_terminal_size().columns
        bar.ncols = columns - 1  # A line that fills the last column would wrap.
        bar.bar_format = _format(progress, columns)
        bar.total = progress.total
        bar.set_postfix_str(_counts(progress, columns), refresh=False)
        bar.update(progress.done - bar.n)
        bar.refresh()

    def note(self, text: str) -> None:
        _Tqdm.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _format(progress: EnrichProgress, columns: int) -> str:
    if progress.total is None:
        return (
            "{n_fmt} rows, {rate_fmt}{postfix}"
            if columns < NARROW_COLUMNS
            else ("{n_fmt} rows (still counting) [{elapsed}, {rate_fmt}{postfix}]")
        )
    narrow = columns < NARROW_COLUMNS
    if progress.stalled and progress.waiting:
        # Why nothing goes on is what counts, and is not to be cut off behind the rate of before.
        why = progress.waiting.replace("{", "{{").replace("}", "}}")
        if columns < ROOMY_COLUMNS:
            return "{percentage:.0f}% {n_fmt}/{total_fmt} " + why + "{postfix}"
        return "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [" + why + "{postfix}]"
    # tqdm knows the time as well, and a question mark before the first row.
    left = "{remaining} left" if progress.seconds_left is not None or not progress.done else ""
    if progress.is_tail:
        left = _tail(progress, narrow)
    if narrow:
        return "{percentage:.0f}% {n_fmt}/{total_fmt} " + left + "{postfix}"
    return "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [" + (left and f"{left}, ") + "{rate_fmt}{postfix}]"


def _tail(progress: EnrichProgress, narrow: bool = False) -> str:
    """Say how many rows are left, and how long the first of them has been out."""
    assert progress.total is not None
    assert progress.oldest_seconds is not None
    out = duration(progress.oldest_seconds)
    left = counted(progress.total - progress.done, "row")
    return f"{out} out" if narrow else f"{left} left, the oldest asked {out} ago"


def _counts(progress: EnrichProgress, columns: int) -> str:
    narrow = columns < NARROW_COLUMNS
    parts = _quota(progress)
    in_front = progress.stalled and progress.total is not None
    if progress.waiting and not in_front:
        parts.append(f"waiting: {progress.waiting}")
    if progress.stopping:
        parts.append("stopping")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if narrow or in_front:
        return ", ".join(parts)
    if progress.skipped:
        parts.append(f"{progress.skipped:,} skipped")
    if progress.retries:
        parts.append(counted(progress.retries, "retry", "retries"))
    tokens = progress.input_tokens + progress.output_tokens
    if tokens:
        parts.append("1 token" if tokens == 1 else f"{_short(tokens)} tokens")
    if progress.cost is not None:
        parts.append(dollars(progress.cost))
    return ", ".join(parts)


def _short(number: int) -> str:
    for limit, sign in ((1_000_000_000, "G"), (1_000_000, "M"), (10_000, "k")):
        if number >= limit:
            return f"{number / (1_000 if sign == 'k' else limit):.1f}{sign}"
    return f"{number:,}"


def _quota(progress: EnrichProgress) -> list[str]:
    if progress.quota_seconds is None:
        return []
    return [f"quota used up, waiting until {clock_time(progress.quota_seconds)}"]


def line(progress: EnrichProgress) -> str:
    """Return one line of text about a job."""
    rate = progress.rows_per_second
    parts = [
        counted(progress.done, "row")
        if progress.total is None
        else f"{progress.done:,}/{counted(progress.total, 'row')}"
    ]
    parts.append(f"{rate:,.1f} rows/s")
    if progress.is_tail and not progress.stalled:
        parts.append(_tail(progress))
    elif progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if progress.waiting:
        parts.append(f"waiting: {progress.waiting}")
    parts += _quota(progress)
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.skipped:
        parts.append(f"{progress.skipped:,} skipped")
    if progress.retries:
        parts.append(counted(progress.retries, "retry", "retries"))
    if progress.input_tokens + progress.output_tokens:
        parts.append(counted(progress.input_tokens + progress.output_tokens, "token"))
    if progress.cost is not None:
        parts.append(dollars(progress.cost))
    return ", ".join(parts)
