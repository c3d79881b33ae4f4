"""The rows of a job, asked about: which are sent, what came back, and what that makes of each row.

Rows are read and rendered a page at a time. A row is skipped (nothing to ask), has its answer already (the
same question was answered before), waits (the same question is on its way), or is sent. What comes back
goes to the writer: values, or the row's failure.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from datasette_llm.backends.pages_first import GivingWay
from datasette_llm.calls.failures import words_of
from datasette_llm.calls.prices import cost_of
from datasette_llm.errors import PromptCancelled, ProviderUnreachable
from datasette_llm.responses.outcome import used_tokens
from datasette_llm.secrecy import redacted

from .answers.whole import check_finish, of_the_answer
from .attaching import load
from .database import read
from .errors import DatabaseError, RowError
from .reading.answered import find_answers
from .reading.pages import read_pages
from .refusals import Refusals, stop_reason
from .reuse import Answer, Questions
from .spacing import Spacing
from .telling.kinds import kind_of
from .trouble import Watch
from .writing.results import Result
from .writing.skipped import Forgetter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    import llm

    from datasette_llm.responses.response import PromptResponse

    from .ledger import Ledger
    from .plan import Plan
    from .reading.selection import Row
    from .telling.report import EnrichReport
    from .telling.stopped import RefusedReason
    from .writing.llm_log import LlmLog
    from .writing.writer import Writer

#: Prompts rendered in one turn of the event loop: half a millisecond, of which no page notices anything.
RENDERED_PER_TURN = 10


@dataclass(frozen=True, slots=True)
class Asked:
    """A row and its question.

    Attributes:
        prompt: empty if there is nothing to ask.
        question: the hash of what is sent.
        error: why there is no prompt.
        pulled: when it was sent.
        attachments: what is sent with it.
    """

    row: Row
    prompt: str
    question: bytes
    error: RowError | None = None
    pulled: float = 0.0
    attachments: Sequence[llm.Attachment] = ()


class Asking:
    """Asks about the rows of one job, in the task that calls `run`."""

    def __init__(
        self,
        plan: Plan,
        model: Any,
        writer: Writer,
        ledger: Ledger,
        report: EnrichReport,
        stop: Callable[..., None],
        log: LlmLog | None = None,
        *,
        batch: bool = False,
        share: bool = True,
    ) -> None:
        """Prepare to ask.

        Args:
            plan: with the hash of its questions.
            model: the group's.
            log: what keeps the responses for llm.
            stop: the job's: called with a reason, and the seconds of grace for prompts in flight.
            batch: prompts are answered in batches: there is no hurry to avoid, and what first rows were
                refused with was not paid for.
            share: rows wait here for what another row has asked, where the job is to ask it once.
        """
        self._plan = plan
        self._model = model
        self._writer = writer
        self._ledger = ledger
        self._report = report
        self._stop = stop
        self._log = log
        self._spacing = None if batch else Spacing()
        self._giving_way = GivingWay()
        self._refusals = Refusals(tolerant=batch or plan.spec.max_failures is not None)
        self._questions: Questions[Row] = Questions(reuse=plan.spec.reuse and share)
        # Failures of rows that waited for a question whose failure is held back.
        self._with_held: dict[int, list[Result]] = {}

    async def run(self) -> None:
        """Ask until the rows, or the reasons to go on, run out; returns when the last answer is taken."""
        try:
            async for asked, response in self._model.map(self.work(), prompt_of, **self.keywords):
                await self.take(asked, response)
        finally:
            self._record(self._refusals.held)

    @property
    def keywords(self) -> dict[str, Any]:
        """What every prompt is sent with."""
        return self._plan.spec.prompt_keywords(self._plan.schema)

    async def take(self, asked: Asked, response: PromptResponse) -> None:
        """Make of an answer the row's values, or its failure."""
        spec, outputs = self._plan.spec, self._plan.outputs
        try:
            text = await response.text()
            if self._log is not None:
                await self._log.add(response)
            check_finish(response, text, allow_cut=spec.allow_cut)
            values = outputs.parse(text)
        except PromptCancelled:
            self._questions.given_up(asked.question)  # Neither answered nor failed: for the next run.
        except ProviderUnreachable as error:
            self._leave(asked)
            self._stop_refused("unreachable", str(error))
        except Exception as error:
            self.fail(asked, of_the_answer(response, error), response)
        else:
            self._ledger.answer()
            if self._spacing is not None:
                self._spacing.answered(anyio.current_time() - asked.pulled)
            answer = Answer(values, *used_tokens(response))
            cost = cost_of(response, self._model.pricing)
            self._writer.add(replace(_result(asked.row, asked.question, answer), cost=cost))
            for row in self._questions.answered(asked.question, answer):
                self._ledger.shared()
                self._reuse(row, asked.question, answer)
            self._record(self._refusals.decide())

    def fail(self, asked: Asked, error: Exception, response: PromptResponse) -> None:
        """Take note that a row has failed, and of those that wait for the same answer."""
        ledger, refusals, refusal = self._ledger, self._refusals, self._model.refusal
        refused = stop_reason(refusal, error)
        if refused is not None:
            refusals.held.clear()
            self._with_held.clear()
            self._leave(asked)
            self._stop_refused(refused, words_of(refusal.error))
            self._report.quota_seconds = refusal.retry_after
            return
        ledger.answer(error)
        failure = self._failure(asked.row, error, response)
        # The same question: the same would come of it.
        shared = [self._failure(row, error) for row in self._questions.given_up(asked.question)]
        for _ in shared:
            ledger.shared(failed=True)
        self._with_held[id(failure)] = shared
        self._record(refusals.failed(failure))
        if refusals.alike is not None:
            self._with_held.clear()
            self._stop_refused("refused_alike", refusals.alike)

    def _leave(self, asked: Asked) -> None:
        """A row, and those that waited for its answer, are for the next run."""
        self._ledger.leave()
        for _ in self._questions.given_up(asked.question):
            self._ledger.shared()

    def _record(self, results: list[Result]) -> None:
        for result in results:
            self._writer.add(result)
            for shared in self._with_held.pop(id(result), ()):
                self._writer.add(shared)

    def _stop_refused(self, reason: RefusedReason, words: str) -> None:
        """Stop since the provider would refuse every other row too."""
        self._report.refusal = self._report.refusal or redacted(words)
        self._stop(reason)

    async def work(self) -> AsyncGenerator[Asked, None]:
        """Yield the rows to send, until the rows or the reasons to go on run out."""
        forgetter = Forgetter(self._plan)
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                asked = await self._rendered(page)
                await self._look_up(asked)
                for each in asked:
                    await self._writer.ready()
                    await self._ledger.unpaused()
                    await self._giving_way.wait()
                    if self._ledger.is_over():
                        await forgetter.flush()
                        return
                    if not each.prompt and each.error is None:
                        self._ledger.skip(each.row)
                        await forgetter.add(each.row.key)
                    elif await self.is_to_send(each):
                        ready = await self._with_attachments(replace(each, pulled=await self._send_time()))
                        if ready is not None:
                            yield ready
        await forgetter.flush()

    async def _send_time(self) -> float:
        """Wait until the next prompt may leave; return when that is."""
        now = anyio.current_time()
        wait = 0.0 if self._spacing is None else self._spacing.wait(now, self._model.stats.concurrency)
        if wait:
            await anyio.sleep(wait)
        return now + wait

    async def is_to_send(self, asked: Asked) -> bool:
        """Say whether a row is to be sent: its answer is not known, and no other row has asked the same."""
        ledger = self._ledger
        ledger.pull(asked.row)
        if asked.error is not None:
            ledger.answer(asked.error)
            self._writer.add(self._failure(asked.row, asked.error))
            return False
        known = self._questions.answer_to(asked.question)
        if known is not None:
            ledger.answer()
            self._reuse(asked.row, asked.question, known)
            return False
        ledger.wait()
        if await self._questions.ask_or_wait(asked.question, asked.row):
            ledger.send()
            return True
        return False

    async def _with_attachments(self, asked: Asked) -> Asked | None:
        """Return what is sent with what is attached to it; nothing if that cannot be had."""
        plan = self._plan
        if not plan.attachments:
            return asked

        def load_them() -> list[llm.Attachment]:
            return load(plan.content(asked.row)[1], plan.takes)

        try:
            return replace(asked, attachments=await anyio.to_thread.run_sync(load_them))
        except RowError as error:
            self._ledger.answer(error)
            self._writer.add(self._failure(asked.row, error))
            for row in self._questions.given_up(asked.question):
                self._ledger.shared(failed=True)
                self._writer.add(self._failure(row, error))
            return None

    def _reuse(self, row: Row, question: bytes, answer: Answer) -> None:
        self._ledger.save(answer)
        self._writer.add(
            _result(row, question, answer._replace(input_tokens=0, output_tokens=0), reused=True)
        )

    async def _rendered(self, page: list[Row]) -> list[Asked]:
        asked: list[Asked] = []
        for begin in range(0, len(page), RENDERED_PER_TURN):
            rows = page[begin : begin + RENDERED_PER_TURN]
            if self._plan.attachments:  # Files are read.
                asked += await anyio.to_thread.run_sync(self._render, rows)
            else:
                asked += self._render(rows)
                await checkpoint()
        return asked

    def _render(self, rows: list[Row]) -> list[Asked]:
        asked = []
        for row in rows:
            try:
                prompt, question = self._plan.question(row)
            except RowError as error:
                asked.append(Asked(row, "", b"", error))
            else:
                asked.append(Asked(row, prompt, question))
        return asked

    async def _look_up(self, page: list[Asked]) -> None:
        """Find the questions of a page that earlier runs have had answered."""
        plan, questions = self._plan, self._questions
        if plan.job is None or not plan.may_reuse_earlier:
            return
        unknown = {
            asked.question for asked in page if asked.prompt and not questions.answer_to(asked.question)
        }
        names = [output.name for output in plan.outputs.columns]
        if not unknown or len(plan.outputs.existing) < len(names):
            return
        try:
            find = partial(find_answers, job=plan.job, table=plan.table, columns=names, questions=unknown)
            questions.learn(await read(plan.database, find))
        except DatabaseError:
            return  # It may be asked all the same; whoever reads rows or writes answers says what is wrong.

    async def _pages(self) -> AsyncGenerator[list[Row], None]:
        """Yield the rows of the table, as long as it can be read."""
        plan = self._plan
        watch = Watch(plan.spec.lock_timeout)
        self._ledger.watches.append(watch)
        try:
            async with aclosing(read_pages(plan.database, plan.source, watch=watch)) as pages:
                async for page in pages:
                    yield page
        except DatabaseError as error:
            self._ledger.trouble = self._ledger.trouble or str(error)
            self._stop("database", grace_seconds=GRACE_SECONDS)

    def _failure(self, row: Row, error: Exception, response: PromptResponse | None = None) -> Result:
        message = self._ledger.message_of(error)
        if response is None:
            return Result(row, None, error, kind_of(error), message, attempts=0)
        sent, received = used_tokens(response)
        return Result(
            row,
            None,
            error,
            kind_of(error),
            message,
            response.attempts,
            input_tokens=sent,
            output_tokens=received,
            cost=cost_of(response, self._model.pricing),
        )


#: Prompts in flight when a job must stop are paid for, and completed; one that hangs must not keep the job.
GRACE_SECONDS = 60.0


def prompt_of(asked: Asked) -> str | dict[str, Any]:
    """Return what a row is asked, as `map()` takes it."""
    if not asked.attachments:
        return asked.prompt
    return {"prompt": asked.prompt, "attachments": asked.attachments}


def _result(row: Row, question: bytes, answer: Answer, *, reused: bool = False) -> Result:
    return Result(
        row,
        answer.values,
        question=question,
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        no_value=all(value is None for value in answer.values),
        reused=reused,
    )
