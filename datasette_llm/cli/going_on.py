"""The options of a command line once more: for the command to go on with, and for a trial's whole run."""

from __future__ import annotations

import click

from .options import Duration


def given(ctx: click.Context) -> list[tuple[str, str | None]]:
    """Return the options of the command line, for a command to go on with; never a key."""
    given: list[tuple[str, str | None]] = []
    for param in ctx.command.params:
        if not isinstance(param, click.Option) or param.name is None:
            continue
        if ctx.get_parameter_source(param.name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        flag = param.opts[0]
        value = ctx.params[param.name]
        if param.name == "key":
            given.append((flag, value if _is_stored_key(value) else "YOUR_KEY"))
        elif isinstance(param.type, Duration):
            given.append((flag, f"{value:g}s"))
        elif param.is_flag:
            given.append((flag, None))
        elif param.name == "models":
            given.append((flag, value[-1]))
        elif param.multiple:
            for each in value:
                first, *more = [each] if isinstance(each, str) else each
                given += [(flag, str(first)), *((str(word), None) for word in more)]
        else:
            given.append((flag, str(value)))
    return given


def of_the_whole(options: list[tuple[str, str | None]]) -> list[str]:
    """Return the options of the whole run, for that of a trial."""
    words = []
    for name, value in options:
        if name not in ("--try", "--json"):
            words += [name] if value is None else [name, value]
    return words


def _is_stored_key(name: str) -> bool:
    import llm

    return name in llm.load_keys()
