"""``datasette llm enrich``: a prompt for every row of a table."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from ..secrecy import keep_secret
from .before import asking_first, show_estimate, show_trial
from .inputs import read_prompt, read_schema_argument
from .options import CONFIG_OPTION, INTERNAL_OPTION, Duration
from .running import check_header, make_datasette, run_job

_PURPOSE = "enrichments"


@click.command(name="enrich")
@click.argument("database", type=click.Path(exists=True, dir_okay=False))
@click.argument("table")
@click.argument("prompt")
@click.option("--column", metavar="NAME", help="Receives the answers; added if it does not exist.")
@click.option(
    "--model", "-m", "models", multiple=True, metavar="ID", help="Id or alias; else the configured default."
)
@click.option("--system", "-s", metavar="TEXT", help="System prompt, the same for every row.")
@click.option(
    "--option",
    "-o",
    "options",
    type=(str, str),
    multiple=True,
    metavar="NAME VALUE",
    help="Option of the model, such as: -o temperature 0.2",
)
@click.option(
    "--schema",
    metavar="SCHEMA",
    help="One column per property, typed: 'name, age int, bio: one sentence', JSON schema, a file "
    "with one, t:NAME for that of a template of llm, or an id of llm schemas.",
)
@click.option("--where", metavar="SQL", help="Only rows for which this condition holds.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask about N rows at most.")
@click.option(
    "--try",
    "number",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask about N rows from all of the table, show the answers and what all would take; write nothing. "
    "Several -m are compared.",
)
@click.option("--estimate", is_flag=True, help="Say what it would take: rows, tokens, cost; send nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask, however much it may cost (confirm_above).")
@click.option("--dry-run", is_flag=True, help="Count the rows, show the first three prompts; send nothing.")
@click.option("--overwrite", is_flag=True, help="Also ask about rows that have a value, and replace it.")
@click.option(
    "--stale",
    is_flag=True,
    help="Only ask again where the question has changed: the row, prompt, model, options or schema.",
)
@click.option("--no-reuse", is_flag=True, help="Send every prompt, also where another row asked the same.")
@click.option("--no-record", is_flag=True, help="Keep no record of the run and of what values answer.")
@click.option("--retry-failed", is_flag=True, help="Only ask about rows that failed before.")
@click.option("--allow-cut", is_flag=True, help="Also write answers that ran out of tokens.")
@click.option("--allow-empty", is_flag=True, help="Also write text answers that are empty.")
@click.option(
    "--purpose", default=_PURPOSE, show_default=True, help="What the prompts are for, as configured."
)
@click.option("--key", metavar="KEY", help="API key, or the name of one stored with: llm keys set NAME")
@CONFIG_OPTION
@INTERNAL_OPTION
@click.option(
    "--concurrency", type=click.IntRange(min=1), metavar="N", help="Prompts in flight; adapts by default."
)
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when N rows have failed: the provider is down, say. By default, when 100 in a row have.",
)
@click.option(
    "--max-tokens-total",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when about N tokens, in and out together, are spent.",
)
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, min_open=True),
    metavar="DOLLARS",
    help="Stop when about so much is spent: passed by no more than what is in flight.",
)
@click.option(
    "--deadline",
    type=Duration(),
    metavar="DURATION",
    help="Stop after this time: 90s, 45m, 1h30m. Prompts in flight are completed.",
)
@click.option(
    "--lock-timeout",
    type=Duration(),
    default=60.0,
    show_default="60s",
    metavar="DURATION",
    help="Wait so long for a database that is locked or cannot be written; answers are kept meanwhile.",
)
@click.option(
    "--wait-for-quota",
    type=Duration(),
    metavar="DURATION",
    help="When the provider's quota is used up, wait for it if it is back within this time: 12h. "
    "By default the job stops.",
)
@click.option("--timeout", type=Duration(), metavar="DURATION", help="One attempt takes so long at most: 5m.")
@click.option(
    "--outage-timeout",
    type=Duration(),
    metavar="DURATION",
    help="Wait so long for a provider that cannot be reached: 2h. By default 30 minutes, but 10 seconds if "
    "it never answered.",
)
@click.option("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary, only errors.")
@click.pass_context
def enrich_command(
    ctx: click.Context,
    /,
    database: str,
    table: str,
    prompt: str,
    key: str | None,
    config: str | None,
    internal: str | None,
    backend: str,
    as_json: bool,
    quiet: bool,
    options: tuple[tuple[str, str], ...],
    no_reuse: bool,
    no_record: bool,
    number: int | None,
    estimate: bool,
    yes: bool,
    models: tuple[str, ...],
    **asked: Any,
) -> None:
    """Run a prompt for every row of a table, and write the answers into a column of it.

    PROMPT is a Jinja template over the row: every column is a variable, and a name with spaces or
    signs is {{ row["odd name"] }}. NULL renders as nothing. PROMPT "-" is read from standard input,
    "@prompt.txt" from that file.

    \b
      datasette llm enrich data.db articles 'Summarize: {{ body }}' --column summary
      datasette llm enrich data.db reviews '{{ text }}' \\
          --schema 'sentiment, score int: from 1 to 5' --where 'text is not null'

    Only rows that have no value yet are asked about, and answers are written as they arrive, so
    that the same command goes on where it was stopped. Rows that fail are recorded in the table
    _llm_enrich_errors and do not stop the others. They still have no value, so the next run tries
    them again; --retry-failed tries only them. An answer to a row that was deleted, or whose text
    was edited meanwhile, is dropped.

    Only whole answers are written. A row fails whose answer was cut off, filtered, refused or empty,
    or does not fit the schema; the summary says how many of each, and what to do. Reasoning
    (<think>...</think>) and white space around an answer are left out. A row whose prompt is empty,
    because its column is, is skipped: nothing is sent, and nothing is wrong.

    While another program has the database locked, or its disk is full, nothing is sent. After
    --lock-timeout the job ends, and leaves the answers that are not in the table in a file beside the
    database, DATABASE-llm-answers.jsonl. The next run writes those first.

    What no other row could escape stops the job at once: a wrong key, no money, no such model, a
    quota that is used up, a refusal that the first rows all get alike. It says what to do, and those
    rows are not recorded as failed.

    Ctrl-C stops: prompts in flight get a few seconds, what was answered is written, and the command
    to go on with is shown. A second Ctrl-C stops at once.

    \b
    Exit codes:
      0    all is done, or the deadline, the number of tokens or the cost was reached
      1    rows failed, or the job could not go on: no money or quota is left, say
      2    the command cannot be run as it is: nothing was sent
      130  stopped by Ctrl-C
      143  stopped by SIGTERM
    """
    from ..enrich.command import exit_code, go_on
    from ..enrich.spec import JobSpec
    from ..enrich.telling.display import open_display
    from ..enrich.telling.invocation import datasette_command

    if asked["column"] is None and asked["schema"] is None:
        raise click.UsageError(
            "Say where the answers go: --column NAME, or --schema for one column per property."
        )
    check_header(database)
    if asked["schema"] is not None:
        asked["schema"] = read_schema_argument(asked["schema"])
    spec = JobSpec(
        database="",
        table=table,
        prompt=read_prompt(prompt),
        options=dict(options),
        key=_resolve_key(key),
        reuse=not no_reuse,
        record=not no_record,
        by=_user(),
        model=models[-1] if models else None,
        **asked,
    )
    make = partial(make_datasette, [database], config, internal)
    if number is not None:
        command = datasette_command("llm", "enrich", database, table, prompt, *_words(_given(ctx)))
        ctx.exit(
            show_trial(make, spec, backend, number=number, models=models, command=command, as_json=as_json)
        )
    if estimate:
        show_estimate(make, spec, backend, as_json=as_json)
        ctx.exit(0)
    display = open_display(quiet=quiet)
    report = run_job(make, spec, display, backend, asking_first(yes=yes, quiet=quiet))
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        click.echo(report.summary())
    if not quiet:
        notes = not report.dry_run and (report.stopped or report.failed)
        if notes:
            click.echo(f"Go on with:\n  {go_on(report, [database, table, prompt], _given(ctx))}", err=as_json)
        if not report.dry_run and not as_json and report.written:
            click.echo(
                f"See the result:\n  {datasette_command(database)}   then /{report.database}/{_path(table)}"
            )
    ctx.exit(exit_code(report))


def _user() -> str | None:
    """Return who runs the command, for the record."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # A container's user need not have a name.
        return None


def _resolve_key(key: str | None) -> str | None:
    """Return a key as llm does: the argument, or the stored key of that name."""
    if key is None:
        return None
    import llm

    found: str | None = llm.get_key(key)
    keep_secret(found)
    return found


def _given(ctx: click.Context) -> list[tuple[str, str | None]]:
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
            for name, setting in value:
                given += [(flag, name), (setting, None)]
        else:
            given.append((flag, str(value)))
    return given


def _words(options: list[tuple[str, str | None]]) -> list[str]:
    """Return the options of the whole run, for that of a trial."""
    words = []
    for name, value in options:
        if name not in ("--try", "--json"):
            words += [name] if value is None else [name, value]
    return words


def _is_stored_key(name: str) -> bool:
    import llm

    return name in llm.load_keys()


def _path(table: str) -> str:
    from datasette.utils import tilde_encode

    return str(tilde_encode(table))
