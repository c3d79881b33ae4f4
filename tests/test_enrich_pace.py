"""A job leaves room for the rest of the process: spread rows, few transactions, short collections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.enrich import JobSpec
from datasette_llm.enrich.job import EnrichJob
from datasette_llm.enrich.spacing import FEW_GAP_SECONDS, FEW_PROMPTS, FIRST_GAP_SECONDS, Spacing

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from pathlib import Path


def sent_at(spacing: Spacing, asked: list[float], limit: int) -> list[float]:
    return [at + spacing.wait(at, limit) for at in asked]


def test_the_first_prompts_do_not_leave_all_at_once() -> None:
    sent = sent_at(Spacing(), [5.0] * 100, limit=100)
    few = [5 + n * FEW_GAP_SECONDS for n in range(FEW_PROMPTS)]
    assert sent[:FEW_PROMPTS] == pytest.approx(few)
    later = [few[-1] + n * FIRST_GAP_SECONDS for n in range(1, 100 - FEW_PROMPTS + 1)]
    assert sent[FEW_PROMPTS:] == pytest.approx(later)


def test_a_burst_is_spread_over_nearly_the_time_an_answer_takes() -> None:
    spacing = Spacing()
    spacing.answered(2.0)
    assert sent_at(spacing, [10.0] * 101, limit=100)[-1] == pytest.approx(10 + 0.9 * 2.0)


def test_while_the_limit_grows_more_is_sent_than_it_allows() -> None:
    spacing = Spacing()
    spacing.answered(1.0)
    spacing.wait(0.0, 100)
    assert sent_at(spacing, [10.0] * 3, limit=200) == pytest.approx([10, 10.0025, 10.005])


def test_a_limit_that_has_not_grown_for_two_answers_is_found() -> None:
    spacing = Spacing()
    spacing.answered(1.0)
    spacing.wait(0.0, 100)
    spacing.wait(10.0, 200)
    assert sent_at(spacing, [12.5] * 3, limit=200) == pytest.approx([12.5, 12.5045, 12.509])


def test_prompts_that_come_evenly_do_not_wait() -> None:
    spacing = Spacing()
    spacing.answered(2.0)
    asked = [n * 2.0 / 100 for n in range(300)]
    assert sent_at(spacing, asked, limit=100) == asked


def test_what_was_missed_is_not_made_up_for() -> None:
    spacing = Spacing()
    spacing.answered(1.0)
    assert spacing.wait(0.0, 100) == 0
    sent = sent_at(spacing, [60.0] * 3, limit=100)
    assert sent == pytest.approx([60, 60.009, 60.018])


def test_a_model_that_answers_at_once_is_not_waited_for() -> None:
    spacing = Spacing()
    spacing.answered(0.001)
    spacing.wait(0.0, 20)
    assert sent_at(spacing, [1.0] * 20, limit=20) == [1.0] * 20


def test_the_average_follows_a_provider_that_becomes_slow() -> None:
    spacing = Spacing()
    spacing.answered(0.1)
    for _ in range(200):
        spacing.answered(1.0)
    spacing.wait(0.0, 100)
    assert spacing.wait(0.0, 100) == pytest.approx(0.009, rel=0.01)


def test_a_provider_that_was_slow_and_is_fast_again_is_soon_asked_faster() -> None:
    spacing = Spacing()
    spacing.answered(600.0)
    assert sent_at(spacing, [0.0] * 101, limit=4)[-1] == pytest.approx(2)


@pytest.mark.real_clock
async def test_answers_that_trickle_in_share_a_transaction(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (id integer primary key, body)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(100)])
    transactions: list[int] = []

    async def answer(prompt: str) -> Any:
        await anyio.sleep(0.002 * (int(prompt.split()[1]) % 50))
        yield "answer"

    spec = JobSpec(
        database="data", table="t", prompt="{{ body }}", column="answer", model="fake", concurrency=50
    )
    with fake_model(answer):
        job = EnrichJob(
            file.datasette(), spec, on_settled=lambda done: transactions.append(len(done.written))
        )
        report = await job.run()
    assert (report.written, sum(transactions)) == (100, 100)
    # Never more than a transaction each quarter of a second, or per fifty rows.
    assert len(transactions) <= 2 + 4 * report.elapsed
    file.close()
