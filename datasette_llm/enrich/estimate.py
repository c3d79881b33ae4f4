"""What a job would take, before anything is sent: rows, tokens and dollars, each with how sure that is.

All rows that wait are counted, and a sample of them, from all of the table, is rendered. Tokens
are told from characters: four to a token (what providers give as a rule of thumb), or from what earlier runs
of the same prompt really used.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from datasette_llm.backends.datasette_side import open_side
from datasette_llm.calls.prices import Usage, in_batches

from .database import read
from .errors import RowError
from .plan import make_plan
from .reading.pages import read_pages
from .record.tables import RUNS_TABLE, has_record
from .telling.words import counted, dollars

if TYPE_CHECKING:
    import sqlite3

    from datasette_llm.calls.prices import Pricing

    from .plan import Plan
    from .reading.selection import Row
    from .spec import JobSpec
    from .sql import SQLValue

SAMPLED_ROWS = 1_000
#: So many rows are all read for a sample; of longer tables, some from each of so many places at most.
ALL_ROWS = 50_000
MOST_STRETCHES = 100
CHARACTERS_A_TOKEN = 4.0
#: How far the rule of thumb may be off: languages, tables and code differ by that.
RULE_ERROR = 0.25
#: So many rows of earlier runs say more than the rule of thumb.
ENOUGH_ROWS = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row of the sample: where it is, and how long its prompt is."""

    position: int
    key: tuple[SQLValue, ...]
    characters: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The rows that wait.

    Attributes:
        rows: how many there are.
        sample: some of them, in the order of the table.
        extra: characters that go with each prompt: the system prompt and the schema.
        attachments: whether anything goes with them that is no text.
        stale: whether they wait because their answers are out of date.
    """

    rows: int
    sample: list[Sampled]
    extra: int
    attachments: bool = False
    stale: bool = False

    @property
    def asked(self) -> int:
        """How many of the rows have something to ask, as the sample says."""
        if not self.sample:
            return 0
        share = sum(each.characters > 0 for each in self.sample) / len(self.sample)
        return round(self.rows * share)

    @property
    def characters(self) -> float:
        """The characters sent for a row that is asked about, on average."""
        lengths = self._lengths()
        return statistics.fmean(lengths) if lengths else 0.0

    @property
    def error(self) -> float:
        """By which part of it the average may be off, in 19 of 20 samples."""
        lengths = self._lengths()
        if len(lengths) < 2 or len(self.sample) >= self.rows:
            return 0.0
        error: float = 1.96 * statistics.stdev(lengths) / len(lengths) ** 0.5 / self.characters
        return error

    def _lengths(self) -> list[int]:
        return [each.characters + self.extra for each in self.sample if each.characters]


async def survey(plan: Plan, size: int = SAMPLED_ROWS) -> Survey:
    """Count the rows that wait, and draw a sample from all of them.

    Raises:
        DatabaseError: the database cannot be read.
    """
    stretches: list[tuple[int, tuple[SQLValue, ...] | None]] = []
    after: tuple[SQLValue, ...] | None = None
    rows = 0
    while True:
        found, end = await read(plan.database, partial(plan.source.count, after=after))
        if found:
            stretches.append((rows, after))
        rows += found
        if end is None:
            break
        after = end
    whole = rows <= ALL_ROWS
    sample = await (_drawn(plan, size) if whole else _from_everywhere(plan, stretches, size))
    limit = plan.spec.limit
    extra = len(plan.spec.system or "") + (len(json.dumps(plan.schema)) if plan.schema else 0)
    return Survey(
        rows if limit is None else min(rows, limit), sample, extra, bool(plan.attachments), plan.spec.stale
    )


async def _drawn(plan: Plan, size: int) -> list[Sampled]:
    """Draw from all rows, each as likely as the others."""
    chosen = random.Random(0)  # The same table gives the same sample.
    sample: list[Sampled] = []
    rows = 0
    async for page in read_pages(plan.database, plan.source):
        for row in page:
            place = rows if rows < size else chosen.randrange(rows + 1)
            rows += 1
            if place >= size:
                continue
            sampled = _sampled(plan, row, rows)
            if place < len(sample):
                sample[place] = sampled
            else:
                sample.append(sampled)
    sample.sort(key=lambda each: each.position)
    return sample


async def _from_everywhere(
    plan: Plan, stretches: list[tuple[int, tuple[SQLValue, ...] | None]], size: int
) -> list[Sampled]:
    """Take the first rows of stretches all over a table that is too long to be read for this."""
    number = min(len(stretches), MOST_STRETCHES)
    each = -(-size // number)
    sample: list[Sampled] = []
    for place in range(number):
        before, after = stretches[place * len(stretches) // number]
        page, _ = await read(plan.database, partial(plan.source.page, after=after, size=each))
        sample += [_sampled(plan, row, before + number) for number, row in enumerate(page, 1)]
    return sample


def _sampled(plan: Plan, row: Row, position: int) -> Sampled:
    try:
        length = len(plan.content(row)[0])
    except RowError:
        length = 0
    return Sampled(position, row.key, length)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would take.

    Attributes:
        rows: how many rows would be asked about; fewer prompts are sent where rows ask the same.
        input_tokens: of all prompts.
        input_error: by which part of it that may be off.
        output_tokens: of all answers, if something is known of them.
        cost: in dollars: of the prompts, and of the answers if something is known of them; ``None`` if no
            price is known.
        input_cost: the part of the prompts.
        basis: what tokens are told from: ``"characters"``, ``"earlier runs"`` or ``"try"``.
        seconds: how long it takes, if that is known.
        attachments: there are attachments, whose tokens nobody has counted.
        batch_cost: what it costs in batches, if that was asked and a price is known.
        stale: the rows are those whose answers are out of date.
    """

    model: str
    rows: int
    input_tokens: int
    input_error: float
    output_tokens: int | None = None
    cost: float | None = None
    input_cost: float | None = None
    basis: str = "characters"
    seconds: float | None = field(default=None)
    attachments: bool = False
    batch_cost: float | None = None
    stale: bool = False

    @property
    def due(self) -> float | None:
        """What is to be paid, the way the job goes."""
        return self.cost if self.batch_cost is None else self.batch_cost

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as data that JSON can show."""
        data = {**asdict(self), "input_error": round(self.input_error, 4)}
        if self.batch_cost is None:
            del data["batch_cost"]
        return data

    def line(self) -> str:
        """Return it as one line for people."""
        if not self.rows:
            nothing = "No answer is stale" if self.stale else "No row is waiting for a value"
            return f"{nothing}: nothing would be sent to {self.model}"
        off = f" (give or take {self.input_error:.0%})" if self.input_error >= 0.005 else ""
        parts = [
            f"{counted(self.rows, 'row')} to {self.model}",
            f"about {counted(self.input_tokens, 'token')} in{off}",
        ]
        if self.attachments:
            parts.append("attachments not counted")
        if self.output_tokens is None:
            parts.append("answers unknown")
        else:
            parts.append(f"about {self.output_tokens:,} out")
        if self.cost is None:
            parts.append("no price known")
        else:
            answers = "" if self.output_tokens is not None else " and the answers"
            if self.batch_cost is None:
                parts.append(f"{dollars(self.cost)}{answers}")
            else:
                parts.append(f"{dollars(self.batch_cost)}{answers} in batches, {dollars(self.cost)} live")
        return ", ".join(parts)


def estimate_of(
    found: Survey,
    model_id: str,
    pricing: Pricing | None,
    *,
    input_per_row: float | None = None,
    output_per_row: float | None = None,
    basis: str = "characters",
) -> Estimate:
    """Return what a job would take.

    Args:
        found: the rows that wait.
        input_per_row: tokens that a row takes, where that is known; else told from characters.
        output_per_row: tokens of an answer, where that is known.
        basis: where they are known from.
    """
    rows = found.asked
    error = found.error
    if input_per_row is None:
        input_per_row = found.characters / CHARACTERS_A_TOKEN
        error = (error**2 + RULE_ERROR**2) ** 0.5
        basis = "characters"
    sent = round(rows * input_per_row)
    received = None if output_per_row is None else round(rows * output_per_row)
    return Estimate(
        model=model_id,
        rows=rows,
        input_tokens=sent,
        input_error=error,
        output_tokens=received,
        cost=pricing.cost(Usage(sent, received or 0)) if pricing else None,
        input_cost=pricing.cost(Usage(sent, 0)) if pricing else None,
        basis=basis,
        attachments=found.attachments and basis == "characters",
        stale=found.stale,
    )


async def estimate(plan: Plan, model: Any) -> Estimate:
    """Return what a job would take, from its rows and what earlier runs of it used; nothing is sent.

    Args:
        plan: of the job.
        model: as the facade gives it.
    """
    found = await survey(plan)
    known = await read(plan.database, partial(_used_before, plan=plan, model_id=model.model_id))
    pricing = model.pricing
    if known is None:
        return estimate_of(found, model.model_id, pricing)
    sent, received = known
    return estimate_of(
        found,
        model.model_id,
        pricing,
        input_per_row=sent,
        output_per_row=received,
        basis="earlier runs",
    )


async def estimate_job(datasette: Any, spec: JobSpec) -> Estimate:
    """Return what a job would take; nothing is sent, and nothing written.

    Raises:
        EnrichInputError: what was asked cannot be done.
        ModelNotFoundError: there is no such model, or not for this actor and purpose.
    """
    from datasette_llm.facade import LLM

    async with open_side():
        plan = await make_plan(datasette, spec)
        model = await LLM(datasette).model(spec.model, purpose=spec.purpose, actor=spec.actor)
        spec.check_model(model, plan.schema)
        found = await estimate(plan.for_model(model), model)
    cheaper = in_batches(model.pricing) if spec.batch else None
    if cheaper is None:
        return found
    usage = Usage(found.input_tokens, found.output_tokens or 0)
    return replace(found, batch_cost=cheaper.cost(usage))


def _used_before(conn: sqlite3.Connection, plan: Plan, model_id: str) -> tuple[float, float] | None:
    """Return the tokens in and out of a row, of earlier runs that asked the same of the same model."""
    if plan.job is None or not has_record(conn):
        return None
    schema = None if plan.schema is None else json.dumps(plan.schema, ensure_ascii=False)
    asked, sent, received = conn.execute(
        f"select sum(written + failed - reused), sum(input_tokens), sum(output_tokens) from {RUNS_TABLE}"
        " where job = ? and model = ? and prompt = ? and system is ? and schema is ?",
        (plan.job, model_id, plan.spec.prompt, plan.spec.system, schema),
    ).fetchone()
    if not asked or asked < ENOUGH_ROWS or not sent:
        return None
    return sent / asked, (received or 0) / asked
