"""What several commands take: types and options, and what is said of a wrong one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

# Generic to type checkers since click 8.4, and not at run time before it.
if TYPE_CHECKING:
    _ParamType = click.ParamType[float]
else:
    _ParamType = click.ParamType

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class InputProblem(click.ClickException):
    """What was asked cannot be done; nothing was sent."""

    exit_code = 2


class Duration(_ParamType):
    """A time as people write it: 90, 90s, 45m, 1h30m, 2d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        text = value.strip().lower().replace(" ", "")
        if re.fullmatch(r"\d+(\.\d+)?", text):
            text += "s"
        if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
            self.fail(f"{value!r} is no duration: write 90s, 45m, 1h30m or 2d", param, ctx)
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
        return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


CONFIG_NAMES = ("--config",)
CONFIG: dict[str, Any] = {
    "type": click.Path(exists=True, dir_okay=False),
    "help": "Datasette's configuration file: models, purposes and keys are taken from it.",
}
CONFIG_OPTION = click.option(*CONFIG_NAMES, **CONFIG)
INTERNAL_NAMES = ("--internal",)
INTERNAL: dict[str, Any] = {
    "type": click.Path(dir_okay=False),
    "help": "Datasette's internal database, where datasette-secrets keeps keys.",
}
INTERNAL_OPTION = click.option(*INTERNAL_NAMES, **INTERNAL)
