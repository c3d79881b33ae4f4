"""The actors: supervisors, and the tasks that they own.

Knows how a prompt, a chain, a map and a group begin, are cancelled and end, and runs plugins' wrappers around
them. Knows nothing of configuration, tables or pages. A prompt enters through its supervisor (`group` or
`root`), lives as a `prompt_task`, and goes on to `calls` for its answer.
"""
