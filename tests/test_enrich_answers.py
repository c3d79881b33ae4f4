"""Only whole answers count: what is written, what is a row's failure, and what is not asked at all."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import llm
import pytest

from datasette_llm.enrich import ledger
from datasette_llm.enrich.answers.outputs import Outputs
from datasette_llm.enrich.answers.schema import AnswerCheck
from datasette_llm.enrich.answers.whole import check_finish, spoken
from datasette_llm.enrich.errors import AnswerError
from datasette_llm.enrich.telling.kinds import kind_of
from datasette_llm.enrich.telling.words import counted
from datasette_llm.enrich.writing import skipped

from .enrich_tables import TableFile, fake_model
from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from datasette_llm.enrich import EnrichProgress

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["mood", "score"],
}
GOOD = '{"mood": "good", "score": 4}'
BAD = '{"mood": "bad", "score": 1}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  \n An answer. \n", "An answer."),
        ("\ufeffAn answer.\u200b ", "An answer."),
        ("<think>hm</think>\n\nAn answer.", "An answer."),
        ("<think></think> <think>hm</think>An answer.", "An answer."),
        ("<think>hm</think>", ""),
        ("<think>hm, hm", ""),
        ("hm, hm\n</think>\n\nAn answer.", "An answer."),
        ("</think>An answer.", "An answer."),
        ("hm</think>An answer.", "An answer."),
        ("The tag `</think>` ends it.", "The tag `</think>` ends it."),
        ("It writes <think>hm</think> first.", "It writes <think>hm</think> first."),
        ("An answer. <think>really?</think>", "An answer. <think>really?</think>"),
        ("a < b", "a < b"),
        (" \t\n\u00a0", ""),
    ],
)
def test_what_an_answer_says(text: str, said: str) -> None:
    assert spoken(text) == said


def response_of(reason: str, *, tokens: int | None = 64, **options: Any) -> Any:
    class Options(llm.Options):
        max_tokens: int | None = None

    class Ollama(llm.Options):
        num_predict: int | None = None

    kinds: dict[str, type[llm.Options]] = {"num_predict": Ollama, "max_tokens": Options}
    known = next((kinds[name] for name in options), llm.Options)
    given = {name: value for name, value in options.items() if value is not None}
    return SimpleNamespace(
        finish_reason=reason,
        response_json=None,
        output_tokens=tokens,
        model=SimpleNamespace(Options=known),
        prompt=SimpleNamespace(options=known(**given)),
    )


@pytest.mark.parametrize(
    ("response", "text", "kind", "message"),
    [
        (
            response_of("length", max_tokens=64),
            "An ans",
            "cut off",
            "the answer was cut off at 64 tokens: raise it with --option max_tokens N",
        ),
        (
            response_of("length", num_predict=1, tokens=None),
            "An ans",
            "cut off",
            "the answer was cut off at 1 token: raise it with --option num_predict N",
        ),
        (
            response_of("length", max_tokens=None, tokens=4096),
            "",
            "cut off",
            "4,096 tokens before it began (reasoning uses them too): allow more with --option max_tokens N",
        ),
        (
            response_of("length", tokens=None),
            "An ans",
            "cut off",
            "cut off at the limit of tokens, and the model has no option for more: ask for a shorter one",
        ),
        (response_of("content_filter"), "", "filtered", "the provider's content filter stopped the answer: "),
        (response_of("refusal"), "I can't", "refused", 'the model refused to answer ("I can\'t"): '),
        (response_of("error"), "", "broken off", "the provider broke the answer off"),
        (response_of("tool_calls"), " ", "called a tool", "called a tool instead of answering"),
    ],
)
def test_an_answer_that_is_not_whole(response: Any, text: str, kind: str, message: str) -> None:
    with pytest.raises(AnswerError) as caught:
        check_finish(response, text)
    assert caught.value.kind == kind == kind_of(caught.value)
    assert message in str(caught.value)


def test_answers_that_are_whole_as_far_as_anybody_can_tell() -> None:
    for reason in ("stop", "unknown"):
        check_finish(response_of(reason), "An answer")
    check_finish(response_of("tool_calls"), "An answer")
    check_finish(response_of("length"), "An ans", allow_cut=True)
    with pytest.raises(AnswerError):
        check_finish(response_of("refusal"), "An answer", allow_cut=True)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\ufeff{GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\nAnything else?",
        f"Here you are: {GOOD}",
        f"The format is {{mood, score}}, so {{ as asked }} it is {GOOD} then.",
        f'With {{"mood": ..., "score": ...}} in mind: {GOOD}',
        f"<think>perhaps {BAD}</think>{GOOD}",
        f"perhaps {BAD}\n</think>\n{GOOD}",
        f"[{GOOD}]",
        f"Here: [{GOOD}]",
        f'{{"json": {GOOD}}}',
        f'{{"json": [{GOOD}]}}',
        f'So: {{"answer": {GOOD}, "sure": true}}',
        f'{{"unlike": 1}} {GOOD}',
        f'[{{"unlike": 1}}, {GOOD}]',
        f'Draft: {GOOD} Final: {{"score": 4, "mood": "good"}}',
        '{"mood": "good", "score": 4.0}',
    ],
)
def test_the_one_object_that_fits_is_found(text: str) -> None:
    answer = AnswerCheck(SCHEMA).parse(text)
    assert answer == {"mood": "good", "score": 4}
    assert type(answer["score"]) is int


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Sorry, no.", "not JSON"),
        ("", "not JSON"),
        ('{"mood": "good", "score":', "not JSON"),
        (f'{{"mood": "good", "score": 4, "more": {BAD}', "not JSON"),  # The inner one was not asked for.
        (f"{GOOD} or {BAD}", "several answers"),
        (f"[{GOOD}, {BAD}]", "several answers"),
        (f'{{"a": {GOOD}, "b": {BAD}}}', "several answers"),
        ('{"mood": "good"}', "does not fit the schema"),
        ('{"mood": "good", "score": 4.5}', "does not fit the schema"),
        ('"good"', "does not fit the schema"),
        ("[]", "does not fit the schema"),
        (f'{{"a": {{"b": {GOOD}}}}}', "does not fit the schema"),  # One level down, and no further.
    ],
)
def test_none_or_several_are_the_rows_failure(text: str, kind: str) -> None:
    with pytest.raises(AnswerError) as caught:
        AnswerCheck(SCHEMA).parse(text)
    assert caught.value.kind == kind
    assert repr(text)[1:20] in str(caught.value)


def test_where_nothing_is_required_a_wrapper_is_still_a_wrapper() -> None:
    check = AnswerCheck({"properties": {"mood": {"type": "string"}}})
    assert check.parse('{"json": {"mood": "good"}}') == {"mood": "good"}
    assert check.parse("{}") == {}
    assert check.parse('{"other": 1}') == {"other": 1}


def test_integers_written_with_a_fraction_of_nothing() -> None:
    check = AnswerCheck(
        {
            "properties": {
                "n": {"type": ["integer", "null"]},
                "many": {"type": "array", "items": {"type": "integer", "maximum": 9}},
                "deep": {"properties": {"n": {"$ref": "#/$defs/n"}}},
                "real": {"type": "number"},
            },
            "$defs": {"n": {"type": "integer"}},
        }
    )
    answer = check.parse('{"n": 7.0, "many": [1.0, 2], "deep": {"n": 3e2, "more": 1.0}, "real": 7.0}')
    assert json.dumps(answer) == '{"n": 7, "many": [1, 2], "deep": {"n": 300, "more": 1.0}, "real": 7.0}'
    for wrong in ('{"n": 7.5}', '{"many": [10.0]}', '{"n": true}'):
        with pytest.raises(AnswerError, match="does not fit"):
            check.parse(wrong)


MEGABYTES = {
    "braces": "{" * 1_000_000,
    "nested": '{"a":' * 200_000,
    "broken": '{"a":1,' * 150_000,
    "keys": '{"' * 500_000,
    "empty": "{}" * 500_000,
    "unterminated": '{"a": "' + "{" * 1_000_000,
    "digits": '{"a": ' + "9" * 1_000_000 + "}",
    "brackets": "[" * 1_000_000,
    "lists": '[{"a":[' * 150_000,
    "unclosed": ('{"a":' * 300) + "[" + '{"b": "c"},' * 80_000,
    "spaces": "{" + " " * 500_000 + "{" + " " * 500_000,
    "thoughts": "<think></think>" * 70_000,
    "unclosed thoughts": "<think>" * 150_000,
    "unclosed tags": "</think" * 150_000,
}


@pytest.mark.parametrize("text", MEGABYTES.values(), ids=MEGABYTES)
def test_a_megabyte_of_braces_is_looked_through_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(AnswerError):
        Outputs(TABLE, None, SCHEMA).parse(text)
    # Going over it again from each brace would take minutes or hours: this is no measure of speed.
    assert time.process_time() - began < 20


TABLE: Any = SimpleNamespace(
    find_column=lambda name: None, name="t", columns=(), column_names=(), key=(), sql_name='"t"'
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\x00b", "NUL character"),
        ("half \ud83d", "half of a character"),
        (["half \ud83d"], "half of a character"),
        (2**63, "integer that is too large for SQLite: 9223372036854775808"),
        (1e400, "not finite"),
    ],
)
def test_answers_that_cannot_be_stored(value: Any, message: str) -> None:
    outputs = Outputs(TABLE, None, {"properties": {"x": {}}})
    with pytest.raises(AnswerError, match=message) as caught:
        outputs.parse(json.dumps({"x": value}))
    assert caught.value.kind == "cannot be stored"
    str(caught.value).encode()
    if isinstance(value, str):
        with pytest.raises(AnswerError, match=message):
            Outputs(TABLE, "x", None).parse(value)


def test_numbers_of_things() -> None:
    assert [counted(n, "retry", "retries") for n in (0, 1, 1_204)] == [
        "0 retries",
        "1 retry",
        "1,204 retries",
    ]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
    yield file
    file.close()


def answers(file: TableFile) -> list[tuple[Any, ...]]:
    return file.run("select id, answer from t order by id")


class Telling(FakeModel):
    """A model that says why it stopped: the prompt is the reason and the answer."""

    class Options(llm.Options):
        max_tokens: int | None = None

    async def execute(self, prompt: Any, stream: Any, response: Any, conversation: Any = None) -> Any:
        reason, _, text = prompt.prompt.partition(":")
        response.response_json = {"choices": [{"finish_reason": reason}]}
        response.set_usage(input=3, output=64)
        yield text


@pytest.mark.real_clock
async def test_rows_whose_answers_are_not_whole_fail_until_they_are_accepted(file: TableFile) -> None:
    prompts = [
        "stop: fine ", "length:cut", "length:", "content_filter:", "refusal:no", "stop:", "stop: ",
        "tool_calls:", "stop:<think>hm",
    ]  # fmt: skip
    file.run_many("insert into t(body) values (?)", [(prompt,) for prompt in prompts])
    with registered(Telling()):
        report = await file.enrich("t", "{{ body }}", column="answer", options={"max_tokens": 64})
        assert (report.written, report.failed) == (1, 8)
        assert {kind.kind: kind.count for kind in report.failures} == {
            "empty": 3, "cut off": 2, "filtered": 1, "refused": 1, "called a tool": 1,
        }  # fmt: skip
        assert [row for row in answers(file) if row[1] is not None] == [(1, "fine")]
        recorded = dict(file.run("select pk, error from _llm_enrich_errors"))
        assert recorded[2] == (
            "cut off: the answer was cut off at 64 tokens: raise it with --option max_tokens N"
        )
        assert max(map(len, report.summary().splitlines())) <= 80
        again = await file.enrich(
            "t", "{{ body }}", column="answer", retry_failed=True, allow_cut=True, allow_empty=True
        )
    assert (again.written, again.failed) == (5, 3)
    assert answers(file)[1:3] == [(2, "cut"), (3, "")]
    assert {pk for (pk,) in file.run("select pk from _llm_enrich_errors")} == {4, 5, 8}


@pytest.mark.real_clock
async def test_the_text_of_a_response_is_as_the_model_wrote_it(file: TableFile) -> None:
    from datasette_llm import LLM

    with registered(Telling()):
        model = await LLM(file.datasette()).model("fake")
        response = await model.prompt("length: <think>hm</think> cut ")
        assert await response.text() == " <think>hm</think> cut "


@pytest.mark.real_clock
async def test_failures_are_counted_by_what_happened(file: TableFile) -> None:
    texts = ["no JSON", '{"mood": 1}', f"{GOOD}{BAD}", '{"mood": "a\\u0000b", "score": 1}', "{}"]
    file.run_many("insert into t(body) values (?)", [(text,) for text in texts])
    with fake_model():
        report = await file.enrich("t", "{{ body }}", schema=SCHEMA)
    assert {kind.kind: kind.count for kind in report.failures} == {
        "not JSON": 1, "does not fit the schema": 2, "several answers": 1, "cannot be stored": 1,
    }  # fmt: skip
    assert report.as_dict()["failures"][0]["exception"] is None


@pytest.mark.real_clock
async def test_what_the_table_refuses_is_one_kind(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body, answer unique)", "insert into t(body) values (1), (1)")
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert [(kind.kind, kind.count) for kind in report.failures] == [("refused by the table", 1)]
    assert "the table refuses the answer: UNIQUE" in report.failures[0].example
    file.close()


@pytest.mark.real_clock
async def test_a_hundred_answers_in_a_row_that_are_no_good_stop_the_job(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "FAILURES_IN_A_ROW", 3)
    file.run_many("insert into t(body) values (?)", [(f"no JSON {n}",) for n in range(20)])
    with fake_model():
        report = await file.enrich("t", "{{ body }}", schema=SCHEMA, concurrency=1)
    assert (report.stopped, report.failed < 20) == ("failing", True)


# Rows with nothing to ask


@pytest.mark.real_clock
async def test_rows_with_nothing_to_ask_are_skipped(file: TableFile) -> None:
    file.run_many("insert into t(body) values (?)", [("a",), (None,), ("",), (" \n",), ("b",)])
    seen: list[EnrichProgress] = []
    with fake_model() as model:
        report = await file.enrich("t", "{{ body }}", column="answer", on_progress=seen.append)
        assert sorted(model.prompts) == ["a", "b"]
        assert (report.written, report.failed, report.skipped, report.total) == (2, 0, 3, 5)
        assert (seen[-1].done, seen[-1].total, seen[-1].skipped) == (5, 5, 3)
        assert "3 rows skipped: nothing to ask" in report.summary()
        assert report.as_dict()["skipped"] == 3
        assert file.run("select name from sqlite_master where name like '%errors'") == []
        again = await file.enrich("t", "{{ body }}", column="answer")
    assert (again.written, again.failed, again.skipped, again.done, again.total) == (0, 0, 3, 3, 3)
    assert again.summary().splitlines()[0].startswith("Nothing left to do: each row")


@pytest.mark.real_clock
async def test_skipped_rows_do_not_use_up_the_limit(file: TableFile) -> None:
    file.run_many("insert into t(body) values (?)", [(None,)] * 70 + [(f"a{number}",) for number in range(5)])
    with fake_model() as model:
        report = await file.enrich("t", "{{ body }}", column="answer", limit=3)
    assert len(model.prompts) == 3
    assert (report.written, report.skipped, report.done, report.total) == (3, 70, 73, 73)


@pytest.mark.real_clock
async def test_what_was_recorded_of_skipped_rows_is_forgotten(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skipped, "TRANSACTION_ROWS", 2)
    file.run_many("insert into t(body) values (?)", [("fail",)] * 7)

    async def fail(prompt: str) -> AsyncGenerator[str, None]:
        raise ValueError("no")
        yield ""

    with fake_model(fail):
        await file.enrich("t", "{{ body }}", column="answer")
        await file.enrich("t", "{{ body }}", column="other")
    file.run("update t set body = null where id <= 5")
    with fake_model(fail):
        report = await file.enrich("t", "{{ body }}", column="answer", retry_failed=True)
    assert (report.skipped, report.failed, report.total) == (5, 2, 7)
    left = file.run("""select "column", count(*) from _llm_enrich_errors group by 1""")
    assert dict(left) == {"answer": 2, "other": 7}


@pytest.mark.real_clock
async def test_rows_left_after_an_early_end_are_without_those_skipped(file: TableFile) -> None:
    file.run_many("insert into t(body) values (?)", [(None,)] * 10 + [(f"a b{n}",) for n in range(10)])
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=1, max_tokens_total=4)
    assert report.stopped == "max_tokens_total"
    assert (report.skipped, report.written + (report.remaining or 0)) == (10, 10)
    text = report.summary()
    assert f"{counted(report.remaining or 0, 'row')} left" in text


@pytest.mark.real_clock
async def test_an_overwriting_job_goes_on_behind_the_rows_it_skipped(file: TableFile) -> None:
    file.run_many(
        "insert into t(body) values (?)", [("a b",)] + [(None,)] * 3 + [(f"a b{n}",) for n in range(5)]
    )
    with fake_model():
        report = await file.enrich(
            "t", "{{ body }}", column="answer", concurrency=1, max_tokens_total=4, overwrite=True
        )
    assert report.stopped == "max_tokens_total"
    assert report.resume_where is not None
    assert int(report.resume_where.split()[-1]) >= 4


@pytest.mark.real_clock
async def test_a_dry_run_without_rows_sends_nothing_either(file: TableFile) -> None:
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer", dry_run=True)
    assert report.prompts == []
    assert "no row of t (answer) is waiting for a value" in report.summary()
