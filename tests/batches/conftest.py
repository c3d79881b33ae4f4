"""A provider of batches that takes an hour for each, and a job that asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.batch_provider import BatchProvider, Settings

from .jobs import HOUR, job_of, openai_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .jobs import Job


@pytest.fixture
def provider() -> Iterator[BatchProvider]:
    with BatchProvider(Settings(seconds=HOUR)).running() as provider:
        yield provider


@pytest.fixture
def job(tmp_path: Path, provider: BatchProvider) -> Iterator[Job]:
    with job_of(openai_model, tmp_path, provider) as job:
        yield job
