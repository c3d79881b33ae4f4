"""The prompt of a job: a Jinja template over one row, checked before anything is sent.

Every column is a variable of its own name, and ``row`` holds them all, for names that Jinja cannot
spell: ``{{ row["odd name"] }}`` (a column called ``row`` is ``row["row"]``). Decided here:

* A name that is no column is an error when the template is compiled, not when row 17,000 needs it.
* NULL renders as nothing, is falsy and ``is none``.
* A blob renders as its text if it is UTF-8; otherwise it is that row's error.
* The environment is jinja2's immutable sandbox; what the sandbox would refuse while rendering and
  can be seen in the source (``x.__class__``) is refused at once, and so is reading other templates.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import EnrichInputError, RowError
from ..telling.words import counted, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..sql import SQLValue


class _Null(str):
    """SQL's NULL inside a template: an empty string that says ``is none``.

    A plain ``None`` would be sent as the word "None" by most filters and by ``~``.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other) is True

    def __hash__(self) -> int:
        return str.__hash__(self)


NULL = _Null()


def _plain(value: Any) -> Any:
    """Return what JSON should show for a value of a template."""
    if value is NULL:
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return _finalize(value)
    return value


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own escapes <, > and & for HTML pages, which a prompt is not.
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent)


def _finalize(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            size = counted(len(value), "byte")
            raise RowError(f"the prompt shows a blob that is not text ({size})") from None
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_finalize, autoescape=False, keep_trailing_newline=True
    )
    env.globals.pop("lipsum")
    env.filters["tojson"] = _tojson
    env.tests["none"] = lambda value: value is None or value is NULL
    return env


class PromptTemplate:
    """A compiled prompt.

    Attributes:
        source: the template as it was written.
        columns: the columns it reads, in the order of the table; the others need not be fetched.
    """

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Compile a template for a table with these columns.

        Raises:
            EnrichInputError: the syntax is wrong, a name is no column, or it tries to leave the sandbox.
        """
        self.source = source
        if not source.strip():
            raise EnrichInputError("The prompt is empty")
        env = _environment()
        try:
            tree = env.parse(source)
            self._template = env.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise EnrichInputError(f"The prompt is no valid template, line {error.lineno}: {error}") from None
        used = _check(tree, columns, env.globals)
        inner = source.strip()[2:-2].strip("-+") if _is_one_expression(tree) else None
        self._expression = None if inner is None else env.compile_expression(inner, undefined_to_none=False)
        self.columns = tuple(column for column in columns if column in used)

    def render(self, values: Mapping[str, SQLValue]) -> str:
        """Return the prompt for one row; it is empty if there is nothing to ask, or only white space.

        Raises:
            RowError: the template fails on this row.
            EnrichInputError: the template tried to leave the sandbox.
        """
        prompt: str = self._evaluated(self._template.render, values)
        return prompt if prompt.strip() else ""

    def value(self, values: Mapping[str, SQLValue]) -> Any:
        """Return the value of a template that is one expression, bytes as they are; else what it renders to.

        Raises:
            RowError: the template fails on this row.
            EnrichInputError: the template tried to leave the sandbox.
        """
        value = self._evaluated(self._expression or self._template.render, values)
        if isinstance(value, jinja2.Undefined):
            raise RowError("the prompt cannot be rendered: it uses something that a row does not have")
        return value

    def _evaluated(self, evaluate: Callable[[dict[str, Any]], Any], values: Mapping[str, SQLValue]) -> Any:
        shown = {name: NULL if value is None else value for name, value in values.items()}
        try:
            return evaluate({**shown, "row": shown})
        except SecurityError as error:
            raise EnrichInputError(f"The prompt tries to leave the template sandbox: {error}") from None
        except RowError:
            raise
        except Exception as error:
            raise RowError(f"the prompt cannot be rendered: {type(error).__name__}: {error}") from error


def _is_one_expression(tree: nodes.Template) -> bool:
    match tree.body:
        case [nodes.Output(nodes=[inner])]:
            return not isinstance(inner, nodes.TemplateData)
    return False


def _check(tree: nodes.Template, columns: Sequence[str], env_globals: Mapping[str, Any]) -> set[str]:
    """Check every name in a template; return the columns that it uses."""
    for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
        for node in tree.find_all(kind):
            raise EnrichInputError(
                f"The prompt, line {node.lineno}: a template over a row cannot read other templates"
            )
    for attribute in tree.find_all(nodes.Getattr):
        _refuse_underscore(attribute.attr, attribute.lineno)
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and not _is_row(item.node):
            _refuse_underscore(item.arg.value, item.lineno)
    for attr_filter in tree.find_all(nodes.Filter):
        if attr_filter.name in ("attr", "map", "selectattr", "rejectattr"):
            for constant in attr_filter.find_all(nodes.Const):
                _refuse_underscore(constant.value, attr_filter.lineno)

    names = meta.find_undeclared_variables(tree)
    unknown = names - set(columns) - set(env_globals) - {"row"}
    if unknown:
        name = sorted(unknown)[0]
        raise _unknown_column(name, columns)
    used = names & set(columns) - {"row"}
    if "row" not in names:
        return used
    keys = _row_keys(tree)
    if keys is None:
        return set(columns)
    for key in keys - set(columns):
        raise _unknown_column(key, columns)
    return used | keys


def _row_keys(tree: nodes.Template) -> set[str] | None:
    """Return the keys that ``row`` is read by, or ``None`` if they are not all in the source."""
    keys: set[str] = set()
    plain_uses = sum(1 for name in tree.find_all(nodes.Name) if name.name == "row")
    items, attributes = tree.find_all(nodes.Getitem), tree.find_all(nodes.Getattr)
    reads: list[nodes.Getitem | nodes.Getattr] = [*items, *attributes]
    for item in reads:
        if not _is_row(item.node):
            continue
        if isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const):
            keys.add(str(item.arg.value))
        elif isinstance(item, nodes.Getattr) and not hasattr(dict, item.attr):
            keys.add(item.attr)
        else:
            return None
        plain_uses -= 1
    return keys if not plain_uses else None


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "row"


def _refuse_underscore(name: object, line: int) -> None:
    if isinstance(name, str) and name.startswith("__"):
        raise EnrichInputError(f"The prompt, line {line}: {name!r} is outside of the template sandbox")


def _unknown_column(name: str, columns: Sequence[str]) -> EnrichInputError:
    known = nearest(name, columns, what="the columns are")
    hint = "" if "row" in name else 'Write a name with spaces or signs as {{ row["..."] }}'
    end = " " if known.endswith("?") else ". "
    return EnrichInputError(
        f"The prompt uses {name!r}, which is no column: {known}" + (end + hint if hint else "")
    )
