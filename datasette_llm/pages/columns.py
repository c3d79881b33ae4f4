"""How people name the columns of a table in a prompt."""

from __future__ import annotations

from ..enrich.errors import EnrichInputError
from ..enrich.reading.template import PromptTemplate


def column_reference(name: str) -> str:
    """Return how a prompt shows a column: by its name, if Jinja reads that as one."""
    plain = "{{ " + name + " }}"
    try:
        if name.isidentifier() and name != "row" and PromptTemplate(plain, [name]).columns == (name,):
            return plain
    except EnrichInputError:
        pass
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return '{{ row["' + escaped + '"] }}'
