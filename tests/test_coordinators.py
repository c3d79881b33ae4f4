"""The simulation of docs/scaling.md: many coordinators that share a provider's limit."""

from __future__ import annotations

from benchmarks.coordinators import WAYS, parts_of, share


def test_parts_add_up() -> None:
    sizes = parts_of(1000, 7, 0.75)
    assert (sum(sizes), len(sizes)) == (1000, 7)
    assert min(sizes) > 20


async def test_coordinators_that_have_a_part_of_the_limit_each_keep_it_together() -> None:
    even, uneven, queued, _ = WAYS
    shared = await share(even, 5, 500, 50.0)
    assert (shared.refused, shared.lost) == (0, 0)
    assert shared.seconds < 1.3 * shared.ideal
    assert (await share(uneven, 5, 500, 50.0)).seconds > shared.seconds
    assert (await share(queued, 5, 500, 50.0)).lost == 0
