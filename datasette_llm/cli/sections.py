"""Help in sections: an option says which one it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

Decorated = TypeVar("Decorated", bound="Callable[..., Any] | click.Command")


class _Option(click.Option):
    section = ""


class SectionedCommand(click.Command):
    """A command that shows its options in sections; those that name none come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, in the order in which their first options are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", ""), []).append(record)
        for name in [*filter(None, sections), *(("",) if "" in sections else ())]:
            with formatter.section(name or "Other"):
                formatter.write_dl(sections[name], col_max=26)


def section(name: str) -> Callable[..., Callable[[Decorated], Decorated]]:
    """Return what is like ``click.option`` and puts the option into this section."""

    class InSection(_Option):
        section = name

    def option(*names: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
        decorator: Callable[[Decorated], Decorated] = click.option(*names, cls=InSection, **attributes)
        return decorator

    return option
