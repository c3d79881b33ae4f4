"""A few rows asked for real, before the whole table is: answers, what they took, and what all would take.

Nothing is written. Several models can be asked about the same rows, to be compared.
"""

from __future__ import annotations

import logging
import textwrap
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.backends.datasette_side import open_side
from datasette_llm.calls.failures import words_of
from datasette_llm.calls.prices import cost_of
from datasette_llm.responses.outcome import used_tokens
from datasette_llm.secrecy import redacted

from .answers.whole import check_finish
from .attaching import load
from .database import read
from .estimate import estimate_of, survey
from .plan import make_plan
from .telling.words import counted, dollars, duration, none_waits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasette_llm.responses.response import PromptResponse

    from .estimate import Estimate, Survey
    from .plan import Plan
    from .reading.selection import Row
    from .spec import JobSpec

logger = logging.getLogger("datasette_llm")

#: A column for a model has so many characters at least.
NARROWEST = 24
#: From fewer rows the length of answers is a guess.
FEW_ROWS = 20


@dataclass(frozen=True, slots=True)
class Tried:
    """What a model answered to a row.

    Attributes:
        pk: the key of the row.
        values: what its columns would receive; empty if it failed.
        error: why it failed, or ``None``.
        cost: in dollars; ``None`` if no price is known.
        seconds: how long it took.
        attachments: what was sent with the prompt: addresses, files, or "a column's content".
    """

    model: str
    pk: tuple[Any, ...]
    prompt: str
    values: dict[str, Any]
    error: str | None
    input_tokens: int
    output_tokens: int
    cost: float | None
    seconds: float
    attachments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a trial.

    Attributes:
        waiting: how many rows wait.
        answers: row by row, and for each row in the order of the models.
        estimates: what the whole would take, for each model.
        stale: the rows that wait are those whose answers are out of date.
    """

    table: str
    columns: tuple[str, ...]
    waiting: int
    answers: list[Tried] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    stale: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as data that JSON can show."""
        data = asdict(self)
        for answer in data["answers"]:
            answer["pk"] = [value.hex() if isinstance(value, bytes) else value for value in answer["pk"]]
            answer["seconds"] = round(answer["seconds"], 3)
        return data


async def try_rows(datasette: Any, spec: JobSpec, number: int, models: Sequence[str] = ()) -> Trial:
    """Ask about a few rows, spread over those that wait; write nothing.

    Args:
        spec: the job.
        number: how many rows.
        models: ids or aliases to be compared; the job's own model if there is none.

    Raises:
        EnrichInputError: what was asked cannot be done; nothing was sent.
        ModelNotFoundError: there is no such model, or not for this actor and purpose.
    """
    async with open_side():
        plan = await make_plan(datasette, spec)
        for doubt in plan.doubts:
            logger.warning("%s", doubt[0].upper() + doubt[1:])
        asked: Sequence[str | None] = models or [spec.model]
        surveys = await _surveys(datasette, plan, asked)
        found = surveys[-1]  # Of the model that the run is for.
        rows = await _spread(plan, found, number)
        columns = tuple(output.name for output in plan.outputs.columns)
        trial = Trial(plan.table.name, columns, found.rows, stale=spec.stale)
        if not rows:
            return trial
        by_model = []
        for model, of_model in zip(asked, surveys, strict=True):
            each = replace(spec, model=model)
            answers, estimate = await _ask(datasette, replace(plan, spec=each), of_model, rows)
            by_model.append(answers)
            trial.estimates.append(estimate)
        for of_row in zip(*by_model, strict=True):
            trial.answers.extend(of_row)
    return trial


async def _surveys(datasette: Any, plan: Plan, models: Sequence[str | None]) -> list[Survey]:
    """Return for each model the rows that wait: the same ones, unless a row is stale for one of them only."""
    from datasette_llm.facade import LLM

    spec = plan.spec
    if not spec.stale:
        return [await survey(plan)] * len(models)
    facade = LLM(datasette)
    return [
        await survey(plan.for_model(await facade.model(model, purpose=spec.purpose, actor=spec.actor)))
        for model in models
    ]


async def _spread(plan: Plan, found: Survey, number: int) -> list[Row]:
    """Return rows with something to ask, from everywhere between the first and the last."""
    candidates = [each for each in found.sample if each.characters]
    count = min(number, len(candidates))
    chosen = [candidates[(2 * place + 1) * len(candidates) // (2 * count)] for place in range(count)]
    rows = [await read(plan.database, partial(plan.rows.by_key, key=each.key)) for each in chosen]
    return [row for row in rows if row is not None]


async def _ask(datasette: Any, plan: Plan, found: Survey, rows: list[Row]) -> tuple[list[Tried], Estimate]:
    from datasette_llm.facade import LLM

    spec = plan.spec
    tried: dict[int, Tried] = {}
    group = LLM(datasette).group(
        spec.model,
        purpose=spec.purpose,
        actor=spec.actor,
        concurrency=spec.concurrency,
        timeout=spec.timeout,
    )
    async with group as model:
        spec.check_model(model, plan.schema)
        plan = plan.for_model(model)
        await plan.check_attachments(model.model_id)
        keywords = spec.prompt_keywords(plan.schema)

        async def ask(place: int, row: Row) -> None:
            prompt, attached = plan.content(row)
            began = anyio.current_time()
            values: dict[str, Any] = {}
            error = None
            response: PromptResponse | None = None
            try:
                files = await anyio.to_thread.run_sync(load, attached, plan.takes) if attached else []
                response = await model.prompt(prompt, stream=False, **keywords, attachments=files)
                text = await response.text()
                check_finish(response, text, allow_cut=spec.allow_cut)
                parsed = plan.outputs.parse(text)
                names = (output.name for output in plan.outputs.columns)
                values = dict(zip(names, parsed, strict=True))
            except Exception as problem:
                error = redacted(words_of(problem))
            seconds = anyio.current_time() - began
            cost = None if response is None else cost_of(response, model.pricing)
            used = (0, 0) if response is None else used_tokens(response)
            sent = tuple(str(each) for each in attached)
            tried[place] = Tried(model.model_id, row.key, prompt, values, error, *used, cost, seconds, sent)

        async with anyio.create_task_group() as tasks:
            for place, row in enumerate(rows):
                tasks.start_soon(ask, place, row)
        answers = [tried[place] for place in range(len(rows))]
        return answers, _whole(plan, found, answers, model)


def _whole(plan: Plan, found: Survey, answers: list[Tried], model: Any) -> Estimate:
    """Return what all rows would take, if they are like these for their length."""
    counted_ones = [each for each in answers if each.input_tokens]
    if not counted_ones:
        return replace(
            estimate_of(found, model.model_id, model.pricing), seconds=_seconds(found, answers, model)
        )
    characters = sum(len(each.prompt) + found.extra for each in counted_ones)
    tokens = sum(each.input_tokens for each in counted_ones)
    whole = estimate_of(
        found,
        model.model_id,
        model.pricing,
        input_per_row=found.characters * tokens / characters,
        output_per_row=sum(each.output_tokens for each in counted_ones) / len(counted_ones),
        basis="try",
    )
    costs = [each.cost for each in counted_ones if each.cost is not None]
    if model.pricing is None and len(costs) == len(counted_ones):
        # Nobody lists a price, but the provider has told it.
        whole = replace(whole, cost=sum(costs) / len(costs) * whole.rows)
    return replace(whole, seconds=_seconds(found, answers, model))


def _seconds(found: Survey, answers: list[Tried], model: Any) -> float:
    each = sum(answer.seconds for answer in answers) / len(answers)
    at_once: int = min(model.stats.concurrency, found.asked) or 1
    return each * found.asked / at_once


def in_words(trial: Trial, width: int) -> str:
    """Return a trial for a terminal of this width."""
    if not trial.answers:
        nothing = none_waits(f"{trial.table} ({', '.join(trial.columns)})", stale=trial.stale)
        return f"{nothing[0].upper()}{nothing[1:]}: nothing was sent."
    lines: list[str] = []
    for of_row in _by_row(trial.answers):
        key = of_row[0].pk
        shown = key[0] if len(key) == 1 else key
        lines += ["", _cut(f"Row {shown!r}: {of_row[0].prompt}", width)]
        lines += [_cut(f"  with {name}", 3 * width) for name in of_row[0].attachments]
        if len(of_row) > 1:
            lines += _side_by_side(of_row, width)
            continue
        for text in _said(of_row[0]):
            lines.append(_cut(f"  {text}", 3 * width))
        lines.append(f"  [{', '.join(_took(of_row[0]))}]")
    lines.append("")
    for whole in trial.estimates:
        about = whole.line()
        lines.append(f"All: {about}" + (f", {duration(whole.seconds)}" if whole.seconds is not None else ""))
    if len({tried.pk for tried in trial.answers}) < FEW_ROWS:
        lines.append(
            "How long the answers will be is told from these few rows alone: --try 20 tells it better."
        )
    return "\n".join(_wrap(line, width) for line in lines).lstrip("\n")


def _by_row(answers: Sequence[Tried]) -> list[list[Tried]]:
    rows: dict[tuple[Any, ...], list[Tried]] = {}
    for tried in answers:
        rows.setdefault(tried.pk, []).append(tried)
    return list(rows.values())


def _said(tried: Tried) -> list[str]:
    if tried.error is not None:
        return [f"failed: {tried.error}"]
    return [f"{name}: {value}" for name, value in tried.values.items()]


def _took(tried: Tried) -> list[str]:
    cost = "no price known" if tried.cost is None else dollars(tried.cost)
    tokens = f"{counted(tried.input_tokens, 'token')} in, {tried.output_tokens:,} out"
    return [tokens, cost, duration(tried.seconds)]


def _side_by_side(of_row: Sequence[Tried], width: int) -> list[str]:
    """Return what models answered to a row in columns; below each other where these would be too narrow."""
    gap = "  "
    each = max(NARROWEST, (width - 2) // len(of_row) - len(gap))
    at_once = max(1, (width - 2) // (each + len(gap)))
    lines: list[str] = []
    for begin in range(0, len(of_row), at_once):
        cells = []
        for tried in of_row[begin : begin + at_once]:
            texts = [tried.model, *(_cut(text, 4 * each) for text in _said(tried)), *_took(tried)]
            cells.append([line for text in texts for line in textwrap.wrap(text, each) or [""]])
        rows = zip_longest(*cells, fillvalue="")
        lines += ["  " + gap.join(text.ljust(each) for text in row).rstrip() for row in rows]
    return lines


def _cut(text: str, width: int) -> str:
    text = ("  " if text.startswith("  ") else "") + " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrap(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="    ") if len(line) > width else line
