"""What is measured, against which ideal, and what it should come to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasette_llm.pace.policy import ConcurrencyBounds

from .work import Result, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    Results = dict[str, Result]

# Plain llm takes some 25 ms of CPU per prompt over HTTP: asked for everything it would take minutes.
PLAIN_PROMPTS = 200
PLAIN_PROMPTS_QUICK = 30


@dataclass(frozen=True)
class Target:
    """A figure, and what it should be at most (or at least)."""

    text: str
    limit: float
    figure: Callable[[Results], float]
    at_least: bool = False

    def met(self, figure: float) -> bool:
        """Say whether the figure is good enough."""
        return figure >= self.limit if self.at_least else figure <= self.limit


@dataclass(frozen=True)
class Scenario:
    """Some ways to do the same work, side by side in one session.

    Attributes:
        name: what ``--scenario`` takes.
        title: one line for the table.
        works: the measurements, by label.
        ideal: seconds that the work takes when nothing but the provider takes any; 0 if there is no such.
        targets: what the figures should come to.
        backends: where it makes sense.
        once: one run is enough.
    """

    name: str
    title: str
    works: dict[str, Work]
    ideal: float = 0.0
    targets: tuple[Target, ...] = ()
    backends: tuple[str, ...] = ("asyncio", "trio")
    once: bool = False

    def times_ideal(self, label: str, result: Result) -> float:
        """Return the wall time as a multiple of the ideal one, scaled to the number of prompts."""
        first = next(iter(self.works.values()))
        latency = float(first.server.get("latency", 0))
        return result.wall / max(self.ideal * result.n / first.n, latency) if self.ideal else 0.0

    def wall_target(self, label: str, limit: float) -> Target:
        """Return the target that this measurement takes at most so many times the ideal."""
        return Target(
            f"{label}: wall / ideal", limit, lambda results: self.times_ideal(label, results[label])
        )


def cpu_target(label: str, other: str, limit: float) -> Target:
    """Return the target that one costs at most so many times the CPU per prompt of another."""

    def figure(results: Results) -> float:
        return per_prompt(results[label]) / per_prompt(results[other])

    return Target(f"{label}: CPU / {other}", limit, figure)


def beats_aiometer() -> tuple[Target, Target]:
    """Return the targets that ``map`` takes less CPU and less time than aiometer on an openai client."""
    return (
        cpu_target("map", "aiometer", 0.85),
        Target("map: wall / aiometer", 0.85, lambda results: results["map"].wall / results["aiometer"].wall),
    )


def per_prompt(result: Result) -> float:
    """Return the CPU seconds of the client's process per prompt."""
    return result.cpu / result.n


def none_lost(label: str) -> Target:
    """Return the target that every prompt was answered, right, and once."""

    def figure(results: Results) -> float:
        result = results[label]
        return result.n - result.right + result.wrong + int(result.server["answered_twice"])

    return Target(f"{label}: lost + wrong + answered twice", 0, figure)


def refused(label: str, limit: float) -> Target:
    """Return the target that the provider refused at most this share of the prompts."""
    return Target(
        f"{label}: refused / N",
        limit,
        lambda results: results[label].server["statuses"].get("429", 0) / results[label].n,
    )


def all_scenarios(*, quick: bool = False) -> list[Scenario]:
    """Return them in the order in which they are run."""
    return [
        _steady(quick),
        _wide(quick),
        *_rate_limited(quick),
        _faulty(quick),
        _hopeless(quick),
        _fan_out(quick),
        _overhead(quick),
        _lookup(quick),
        _memory(quick),
        _page(quick),
        _workers(quick),
    ]


def _steady(quick: bool) -> Scenario:
    n, latency, concurrency = (400 if quick else 2000), 0.2, 100
    ours = Work("map", n, concurrency, server={"latency": latency})
    scenario = Scenario(
        "steady",
        f"{n:,} prompts, {latency * 1000:.0f} ms each, {concurrency} in flight",
        {
            "map": ours,
            "aiometer": replace(ours, way="aiometer"),
            "map streamed": replace(ours, stream=True),
            "aiometer streamed": replace(ours, way="aiometer", stream=True),
            "openai client": replace(ours, way="openai client"),
            "openai client streamed": replace(ours, way="openai client", stream=True),
            "plain llm": _plain(ours, quick, stream=True),
        },
        ideal=n * latency / concurrency,
    )
    return replace(
        scenario,
        targets=(
            scenario.wall_target("map", 1.12),
            cpu_target("map", "plain llm", 0.1),
            *beats_aiometer(),
            cpu_target("map", "openai client", 1.25),
            cpu_target("map streamed", "openai client streamed", 1.25),
            none_lost("map"),
        ),
    )


def _wide(quick: bool) -> Scenario:
    n, latency, concurrency = (1000 if quick else 5000), 0.5, 500
    ours = Work("map", n, concurrency, server={"latency": latency})
    scenario = Scenario(
        "wide",
        f"{n:,} prompts, {latency * 1000:.0f} ms each, {concurrency} in flight",
        {
            "map": ours,
            "aiometer": replace(ours, way="aiometer"),
            "openai client": replace(ours, way="openai client"),
            "plain llm": _plain(ours, quick, stream=True),
        },
        ideal=n * latency / concurrency,
    )
    return replace(
        scenario,
        targets=(scenario.wall_target("map", 1.7), *beats_aiometer(), none_lost("map")),
    )


def _rate_limited(quick: bool) -> list[Scenario]:
    """Nothing tuned: how many in flight the rate needs is for the package to find out."""
    rate, n = 100, (200 if quick else 1500)
    scenarios = []
    for needed in (20,) if quick else (4, 20, 150):
        limits = {"latency": needed / rate, "rate": rate, "burst": rate, "retry_after": "ms"}
        unannounced = Work("map", n, server=limits | {"retry_after": "none"})
        announced = Work("map", n, server=limits | {"ratelimit_headers": True})
        works = {"map, headers": announced, "map, no headers": unannounced}
        if needed == 20:
            works["openai client, headers"] = replace(announced, way="openai client", concurrency=100)
            works["plain llm, headers"] = _plain(replace(announced, concurrency=100), quick)
        scenario = Scenario(
            f"rate-{needed}",
            f"{n:,} prompts, {rate} a second allowed, which takes {needed} in flight",
            works,
            ideal=n / rate,
        )
        targets = (
            scenario.wall_target("map, headers", 1.05),
            scenario.wall_target("map, no headers", 1.10),
            refused("map, headers", 0.01),
            refused("map, no headers", 0.03),
            none_lost("map, headers"),
            none_lost("map, no headers"),
        )
        scenarios.append(replace(scenario, targets=targets))
    return scenarios


def _faulty(quick: bool) -> Scenario:
    n, latency, concurrency = (200 if quick else 1000), 0.2, 50
    faults = {"error_500": 0.03, "error_429": 0.02, "disconnect": 0.01}
    settings = {"latency": latency, "retry_after": "ms", "retry_after_seconds": 0.1, "seed": 1}
    ours = Work("map", n, concurrency, server=settings | faults)
    scenario = Scenario(
        "faulty",
        f"{n:,} prompts; 3 % of the requests meet a 500, 2 % a 429, 1 % a cut connection",
        {
            "map": ours,
            "map streamed, 1 % torn": replace(ours, stream=True, server=ours.server | {"torn": 0.01}),
            "aiometer": replace(ours, way="aiometer"),
            "openai client": replace(ours, way="openai client"),
            "plain llm, 1 % torn": replace(
                _plain(ours, quick, stream=True), server=ours.server | {"torn": 0.01}
            ),
        },
        ideal=n * latency / concurrency,
    )
    return replace(
        scenario,
        targets=(
            scenario.wall_target("map", 3),
            *beats_aiometer(),
            none_lost("map"),
            scenario.wall_target("map streamed, 1 % torn", 3),
            none_lost("map streamed, 1 % torn"),
        ),
    )


def _hopeless(quick: bool) -> Scenario:
    """Providers that never give an answer: it must end soon, in their own error.

    So few prompts that all have been sent when the first is refused: those behind would wait for the
    provider to recover, since only a prompt that was sent has begun to use up its time.
    """
    n, bound = (5 if quick else 10), (1.5 if quick else 5)
    config = {"retries": {"attempts": 3, "timeout": bound}, "timeout": bound / 5}
    ours = Work("map", n, config=config)
    hopeless: dict[str, dict[str, Any]] = {
        "refuses, says nothing": {"error_429": 1, "retry_after": "none"},
        "says: in an hour": {"error_429": 1, "retry_after_seconds": 3600},
        "answers 503": {"error_503": 1, "retry_after": "none"},
        "never answers": {"never": 1},
        "closes at once": {"close": 1},
        "broken stream": {"broken_sse": 1},
        "torn stream": {"torn": 1},
        "wrong key": {"api_key": "sk-other"},
    }
    works = {
        label: replace(ours, server=settings, stream="stream" in label)
        for label, settings in hopeless.items()
    }

    works["wrong key"] = replace(works["wrong key"], n=100 if quick else 2000)

    def slowest(results: Results) -> float:
        return max(result.wall for result in results.values())

    def unfailed(results: Results) -> float:
        return sum(result.n - result.failed for result in results.values())

    def requests(results: Results) -> float:
        return float(results["wrong key"].server["requests"])

    return Scenario(
        "hopeless",
        f"{n:,} prompts to providers that never give an answer; attempts and seconds are bounded",
        works,
        targets=(
            Target("slowest: seconds", bound * 1.2, slowest),
            Target("prompts that did not fail", 0, unfailed),
            Target("wrong key: requests", ConcurrencyBounds().start, requests),
        ),
        once=True,
    )


def _fan_out(quick: bool) -> Scenario:
    n, concurrency, latency, chunks, gap = (100 if quick else 400), 100, 0.2, 40, 0.02
    one = Work(
        "prompt",
        n,
        concurrency,
        stream=True,
        server={"latency": latency, "chunks": chunks, "chunk_seconds": gap},
    )
    return Scenario(
        "fan-out",
        f"{n:,} streams of {chunks} chunks, {concurrency} in flight, each read live by several tasks",
        {
            "prompt, 1 reader": one,
            "prompt, 4 readers": replace(one, readers=4),
            "openai client": replace(one, way="openai client"),
            "plain llm": _plain(one, quick),
        },
        ideal=n * (latency + chunks * gap) / concurrency,
    )


def _overhead(quick: bool) -> Scenario:
    n = 2_000 if quick else 20_000
    return Scenario(
        "overhead",
        f"{n:,} prompts to a model that answers at once, in process",
        {
            "map": Work("instant map", n),
            "prompt": Work("instant prompt", n),
            "plain llm": Work("instant plain llm", n),
        },
        targets=(cpu_target("map", "plain llm", 2.5), cpu_target("prompt", "plain llm", 8)),
    )


def _lookup(quick: bool) -> Scenario:
    n = 300 if quick else 2000
    return Scenario(
        "lookup",
        f"finding a model {n:,} times",
        {"await model()": Work("lookup", n), "llm.get_async_model": Work("lookup llm", n)},
        targets=(
            Target(
                "llm's lookup / ours",
                15,
                lambda results: (
                    per_prompt(results["llm.get_async_model"]) / per_prompt(results["await model()"])
                ),
                at_least=True,
            ),
        ),
    )


def _memory(quick: bool) -> Scenario:
    n = 20_000 if quick else 1_000_000

    def growth(results: Results) -> float:
        found = results["map"].extra
        return max(float(found["20 %"]), float(found["100 %"])) - float(found["1 %"])

    return Scenario(
        "memory",
        f"map over {n:,} items, in process",
        {"map": Work("memory", n)},
        targets=(Target("MB above the value at 1 %", 40, growth),),
        once=True,
    )


def _page(quick: bool) -> Scenario:
    concurrency = 100
    # A short answer of a fast model, and what most models take.
    short = Work("page", 300 if quick else 3000, concurrency, server={"latency": 0.5})
    works = {
        "enrich, 0.5 s an answer": short,
        "enrich, 2 s an answer": replace(short, n=200 if quick else 1000, server={"latency": 2.0}),
        "enrich beside the server, 0.5 s": replace(short, way="page beside"),
    }

    def slower(label: str) -> Callable[[Results], float]:
        def ratio(results: Results) -> float:
            found = results[label].extra
            return float(found["busy"]["p99_ms"]) / float(found["idle"]["p99_ms"])

        return ratio

    def not_enriched(results: Results) -> float:
        return sum(results[label].n - results[label].right for label in works)

    return Scenario(
        "page",
        f"a Datasette table page while its rows are enriched, {concurrency} in flight",
        works,
        targets=(
            *(Target(f"{label}: p99 of the page / idle", 3, slower(label)) for label in works),
            Target("rows not enriched", 0, not_enriched),
        ),
        backends=("asyncio",),
    )


def _workers(quick: bool) -> Scenario:
    """The prompts of "wide", by the process itself and by so many workers."""
    n, latency, concurrency = (200 if quick else 5000), 0.5, 500
    ours = Work("workers", n, concurrency, server={"latency": latency}, config={"workers": 0})
    works = {
        label: replace(ours, config={"workers": count})
        for label, count in {"none": 0, "1 worker": 1, "2 workers": 2, "4 workers": 4}.items()
    }
    page = replace(ours, way="page workers", n=200 if quick else 3000, concurrency=100, config={})

    def page_slower(results: Results) -> float:
        found = results["page, 1 worker"].extra
        return float(found["busy"]["p99_ms"]) / float(found["idle"]["p99_ms"])

    def longer(results: Results) -> float:
        return float(results["1 worker"].extra["one_more_ms"]) - float(results["none"].extra["one_more_ms"])

    return Scenario(
        "workers",
        f"{n:,} prompts, {latency * 1000:.0f} ms each, {concurrency} in flight, by workers; a page meanwhile",
        {**works, "page, 1 worker": page},
        ideal=n * latency / concurrency,
        targets=(
            Target(
                "1 worker: CPU of the coordinator, ms", 0.4, lambda found: per_prompt(found["1 worker"]) * 1e3
            ),
            Target("1 worker: one prompt takes longer, ms", 3, longer),
            Target("page, 1 worker: p99 of the page / idle", 1.3, page_slower),
            Target("not right", 0, lambda found: sum(each.n - each.right for each in found.values())),
        ),
        backends=("asyncio",),
        once=True,
    )


def _plain(ours: Work, quick: bool, *, stream: bool | None = None) -> Work:
    """Plain llm, on fewer of the same prompts; it streams, as it does unless told otherwise."""
    n = min(ours.n, PLAIN_PROMPTS_QUICK if quick else PLAIN_PROMPTS)
    return replace(ours, way="plain llm", n=n, stream=ours.stream if stream is None else stream)
