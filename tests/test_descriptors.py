"""Connections fit the files that a process may have open."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from datasette_llm.pace import descriptors
from datasette_llm.pace.descriptors import fitting, raise_limit
from datasette_llm.pace.policy import ConcurrencyBounds

if TYPE_CHECKING:
    from collections.abc import Iterator

resource = pytest.importorskip("resource", reason="Windows has no limit of descriptors")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for cached in (descriptors._room, descriptors._say):
        cached.cache_clear()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for cached in (descriptors._room, descriptors._say):
        cached.cache_clear()


def limited(soft: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_fits_is_left_alone() -> None:
    limited(1_024)
    assert fitting(20) == 20
    assert fitting(ConcurrencyBounds()) == ConcurrencyBounds()


def test_what_does_not_fit_is_cut_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(descriptors, "_open", lambda: 20)
    limited(256)
    assert fitting(400) == 256 - 20 - descriptors.RESERVED
    assert fitting(ConcurrencyBounds()) == ConcurrencyBounds(max=256 - 20 - descriptors.RESERVED)
    assert [record.getMessage() for record in caplog.records] == [
        (
            "At most 212 prompts are in flight at once: this process may have no more than 256 files open "
            "(ulimit -n), and each prompt has a connection"
        )
    ]


def test_something_is_in_flight_however_few_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_open", lambda: 60)
    limited(64)
    assert fitting(ConcurrencyBounds()) == ConcurrencyBounds(start=2, min=1, max=2)


def test_where_nothing_counts_what_is_open_as_much_as_usual_is_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", refuse)
    limited(256)
    assert fitting(400) == 256 - 2 * descriptors.RESERVED


def test_where_there_is_no_limit_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert fitting(100_000) == 100_000
    raise_limit()


def test_a_limit_that_the_system_refuses_is_tried_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def set_limit(_: int, limits: tuple[int, int]) -> None:
        tried.append(limits[0])
        if limits[0] < 0 or limits[0] > 4_096:
            raise ValueError("too high")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    raise_limit()
    assert tried[-2:] == [10_240, 4_096]
    monkeypatch.undo()


def test_the_soft_limit_is_raised_as_far_as_may_be() -> None:
    limited(128)
    raise_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard or soft >= 1_024
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
