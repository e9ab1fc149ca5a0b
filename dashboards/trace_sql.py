"""`hotset trace sql`: a question to the spans of a run, in SQL, answered by DuckDB.

One table, `spans`, with the columns of `hotset.dashboards.columns`, and the views `transfers`,
`waits` and `steps` of it. Files and network are closed to the statement. Must not know what is
asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hotset.actors import names
from hotset.dashboards.columns import columns
from hotset.dashboards.text import table
from hotset.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from hotset.dashboards.otlp import Spans

_VIEWS = {
    "transfers": names.SPAN_TRANSFER.name,
    "waits": names.SPAN_WAIT.name,
    "steps": names.SPAN_STEP.name,
    "plans": names.SPAN_PLAN.name,
}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of an answer, and the names of their columns."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def ask(spans: Spans, statement: str) -> Answer:
    """Answer one statement. Raises DependencyError without DuckDB, ConfigError for bad SQL."""
    try:
        import duckdb
    except ImportError:
        raise DependencyError(
            "DuckDB is not installed", remedy="pip install 'hotset[sql]'"
        ) from None
    connection = duckdb.connect(":memory:")
    try:
        found = columns(spans)
        arrays = {
            name: column.astype(str) if column.dtype == np.dtype(object) else column
            for name, column in found.items()
        }
        connection.register("given", arrays)
        connection.execute("CREATE TABLE spans AS SELECT * FROM given")
        for view, name in _VIEWS.items():
            connection.execute(f"CREATE VIEW {view} AS SELECT * FROM spans WHERE name = '{name}'")  # noqa: S608 - our own names
        connection.execute("SET enable_external_access = false")
        answer = connection.execute(statement)
        heads = tuple(one[0] for one in answer.description or ())
        return Answer(columns=heads, rows=answer.fetchall())
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"SQL: {first}", remedy=f"the table `spans` has {', '.join(columns(spans))}"
        ) from None
    finally:
        connection.close()


def render_text(answer: Answer) -> str:
    """An aligned table."""
    rows = [tuple("-" if cell is None else str(cell) for cell in row) for row in answer.rows]
    return "\n".join(table(answer.columns, rows)) + "\n" if answer.columns else ""


def to_json(answer: Answer) -> str:
    """A list of objects, one a row; what JSON cannot say (a date, a decimal) is text."""
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    return msgspec.json.encode(rows, enc_hook=str).decode()
