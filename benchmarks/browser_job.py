"""A job in the browser against the command: the same rows, the same provider, one after the other.

``python -m benchmarks.browser_job`` prints, for each, rows a second and CPU a row, medians of rounds by
turns; then how long a page takes while the job is under way; then what those who watch cost: ten pages of a
job's progress, ten that ask for the state of the server.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from .launch import ROOT, own_environment, running_server
from .models import KEY, MODEL_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = "Say something about {{ word }}."
CONFIG = {
    "permissions": {"update-row": True, "alter-table": True, "llm-status": True},
    "plugins": {"datasette-llm": {"default_model": MODEL_ID}},
}
WATCHERS = 10
WATCHED_SECONDS = 10.0
PAGE = "/data/words?_size=20"


class Site:
    """A Datasette server in a process of its own."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self.port = port

    def ask(self, path: str, form: dict[str, str] | None = None) -> tuple[int, bytes, str | None]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {"content-type": "application/x-www-form-urlencoded"} if form else {}
            connection.request("POST" if form else "GET", path, urlencode(form) if form else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers.get("location")

    @property
    def cpu(self) -> float:
        """The seconds of CPU that it has taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start(self, column: str, limit: int | None = None) -> str:
        """Start a job and return the path of its page."""
        form = {"model": MODEL_ID, "prompt": PROMPT, "column": column, "action": "run"}
        status, body, location = self.ask(
            "/data/-/llm/enrich/words", form | ({"limit": str(limit)} if limit else {})
        )
        if status != 302 or location is None:
            raise RuntimeError(f"the form answered {status}: {body[-2000:]!r}")
        return location

    def state(self, path: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.ask(path + ".json")[1])
        return told


@contextmanager
def served(home: Path, database: Path) -> Iterator[Site]:
    """Serve a database; the server is gone when the block is left."""
    config = home / "datasette.json"
    config.write_text(json.dumps(CONFIG))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "datasette", "serve", str(database), "-c", str(config), "-p", str(port)]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment(home), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        site = Site(server.pid, port)
        for _ in range(600):
            try:
                site.ask(PAGE)
                break
            except OSError:
                time.sleep(0.1)
        site.ask("/data/-/llm/enrich/words")  # As somebody does who starts a job: all is loaded then.
        yield site
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def environment(home: Path) -> dict[str, str]:
    return own_environment(home) | {"OPENAI_API_KEY": KEY}


def make(home: Path, url: str, rows: int) -> Path:
    """Make the table, and a model of llm's at this address."""
    model = {"model_id": MODEL_ID, "model_name": MODEL_ID, "api_base": url}
    (home / "extra-openai-models.yaml").write_text(json.dumps([model]))
    path = home / "data.db"
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("create table words (id integer primary key, word text)")
        conn.executemany("insert into words (word) values (?)", ((f"word {n}",) for n in range(rows)))
    return path


def by_command(home: Path, database: Path, column: str) -> tuple[float, float]:
    """Run the command and return rows a second and seconds of CPU, its start included."""
    command = [sys.executable, "-m", "datasette", "llm", "enrich", str(database), "words", PROMPT]
    command += ["--column", column, "--model", MODEL_ID, "--json"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    process.stdout.close()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return report["written"] / report["elapsed"], usage.ru_utime + usage.ru_stime


def by_browser(site: Site, column: str) -> tuple[float, float]:
    """Run a job of the server and return rows a second and seconds of CPU."""
    before = site.cpu
    path = site.start(column)
    while (told := site.state(path))["state"] == "running":
        time.sleep(0.5)
    if told["state"] != "done":
        raise RuntimeError(str(told))
    return told["rows_per_second"], site.cpu - before


def look(site: Site, go_on: Callable[[], bool]) -> list[float]:
    """Ask for a table's page again and again and return how long each took, in milliseconds."""
    took = []
    while go_on():
        began = time.perf_counter()
        assert site.ask(PAGE)[0] == 200
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(0.02)
    return took


def page_times(site: Site) -> dict[str, str]:
    """Return how long a page takes, idle and while a job is under way."""
    until = time.monotonic() + 5
    idle = look(site, lambda: time.monotonic() < until)
    path = site.start("looked_at")
    busy = look(site, lambda: site.state(path)["state"] == "running")
    return {
        name: f"p50 {median(took):.1f} ms, p99 {quantiles(took, n=100)[98]:.1f} ms, {len(took)} pages"
        for name, took in (("idle", idle), ("during a job", busy))
    }


def watching(site: Site, rounds: int) -> dict[str, list[float]]:
    """Return what share of a core the server takes with nobody, with watchers, and with those who ask."""
    path = site.start("slowly")
    shares: dict[str, list[float]] = {"nobody": [], "ten watch the job": [], "ten ask for the state": []}
    for _ in range(rounds):
        for name, target in (
            ("nobody", None),
            ("ten watch the job", lambda stop: _watch(site, f"{path}/events", stop)),
            ("ten ask for the state", lambda stop: _poll(site, "/-/llm.json?live=1", stop)),
        ):
            stop = threading.Event()
            threads = [
                threading.Thread(target=target, args=(stop,)) for _ in range(WATCHERS if target else 0)
            ]
            for thread in threads:
                thread.start()
                time.sleep(0.07)
            before, began = site.cpu, time.monotonic()
            time.sleep(WATCHED_SECONDS)
            shares[name].append(100 * (site.cpu - before) / (time.monotonic() - began))
            stop.set()
            for thread in threads:
                thread.join()
    if site.state(path)["state"] != "running":
        raise RuntimeError("the job that was watched has ended too early")
    site.ask(f"{path}/cancel", {"csrftoken": ""})
    return shares


def _watch(site: Site, path: str, stop: threading.Event) -> None:
    # As an EventSource does: a stream, and the next one half a second after it has ended.
    while not stop.is_set():
        with closing(HTTPConnection("127.0.0.1", site.port, timeout=60)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            while answer.readline():
                if stop.is_set():
                    return
        stop.wait(0.5)


def _poll(site: Site, path: str, stop: threading.Event) -> None:
    with closing(HTTPConnection("127.0.0.1", site.port, timeout=60)) as connection:
        while not stop.is_set():
            connection.request("GET", path)
            connection.getresponse().read()
            stop.wait(2)


def main() -> None:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, running_server(latency=options.latency) as provider:
        home = Path(directory)
        database = make(home, provider.url, options.rows)
        rows: dict[str, list[tuple[float, float]]] = {"the command": [], "the browser": []}
        with served(home, database) as site:
            for number in range(options.rounds):
                rows["the command"].append(by_command(home, database, f"command_{number}"))
                rows["the browser"].append(by_browser(site, f"browser_{number}"))
            for name, found in rows.items():
                rates, cpu = [each[0] for each in found], [1000 * each[1] / options.rows for each in found]
                each = ", ".join(f"{rate:.0f}" for rate in rates)
                print(f"{name}: {median(rates):.0f} rows/s ({each}), {median(cpu):.2f} ms of CPU a row")
            ratio = median(
                rows["the browser"][n][0] / rows["the command"][n][0] for n in range(options.rounds)
            )
            print(f"browser / command: {ratio:.3f} (median of the rounds' ratios; goal: at least 0.9)")
            for name, told in page_times(site).items():
                print(f"a page, {name}: {told}")
            provider.configure(latency=60.0)  # A job that is under way all the time.
            for name, shares in watching(site, options.rounds).items():
                each = ", ".join(f"{share:.1f}" for share in shares)
                print(f"{name}: {median(shares):.1f} % of a core ({each})")


if __name__ == "__main__":
    main()
