"""The group of commands, which lets no key out."""

from __future__ import annotations

import traceback
from typing import Any

import click

from ..secrecy import redacted
from .options import InputProblem


class _Commands(click.Group):
    """Whatever one of the commands fails with, no key in use is printed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            clean = redacted(error.message)
            if clean == error.message:
                raise
            kind = InputProblem if error.exit_code == InputProblem.exit_code else click.ClickException
            raise kind(clean) from None
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            clean = redacted(told)
            if clean == told:
                raise
            click.echo(clean, err=True, nl=False)
            raise SystemExit(1) from None


@click.group(name="llm", cls=_Commands)
def llm_group() -> None:
    """Run language models over the tables of a database."""
