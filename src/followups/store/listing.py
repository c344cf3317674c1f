"""Pages of follow-ups, newest first.

Each page is read from an index in the order of the list. The cost of a page does not depend on the number of later
rows. An index returns rows in the list's order only if each of its leading columns has a fixed value. A separate query
reads the first rows for each pair of a workspace and a value of one filter. The rows of all workspaces and filter
values are then merged. Without a filter, the rows of each state are read separately. An additional index would slow
down every write.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from followups.models import FollowUp
from followups.statements import COLUMNS, Rule, Statement
from followups.states import Status
from followups.store import follow_ups
from followups.store.leases import uuid_array

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from followups.statements import Steps
    from followups.states import ReasonCode

PIECE = 256 * 1024
"""Maximum size in bytes of all messages read in one query; even the longest message fits."""

MAX_ROWS = 2**62
"""The largest offset; larger offsets overflow in PostgreSQL. Beyond this offset, every page is empty."""


@dataclass(frozen=True, slots=True)
class ListFilter:
    """Selects follow-ups that have one of the given values in each column. Columns left empty are ignored."""

    chat_ids: tuple[UUID, ...] = ()
    chat_message_ids: tuple[UUID, ...] = ()
    statuses: tuple[Status, ...] = ()
    trigger_chat_message_ids: tuple[UUID, ...] = ()
    codes: tuple[ReasonCode, ...] = ()
    """The reason codes to filter by. Only operators can filter by ``codes``, ``due_after`` and ``due_before``."""
    due_after: datetime | None = None
    due_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The key of a row in a list, and the number of rows before this row."""

    offset: int
    created_at: datetime
    id: UUID


@Rule
def page(
    workspace_id: UUID | None, wanted: ListFilter, *, page_number: int, page_size: int
) -> Steps[tuple[Sequence[FollowUp], bool]]:
    """Return a page of follow-ups, and whether there is a next page.

    Pages are numbered from 1. The newest ``created_at`` comes first; ties are ordered by id. If ``workspace_id`` is
    None, as for operators, the follow-ups of every workspace are listed.
    """
    rows = yield from rows_from.steps(workspace_id, wanted, (page_number - 1) * page_size, page_size + 1)
    return rows[:page_size], len(rows) > page_size


@Rule
def rows_from(
    workspace_id: UUID | None, wanted: ListFilter, offset: int, size: int, start: Start | None = None
) -> Steps[Sequence[FollowUp]]:
    """Return ``size`` rows of the list, starting at the offset. The query does not read the rows before ``start``."""
    if offset >= MAX_ROWS:
        return []
    statement, parameters = statement_of(workspace_id, wanted, start)
    skipped = offset - start.offset if start else offset
    rows: Sequence[FollowUp] = yield _query(statement)(**parameters, offset=skipped, size=size, most=skipped + size)
    return rows


@Rule
def pieces_from(
    workspace_id: UUID, wanted: ListFilter, offset: int, size: int, start: Start | None = None
) -> Steps[Sequence[Any]]:
    """Return the rows of `rows_from`, with only as many messages as `PIECE` allows.

    If the message of a row does not fit, the row's ``message`` is None. A request for a page of long messages therefore
    needs little memory. ``message_size`` is the size of the message in bytes.
    """
    if offset >= MAX_ROWS:
        return []
    statement, parameters = statement_of(workspace_id, wanted, start)
    skipped = offset - start.offset if start else offset
    parameters |= {"offset": skipped, "size": size, "most": skipped + size, "piece": PIECE}
    return (yield _query_of_pieces(statement)(**parameters))


_MESSAGES = Statement("""
    SELECT id, message FROM follow_ups WHERE id = ANY(CAST(:ids AS uuid[])) AND workspace_id = :workspace_id
""")


@Rule
def messages(workspace_id: UUID, ids: Sequence[UUID]) -> Steps[dict[UUID, str]]:
    """Return the messages of the given follow-ups; leave out follow-ups of other workspaces."""
    return {row.id: row.message for row in (yield _MESSAGES(workspace_id=workspace_id, ids=uuid_array(ids)))}


def statement_of(
    workspace_id: UUID | None, wanted: ListFilter, start: Start | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the SQL that selects a page, and its parameters.

    The caller must add the parameters ``offset``, ``size`` and ``most`` (``offset + size``).
    """
    parameters: dict[str, Any] = {name: list(values) for name, values in _filters(wanted).items()}
    leading, *others = parameters
    if workspace_id is not None:
        parameters["workspace_id"] = workspace_id
    conditions = [f"f.{name} = ANY(CAST(:{name} AS {_TYPES[name]}[]))" for name in others]
    for name, (condition, value) in _narrowing(wanted).items():
        conditions.append(condition)
        parameters[name] = value
    if start:
        conditions.append("f.created_at <= :from_at AND (f.created_at < :from_at OR f.id >= :from_id)")
        parameters |= {"from_at": start.created_at, "from_id": start.id}
    return _statement(leading, tuple(conditions), one_workspace=workspace_id is not None), parameters


def _narrowing(wanted: ListFilter) -> dict[str, tuple[str, Any]]:
    """Return SQL conditions for filters without an index; they are checked for each row.

    The result maps each filter's name to its condition and its value.
    """
    given = {
        "codes": ("split_part(f.reason, ':', 1) = ANY(CAST(:codes AS text[]))", [code.value for code in wanted.codes]),
        "due_after": ("f.due_date >= :due_after", wanted.due_after),
        "due_before": ("f.due_date < :due_before", wanted.due_before),
    }
    return {name: each for name, each in given.items() if each[1]}


@lru_cache(maxsize=256)  # there are fewer than 256 combinations of filters
def _query(statement: str) -> Statement:
    return Statement(statement, FollowUp, follow_ups.FIELDS)


@lru_cache(maxsize=256)  # there are fewer than 256 combinations of filters
def _query_of_pieces(statement: str) -> Statement:
    others = ", ".join(name for name in follow_ups.FIELDS if name != "message")
    columns = ", ".join(f"follow_ups.{name}" for name in follow_ups.FIELDS)
    return Statement(f"""
        WITH page AS MATERIALIZED ({statement.replace(COLUMNS, columns)})
        SELECT {others}, octet_length(message) AS message_size,
               CASE WHEN sum(octet_length(message)) OVER so_far <= :piece THEN message END AS message
          FROM page
        WINDOW so_far AS (ORDER BY created_at DESC, id ROWS UNBOUNDED PRECEDING)
         ORDER BY created_at DESC, id
    """)  # noqa: S608 - no input, only the statement above


_TYPES = {"chat_message_id": "uuid", "trigger_chat_message_id": "uuid", "chat_id": "uuid", "status": "text"}
"""The columns to filter by, with their SQL types. If a filter has several columns, the first column selects the index.
Columns whose values match fewer rows come first.
"""


def _filters(wanted: ListFilter) -> dict[str, tuple[Any, ...]]:
    given = {
        "chat_message_id": wanted.chat_message_ids,
        "trigger_chat_message_id": wanted.trigger_chat_message_ids,
        "chat_id": wanted.chat_ids,
        "status": tuple(status.value for status in wanted.statuses),
    }
    # Duplicate values are removed, so that no row is returned twice.
    named = {column: tuple(dict.fromkeys(values)) for column, values in given.items() if values}
    return named or {"status": tuple(status.value for status in Status)}


def _statement(leading: str, narrowing: tuple[str, ...], *, one_workspace: bool) -> str:
    workspaces = "(SELECT CAST(:workspace_id AS uuid) AS id)" if one_workspace else "workspaces"
    conditions = "".join(f" AND {condition}" for condition in narrowing)
    return f"""
        SELECT {{columns}}
          FROM (SELECT first.id
                  FROM {workspaces} w
                 CROSS JOIN unnest(CAST(:{leading} AS {_TYPES[leading]}[])) AS v(value)
                 CROSS JOIN LATERAL (
                       SELECT f.id, f.created_at
                         FROM follow_ups f
                        WHERE f.workspace_id = w.id AND f.{leading} = v.value{conditions}
                        ORDER BY f.created_at DESC, f.id
                        LIMIT :most) first
                 ORDER BY first.created_at DESC, first.id
                OFFSET :offset LIMIT :size) page
          JOIN follow_ups ON follow_ups.id = page.id
         ORDER BY follow_ups.created_at DESC, follow_ups.id
    """  # noqa: S608 - no input, only the names above
