"""The model that a job asks, and the group that its prompts run in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette_llm.access.settings import get_settings
from datasette_llm.calls.workers import workers_from
from datasette_llm.pace.policy import Patience

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from .plan import Plan
    from .spec import JobSpec
    from .telling.report import EnrichReport

# How long a provider that cannot be reached is waited for; and one that never was.
OUTAGE_SECONDS = 30 * 60.0
FIRST_CONTACT_SECONDS = 10.0


def open_group(datasette: Any, spec: JobSpec) -> AbstractAsyncContextManager[Any]:
    """Open the group of a job."""
    from datasette_llm.facade import LLM

    group: AbstractAsyncContextManager[Any] = LLM(datasette).group(
        spec.model,
        purpose=spec.purpose,
        actor=spec.actor,
        concurrency=spec.concurrency,
        wait_for_quota=spec.wait_for_quota or 0.0,
        timeout=spec.timeout,
        outage_timeout=_patience(datasette, spec),
        workers=workers_from(spec.workers, timeout=spec.workers_timeout) or spec.workers,
    )
    return group


def _patience(datasette: Any, spec: JobSpec) -> Patience:
    """Say how long to wait for a provider that is away."""
    if spec.outage_timeout is not None:
        return Patience(spec.outage_timeout, together=True)
    configured = get_settings(datasette).prompt_settings(spec.purpose, None).outage_timeout
    return Patience(configured or OUTAGE_SECONDS, together=True, first_contact=FIRST_CONTACT_SECONDS)


async def for_its_model(datasette: Any, spec: JobSpec, plan: Plan, report: EnrichReport) -> Plan:
    """Return the plan for the model that the job would use, without a group."""
    from datasette_llm.facade import LLM

    model = await LLM(datasette).model(spec.model, purpose=spec.purpose, actor=spec.actor)
    spec.check_model(model, plan.schema)
    report.model = model.model_id
    return plan.for_model(model)
