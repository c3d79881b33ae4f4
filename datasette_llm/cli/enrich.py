"""``datasette llm enrich``: a prompt for every row of a table."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from ..secrecy import keep_secret
from .before import asking_first, show_estimate, show_trial
from .going_on import given, of_the_whole
from .inputs import find_model, read_prompt, read_schema_argument
from .options import CONFIG, CONFIG_NAMES, INTERNAL, INTERNAL_NAMES, Duration
from .running import check_header, make_datasette, run_job
from .sections import SectionedCommand, section
from .templates import Said, columns_of, with_templates

_PURPOSE = "enrichments"

MORE_HELP = """Only rows that have no value yet are asked about, and answers are written as they arrive, so
that the same command goes on where it was stopped. Rows that fail are recorded in the table
_llm_enrich_errors and do not stop the others. They still have no value, so the next run tries them again;
--retry-failed tries only them. An answer to a row that was deleted, or whose text was edited meanwhile, is
dropped.

Only whole answers are written. A row fails whose answer was cut off, filtered, refused or empty, or does
not fit the schema; the summary says how many of each, and what to do. Reasoning (<think>...</think>) and
white space around an answer are left out. A row whose prompt is empty, because its column is, is skipped:
nothing is sent, and nothing is wrong.

While another program has the database locked, or its disk is full, nothing is sent. After --lock-timeout
the job ends, and leaves the answers that are not in the table in a file beside the database,
DATABASE-llm-answers.jsonl. The next run writes those first.

What no other row could escape stops the job at once: a wrong key, no money, no such model, a quota that is
used up, a refusal that the first rows all get alike. It says what to do, and those rows are not recorded as
failed.

Ctrl-C stops: prompts in flight get a few seconds, what was answered is written, and the command to go on
with is shown. A second Ctrl-C stops at once.

\b
Exit codes:
  0    all is done, or the deadline or a limit to tokens or cost was reached
  1    rows failed, or the job could not go on: no money or quota is left, say
  2    the command cannot be run as it is: nothing was sent
  130  stopped by Ctrl-C
  143  stopped by SIGTERM
"""

what, how, limits, batches, output = (
    section(name) for name in ("What", "How", "Limits", "Batches", "Output")
)


@click.command(name="enrich", cls=SectionedCommand, epilog=MORE_HELP)
@click.argument("database", type=click.Path(exists=True, dir_okay=False))
@click.argument("table")
@click.argument("prompt", required=False)
@what("--column", metavar="NAME", help="Receives the answers; added if it does not exist.")
@what(
    "--schema",
    metavar="SCHEMA",
    help="One column per property, typed: 'name, age int, bio: one sentence', JSON schema, a file "
    "with one, t:NAME for that of a template of llm, or an id of llm schemas.",
)
@what("--system", "-s", metavar="TEXT", help="System prompt, the same for every row.")
@what(
    "--template",
    "-t",
    "templates",
    multiple=True,
    metavar="NAME",
    help="A template of llm: prompt, system prompt, model, options, schema. Its $variables are columns; "
    "$input, if it has that, is PROMPT.",
)
@what(
    "--param",
    "-p",
    "parameters",
    type=(str, str),
    multiple=True,
    metavar="NAME VALUE",
    help="A value for a $variable of a template, instead of a column.",
)
@what(
    "--fragment",
    "-f",
    "fragments",
    multiple=True,
    metavar="NAME",
    help="A text before the prompt: a file, a URL, or what llm fragments has.",
)
@what(
    "--attachment",
    "-a",
    "attachments",
    multiple=True,
    metavar="TEMPLATE",
    help="Goes with the prompt: -a '{{ image_url }}', an address or a file, or a column with a BLOB.",
)
@what("--extract", "-x", is_flag=True, help="Only the first fenced code block of an answer, if it has any.")
@what("--where", metavar="SQL", help="Only rows for which this condition holds.")
@what("--overwrite", is_flag=True, help="Also ask about rows that have a value, and replace it.")
@what(
    "--stale",
    is_flag=True,
    help="Only ask again where the question has changed: the row, prompt, model, options or schema.",
)
@what("--retry-failed", is_flag=True, help="Only ask about rows that failed before.")
@how("--model", "-m", "models", multiple=True, metavar="ID", help="Id or alias; else the configured default.")
@how(
    "--query",
    "-q",
    "queries",
    multiple=True,
    metavar="TEXT",
    help="The model with the shortest id in which all of these occur, as in llm.",
)
@how(
    "--option",
    "-o",
    "options",
    type=(str, str),
    multiple=True,
    metavar="NAME VALUE",
    help="Option of the model, such as: -o temperature 0.2",
)
@how("--key", metavar="KEY", help="API key, or the name of one stored with: llm keys set NAME")
@how("--purpose", default=_PURPOSE, show_default=True, help="What the prompts are for, as configured.")
@how(*CONFIG_NAMES, **CONFIG)
@how(*INTERNAL_NAMES, **INTERNAL)
@how("--concurrency", type=click.IntRange(min=1), metavar="N", help="Prompts in flight; adapts by default.")
@how("--no-reuse", is_flag=True, help="Send every prompt, also where another row asked the same.")
@how("--allow-cut", is_flag=True, help="Also write answers that ran out of tokens.")
@how("--allow-empty", is_flag=True, help="Also write text answers that are empty.")
@how("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
@limits("--limit", type=click.IntRange(min=1), metavar="N", help="Ask about N rows at most.")
@limits(
    "--max-cost",
    type=click.FloatRange(min=0, min_open=True),
    metavar="DOLLARS",
    help="Stop when about so much is spent: passed by no more than what is in flight.",
)
@limits(
    "--max-tokens-total",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when about N tokens, in and out together, are spent.",
)
@limits(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when N rows have failed: the provider is down, say. By default, when 100 in a row have.",
)
@limits(
    "--deadline",
    type=Duration(),
    metavar="DURATION",
    help="Stop after this time: 90s, 45m, 1h30m. Prompts in flight are completed.",
)
@limits("--timeout", type=Duration(), metavar="DURATION", help="One attempt takes so long at most: 5m.")
@limits(
    "--outage-timeout",
    type=Duration(),
    metavar="DURATION",
    help="Wait so long for a provider that cannot be reached: 2h. By default 30 minutes, but 10 seconds if "
    "it never answered.",
)
@how(
    "--workers",
    type=click.IntRange(0, 256),
    metavar="N",
    help="Model calls are made by N processes of this machine, which end with the job.",
)
@how(
    "--scheduler",
    metavar="URL",
    help="Model calls are made by the workers of a Dask cluster: tls://host:8786. Its certificates are "
    "those of Dask's own configuration.",
)
@limits(
    "--workers-timeout",
    type=Duration(),
    metavar="DURATION",
    help="Wait so long while there is no worker: 10m. By default a minute.",
)
@limits(
    "--wait-for-quota",
    type=Duration(),
    metavar="DURATION",
    help="When the provider's quota is used up, wait for it if it is back within this time: 12h. "
    "By default the job stops.",
)
@limits(
    "--lock-timeout",
    type=Duration(),
    default=60.0,
    show_default="60s",
    metavar="DURATION",
    help="Wait so long for a database that is locked or cannot be written; answers are kept meanwhile.",
)
@batches(
    "--batch",
    is_flag=True,
    help="Half the price, within a day: submit the rows in batches, and end. The same command collects.",
)
@batches("--wait", is_flag=True, help="With --batch: stay until all batches are collected.")
@batches(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Prompts in one batch at most; by default as many as the provider takes.",
)
@batches("--batch-cancel", is_flag=True, help="With --batch: cancel the batches that are not done.")
@batches("--include-submitted", is_flag=True, help="Also ask about rows that are in a batch.")
@output(
    "--try",
    "number",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask about N rows from all of the table, show the answers and what all would take; write nothing. "
    "Several -m are compared.",
)
@output("--estimate", is_flag=True, help="Say what it would take: rows, tokens, cost; send nothing.")
@output("--dry-run", is_flag=True, help="Count the rows, show the first three prompts; send nothing.")
@output("--yes", "-y", is_flag=True, help="Do not ask, however much it may cost (confirm_above).")
@output("--no-record", is_flag=True, help="Keep no record of the run and of what values answer.")
@output("--log", is_flag=True, help="Also write each response to llm's own log, for: llm logs")
@output("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@output("--quiet", is_flag=True, help="No progress and no summary, only errors.")
@click.pass_context
def enrich_command(
    ctx: click.Context,
    /,
    database: str,
    table: str,
    prompt: str | None,
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
    queries: tuple[str, ...],
    templates: tuple[str, ...],
    parameters: tuple[tuple[str, str], ...],
    fragments: tuple[str, ...],
    attachments: tuple[str, ...],
    extract: bool,
    **asked: Any,
) -> None:
    """Run a prompt for every row of a table, and write the answers into a column of it.

    \b
    datasette llm enrich data.db articles 'Summarize: {{ body }}' --column summary
    datasette llm enrich data.db reviews '{{ text }}' \\
        --schema 'sentiment, score int: from 1 to 5' --try 5
    datasette llm enrich data.db articles -t headline --column title --max-cost 5

    PROMPT is a Jinja template over the row: every column is a variable, and a name with spaces or
    signs is {{ row["odd name"] }}. NULL renders as nothing. PROMPT "-" is read from standard input,
    "@prompt.txt" from that file; a template or a fragment may stand for it.
    """
    from ..enrich.command import exit_code, go_on
    from ..enrich.spec import JobSpec
    from ..enrich.telling.display import open_display
    from ..enrich.telling.invocation import datasette_command

    scheduler = asked.pop("scheduler")
    if scheduler is not None:
        if asked["workers"] is not None:
            raise click.UsageError("--workers starts processes and --scheduler has some: give one of them.")
        asked["workers"] = scheduler
    check_header(database)
    if queries and not models:
        models = (find_model(queries),)
    said = with_templates(
        Said(
            prompt=None if prompt is None else read_prompt(prompt),
            system=asked.pop("system"),
            model=models[-1] if models else None,
            options=dict(options),
            schema=read_schema_argument(asked["schema"]) if asked["schema"] is not None else None,
            extract="first" if extract else None,
            attachments=attachments,
        ),
        templates,
        fragments=fragments,
        parameters=dict(parameters),
        columns=partial(columns_of, database, table),
    )
    asked["schema"] = said.schema
    if len(set(models)) > 1 and number is None and not quiet:
        click.echo(f"Several -m are compared by --try N; this asks {models[-1]}, the last one.", err=True)
    if said.prompt is None:
        raise click.UsageError("Say what to ask: a PROMPT, or -t NAME for a template of llm that has one.")
    if asked["column"] is None and said.schema is None:
        raise click.UsageError(
            "Say where the answers go: --column NAME, or --schema for one column per property."
        )
    spec = JobSpec(
        database="",
        table=table,
        prompt=said.prompt,
        system=said.system,
        options=said.options,
        attachments=said.attachments,
        files=True,
        extract="last" if said.extract == "last" else said.extract is not None,
        key=_resolve_key(key),
        reuse=not no_reuse,
        record=not no_record,
        by=_user(),
        model=said.model,
        **asked,
    )
    arguments = [database, table] if prompt is None else [database, table, prompt]
    make = partial(make_datasette, [database], config, internal)
    if number is not None:
        command = datasette_command("llm", "enrich", *arguments, *of_the_whole(given(ctx)))
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
            click.echo(f"Go on with:\n  {go_on(report, arguments, given(ctx))}", err=as_json)
        if report.stopped and report.batch is not None and report.batch.left:
            cancel = [*given(ctx), ("--batch-cancel", None)]
            click.echo(
                f"Cancel what is with the provider with:\n  {go_on(report, arguments, cancel)}", err=as_json
            )
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


def _path(table: str) -> str:
    from datasette.utils import tilde_encode

    return str(tilde_encode(table))
