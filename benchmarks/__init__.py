"""Benchmarks: bulk prompts against a local OpenAI-compatible server, and in process.

``python -m benchmarks`` runs them. The layers, each importing only from those above it:

- ``provider`` what the pretended provider answers: latency, limits, faults, and what it counts
- ``wire`` HTTP/1.1 over asyncio, as little of it as a provider's client needs
- ``server`` both as a process of their own; ``launch`` starts, configures and ends that process
- ``rows`` a real table, and the prompts made of its rows
- ``ways`` the ways to do the same work: this package, plain llm, a loop over the openai client
- ``measure`` one measurement, in a process of its own
- ``scenarios`` what is measured, against which ideal and which target
- ``report`` table, JSON, ``README.md``; ``chart`` the SVG

Beside them, two long runs: ``soak`` (with its ``load`` and ``gauges``) and ``kill``.
"""
