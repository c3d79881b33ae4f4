"""Workers that are processes: of a group, of a program that is killed, of a cluster as the docs start it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from benchmarks.kill_workers import gone, wait_for
from benchmarks.launch import own_environment, running_server
from benchmarks.provider import answer_text
from benchmarks.workers import MODEL_ID, worker_processes, write_model
from datasette_llm import LLM

from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("distributed")
pytestmark = [pytest.mark.system, pytest.mark.real_clock]

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    with running_server(latency=0.05) as server:
        write_model(tmp_path, server.url)
        environment = own_environment(tmp_path)
        for name in ("LLM_USER_PATH", "LLM_LOAD_PLUGINS"):
            monkeypatch.setenv(name, environment[name])
        yield environment


async def test_processes_make_the_calls_of_a_group_and_end_with_it(environment: dict[str, str]) -> None:
    from datasette.app import Datasette

    facade = LLM(Datasette(memory=True, config={"plugins": {"datasette-llm": {"default_model": MODEL_ID}}}))
    with anyio.fail_after(PATIENCE_SECONDS):
        async with facade.group(workers=2, concurrency=10) as group:
            answers = {item: await response.text() async for item, response in group.map(map(str, range(50)))}
            pids = worker_processes(os.getpid())
        assert answers == {str(number): answer_text(str(number)) for number in range(50)}
        assert pids
        assert await anyio.to_thread.run_sync(wait_for, lambda: gone(pids))


SCRIPT = """
import anyio
from datasette.app import Datasette
from datasette_llm import LLM

async def main():
    async with LLM(Datasette(memory=True)).group({model!r}, workers=1):
        print("ready", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_a_process_that_is_killed_leaves_no_worker(environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", SCRIPT.format(model=MODEL_ID)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        pids = worker_processes(process.pid)
        process.kill()
    assert pids
    assert wait_for(lambda: gone(pids))


def commands_of_the_page(port: int) -> list[str]:
    """The commands for a cluster, for one machine and a free port."""
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## More machines") :]
    blocks = re.findall(r"^```\n(.+?)^```", section, re.MULTILINE | re.DOTALL)[:4]
    for wide, narrow in (("0.0.0.0", "127.0.0.1"), ("SCHEDULER", "127.0.0.1"), ("8786", str(port))):
        blocks = [block.replace(wide, narrow) for block in blocks]
    return blocks


@contextmanager
def running(command: str, directory: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a command of a shell for as long as the block, with what it starts."""
    with open(directory / "log.txt", "ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=directory,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_cluster_with_tls_as_the_page_starts_it(tmp_path: Path, environment: dict[str, str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    certificate, scheduler, worker, job = commands_of_the_page(port)
    environment = environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with closing(sqlite3.connect(tmp_path / "data.db")) as database:
        database.execute("create table articles (id integer primary key, body text)")
        database.executemany(
            "insert into articles (body) values (?)", [(f"text {number}",) for number in range(30)]
        )
        database.commit()
    subprocess.run(["bash", "-c", certificate], cwd=tmp_path, check=True, capture_output=True)
    with (
        running(scheduler, tmp_path, environment),
        running(worker, tmp_path, environment),
        running(worker, tmp_path, environment),
    ):
        done = subprocess.run(
            ["bash", "-ec", job.rstrip() + f" -m {MODEL_ID} --workers-timeout 3m"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    with closing(sqlite3.connect(tmp_path / "data.db")) as database:
        [(answered,)] = database.execute(
            "select count(*) from articles where summary = 'answer to: Summarize: ' || body"
        )
    assert answered == 30
