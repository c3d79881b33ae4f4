"""What rows have attached: addresses, files, BLOBs; who reads them, and what if nobody can."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from datasette.cli import cli

from datasette_llm.enrich import EnrichInputError, JobSpec
from datasette_llm.enrich.estimate import estimate_job
from datasette_llm.enrich.trial import try_rows

from .enrich_tables import TableFile
from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
GIF = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00"


class Seeing(FakeModel):
    """Takes PNG, and says what it was shown."""

    attachment_types = frozenset({"image/png"})

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        self.prompts.append(prompt.prompt)
        shown = [f"{each.type} {each.url or len(each.content_bytes())}" for each in prompt.attachments]
        yield f"{', '.join(shown)}"


@contextmanager
def pictures() -> Iterator[tuple[str, list[str]]]:
    """A host of pictures: its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("content-type", "image/gif" if "gif" in self.path else "image/png")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def file(tmp_path: Path) -> TableFile:
    return TableFile(
        tmp_path, "create table t (id integer primary key, name text, link text, photo blob, said)"
    )


def fill(file: TableFile, *rows: tuple[Any, ...]) -> None:
    file.run_many("insert into t (id, name, link, photo) values (?, ?, ?, ?)", rows)


def answers(file: TableFile) -> dict[int, str]:
    return dict(file.run("select id, said from t"))


def failures(file: TableFile) -> str:
    return " ".join(row[0] for row in file.run("select error from _llm_enrich_errors order by pk"))


async def test_a_blob_is_the_content_and_a_row_without_one_is_skipped(file: TableFile) -> None:
    fill(file, (1, "a", "", PNG), (2, "b", "", None), (3, "c", "", GIF), (4, "d", "", b"what?"))
    model = Seeing()
    with registered(model):
        report = await file.enrich("t", "{{ name }}", column="said", attachments=["{{ photo }}"])
    assert (report.written, report.skipped, report.failed) == (1, 1, 2)
    assert answers(file)[1] == f"image/png {len(PNG)}"
    assert model.prompts == ["a"]
    assert [(kind.kind, kind.count) for kind in report.failures] == [("attachment", 2)]
    assert f"of {len(GIF)} bytes is image/gif, which the model does not take, only image/png" in failures(
        file
    )
    assert "of 5 bytes is of no type that llm knows" in failures(file)


async def test_an_address_is_asked_for_its_type_and_sent(file: TableFile) -> None:
    with pictures() as (host, asked), registered(Seeing()):
        fill(
            file,
            (1, "a", f"{host}/one.png", None),
            (2, "b", f"{host}/missing", None),
            (3, "c", "ftp://x/y", None),
            (4, "d", f"{host}/a.gif", None),
        )
        report = await file.enrich("t", "{{ name }}", column="said", attachments=["{{ link }}"])
    assert (report.written, report.failed) == (1, 3)
    assert answers(file)[1] == f"image/png {host}/one.png"
    assert sorted(asked) == ["/a.gif", "/missing", "/missing", "/one.png"]  # what is known is not asked again
    told = failures(file)
    for words in (
        "its host answered 404",
        "is no address that begins with http",
        "a.gif is image/gif, which",
    ):
        assert words in told


async def test_files_are_not_read_for_others_than_the_command_line(file: TableFile) -> None:
    fill(file, (1, "a", __file__, None))
    with registered(Seeing()):
        report = await file.enrich("t", "{{ name }}", column="said", attachments=["{{ link }}"])
    assert report.failed == 1
    assert "files are read for the command line only" in failures(file)


def test_the_command_line_reads_files(file: TableFile, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    fill(file, (1, "a", "a.png", None), (2, "b", "b.png", None))
    arguments = ["--column", "said", "-m", "fake", "-a", f"{tmp_path}/{{{{ link }}}}", "--json"]
    with registered(Seeing()):
        done = CliRunner().invoke(cli, ["llm", "enrich", file.path, "t", "{{ name }}", *arguments])
    assert done.exit_code == 1, done.output
    assert answers(file) == {1: f"image/png {len(PNG)}", 2: None}
    assert "b.png' cannot be read: No such file" in failures(file)
    [spec] = file.run("select spec from _llm_runs order by id desc limit 1")
    assert json.loads(spec[0])["attachments"] == [f"{tmp_path}/{{{{ link }}}}"]


async def test_what_is_attached_is_a_part_of_the_question(file: TableFile, tmp_path: Path) -> None:
    fill(file, (1, "a", "", PNG), (2, "a", "", PNG), (3, "a", "", PNG + b"more"))
    model = Seeing()
    with registered(model):
        ask = {"column": "said", "attachments": ["{{ photo }}"]}
        report = await file.enrich("t", "{{ name }}", **ask)
        assert (report.written, report.reused, len(model.prompts)) == (3, 1, 2)
        file.run("update t set photo = ? where id = 1", [PNG + b"other"])
        report = await file.enrich("t", "{{ name }}", **ask, stale=True)
    assert (report.written, len(model.prompts)) == (1, 3)
    assert answers(file)[1] == f"image/png {len(PNG) + 5}"


async def test_what_the_model_does_not_take_is_said_before_anything_is_sent(file: TableFile) -> None:
    fill(file, (1, "a", "", GIF), (2, "b", "", GIF))
    columns = file.run("select sql from sqlite_master")
    model, blind = Seeing(), FakeModel(model_id="blind")
    with registered(model, blind):
        with pytest.raises(EnrichInputError, match="Nothing that the first rows have attached suits 'fake'"):
            await file.enrich("t", "{{ name }}", column="new", attachments=["{{ photo }}"])
        with pytest.raises(EnrichInputError, match="takes no attachments"):
            await file.enrich("t", "x", column="new", attachments=["{{ photo }}"], model="blind")
        with pytest.raises(EnrichInputError, match=r"In the attachment '\{\{ foto \}\}'.*'photo'"):
            await file.enrich("t", "x", column="new", attachments=["{{ foto }}"])
    assert (model.prompts, blind.prompts) == ([], [])
    assert file.run("select sql from sqlite_master") == columns


async def test_a_trial_sends_them_and_an_estimate_says_that_it_did_not_count_them(file: TableFile) -> None:
    fill(file, *((key, f"row {key}", "", PNG) for key in range(1, 5)))
    spec = JobSpec(
        database="data",
        table="t",
        prompt="{{ name }}",
        column="said",
        model="fake",
        attachments=("{{ photo }}",),
    )
    with registered(Seeing()):
        trial = await try_rows(file.datasette(), spec, 2)
        assert [tried.values["said"] for tried in trial.answers] == [f"image/png {len(PNG)}"] * 2
        assert "attachments not counted" in (await estimate_job(file.datasette(), spec)).line()
        report = await file.enrich(
            "t", "{{ name }}", column="said", attachments=["{{ photo }}"], dry_run=True, limit=1
        )
    assert report.prompts == [f"row 1\n[attached: {len(PNG)} bytes]"]
