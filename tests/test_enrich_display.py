"""What a person sees while a job runs, wide and narrow, on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import os

import pytest

from datasette_llm.enrich.telling.display import Bar, Lines, Silence, line, open_display, warnings_through
from datasette_llm.enrich.telling.report import EnrichProgress
from datasette_llm.enrich.telling.weather import Unanswered
from datasette_llm.enrich.telling.words import duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_of(
    done: int, total: int | None = 10_000, *, failed: int = 0, retries: int = 0
) -> EnrichProgress:
    return EnrichProgress(
        total=total,
        done=done,
        elapsed=done / 100,
        failed=failed,
        retries=retries,
        input_tokens=30 * done,
    )


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 20])
def test_the_bar_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback=None: os.terminal_size((columns, 24)))
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    bar = open_display(quiet=False, stream=terminal)
    assert isinstance(bar, Bar)
    for done in (0, 5_000, 9_999):
        bar.update(progress_of(done, total=None if done == 0 else 10_000, failed=12, retries=34))
    bar.note("A sentence")
    bar.close()
    shown = terminal.getvalue()
    assert "A sentence" in shown
    assert "50%" in shown
    assert "9999/10000" in shown
    assert ("34 retries" in shown) == (columns >= 80)
    if columns >= 40:
        assert "12 failed" in shown
        assert max(len(part) for part in shown.replace("\n", "\r").split("\r")) <= columns


def test_lines_in_a_log_come_seldom() -> None:
    log = io.StringIO()
    lines = open_display(quiet=False, stream=log)
    assert isinstance(lines, Lines)
    for second in range(200):
        lines.update(progress_of(second * 100, total=20_000))
    lines.close()
    assert len(log.getvalue().splitlines()) == 8
    assert log.getvalue().splitlines()[0] == "1,000/20,000 rows, 100.0 rows/s, 3 min 10 s left, 30,000 tokens"


def test_a_line_says_what_there_is_to_say() -> None:
    assert line(EnrichProgress()) == "0 rows, 0.0 rows/s"
    assert line(progress_of(500, failed=2, retries=3)) == (
        "500/10,000 rows, 100.0 rows/s, 1 min 35 s left, 2 failed, 3 retries, 15,000 tokens"
    )


def test_the_last_rows_are_told_by_how_long_they_have_been_out(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = progress_of(9_997)
    progress.oldest_seconds = 3.0
    assert "0.0 s left" in line(progress)
    progress.oldest_seconds = 245.0
    assert line(progress).startswith(
        "9,997/10,000 rows, 100.0 rows/s, 3 rows left, the oldest asked 4 min 5 s ago"
    )
    for columns, shown in ((150, "3 rows left, the oldest asked 4 min 5 s ago"), (60, "4 min 5 s out")):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr("shutil.get_terminal_size", lambda fallback=None, size=size: size)
        terminal = Terminal()
        bar = Bar(terminal)
        bar.update(progress)
        bar.close()
        assert shown in terminal.getvalue()
        assert "00:00" not in terminal.getvalue()


def test_no_time_is_told_where_none_can_be_known() -> None:
    progress = progress_of(500)
    progress.stalled, progress.waiting = True, "no connection"
    assert line(progress) == "500/10,000 rows, 100.0 rows/s, waiting: no connection, 15,000 tokens"
    terminal = Terminal()
    bar = Bar(terminal)
    bar.update(progress)
    bar.close()
    assert "left" not in terminal.getvalue()


@pytest.mark.parametrize("columns", [80, 40])
def test_why_nothing_goes_on_is_not_cut_off(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback=None: os.terminal_size((columns, 24)))
    progress = progress_of(5_000, retries=21)
    progress.stalled, progress.oldest_seconds = True, 70.0
    progress.waiting = "no connection to 127.0.0.1:8204 since 22:50, next try in 13 s"
    if columns == 40:
        progress.waiting = "no answer for {}"
    terminal = Terminal()
    bar = Bar(terminal)
    bar.update(progress)
    bar.close()
    assert progress.waiting in terminal.getvalue()
    assert "asked" not in terminal.getvalue()


def test_silence_is_told_where_answers_came_before() -> None:
    silence = Unanswered()
    assert silence.look(0, 300.0) is None
    assert silence.look(40, 320.0) is None
    assert silence.look(40, 380.0) is None  # One every eight seconds: it may take a while.
    assert silence.look(40, 410.0) == "no answer for 1 min 30 s"
    assert silence.look(41, 411.0) is None


def test_quiet_shows_notes_only() -> None:
    stream = io.StringIO()
    silence = open_display(quiet=True, stream=stream)
    assert type(silence) is Silence
    silence.update(progress_of(5_000))
    silence.note("Stopping")
    silence.close()
    assert stream.getvalue() == "Stopping\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (7_500, "2 h 5 min"), (0, "0.0 s")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_warning_is_a_note_and_leaves_the_bar_whole() -> None:
    terminal = Terminal()
    bar = Bar(terminal)
    bar.update(progress_of(5_000))
    with warnings_through(bar):
        logging.getLogger("datasette_llm").warning("rate limit reached, no prompts for %.1f seconds", 12)
    logging.getLogger("datasette_llm").warning("not here")
    bar.close()
    # The line of the bar is cleared first.
    assert "\rrate limit reached, no prompts for 12.0 seconds\n" in terminal.getvalue()
    assert "not here" not in terminal.getvalue()


def test_money_is_shown_where_it_is_known() -> None:
    progress = progress_of(500)
    progress.cost = 1.5
    progress.waiting = "12 s for the provider"
    assert line(progress) == (
        "500/10,000 rows, 100.0 rows/s, 1 min 35 s left, waiting: 12 s for the provider, 15,000 tokens, $1.50"
    )
