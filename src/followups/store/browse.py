"""Pages of follow-ups for the console, newest first, with the information that explains each follow-up.

As in `followups.store.listing`, a page is merged from several lists of rows. Each list contains the rows of one
workspace that have the same value in one column. Each list is read in the order of an index. Conditions without an
index are checked row by row. The search therefore goes back in time, interval by interval, until the caller's time
limit expires. The next search continues where the previous search stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import UUID

from sqlalchemy import text

from followups.models import FollowUp
from followups.states import TRANSITIONS, ReasonCode, Status
from followups.store.counts import within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, TextClause

CHATS = 50
"""The maximum number of chats that are searched for one external id."""


@dataclass(frozen=True, slots=True)
class BrowseFilter:
    """The filter of the console's list of follow-ups; fields that are None or empty are ignored."""

    workspace_id: UUID | None = None
    statuses: tuple[Status, ...] = ()
    code: ReasonCode | None = None
    channel: str | None = None
    due_after: datetime | None = None
    due_before: datetime | None = None
    any_id: UUID | None = None
    """An id to search for: that of a follow-up, of its chat or of a chat message."""
    external_id: str | None = None
    chat_id: UUID | None = None
    ids: tuple[UUID, ...] = ()
    until: datetime | None = None
    """Only follow-ups created up to this time are returned."""

    def document(self) -> dict[str, Any]:
        """Return the filter as a dictionary that can be stored as JSON."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {name: _plain(value) for name, value in given.items() if value not in {None, ()}}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """Return the filter from the dictionary that `document` has created."""
        known = dict(document)
        for name in ("workspace_id", "any_id", "chat_id"):
            if name in known:
                known[name] = UUID(known[name])
        known["ids"] = tuple(UUID(each) for each in known.get("ids", ()))
        known["statuses"] = tuple(Status(each) for each in known.get("statuses", ()))
        if "code" in known:
            known["code"] = ReasonCode(known["code"])
        for name in ("due_after", "due_before", "until"):
            if name in known:
                known[name] = datetime.fromisoformat(known[name])
        return cls(**known)

    def narrowed(self, workspace_id: UUID | None, chat_id: UUID | None) -> BrowseFilter:
        """Return a copy of this filter that matches only follow-ups visible to the session's user."""
        return replace(
            self,
            workspace_id=workspace_id or self.workspace_id,
            chat_id=chat_id or self.chat_id,
        )


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else str(value)


class BrowseCursor(NamedTuple):
    """A follow-up's position in the list, which is sorted newest first, then by id."""

    created_at: datetime
    id: UUID


@dataclass(frozen=True, slots=True)
class Row:
    """A follow-up with its chat and workspace, without the message."""

    follow_up: FollowUp
    channel: str
    external_id: str | None
    last_user_message_at: datetime | None
    workspace: str
    excerpt: str

    @property
    def place(self) -> BrowseCursor:
        """The follow-up's position in the list."""
        return BrowseCursor(self.follow_up.created_at, self.follow_up.id)


EXCERPT = 80
"""Maximum length of the excerpt that a list shows of each message to members of the workspace."""

_COLUMNS = tuple(column for column in FollowUp.__table__.columns if column.name != "message")


def _branches(wanted: BrowseFilter) -> tuple[str, ...]:
    """Return the conditions that can use an index, one for each index scan."""
    if wanted.ids:
        return ("f.id = ANY(CAST(:ids AS uuid[]))",)
    if wanted.any_id:
        columns = ("id", "chat_id", "chat_message_id", "trigger_chat_message_id")
        return tuple(f"f.{column} = :any_id" for column in columns)
    if wanted.external_id:
        own = f"c.workspace_id = w.id AND c.external_id = :external_id LIMIT {CHATS}"
        return (f"f.chat_id IN (SELECT c.id FROM chats c WHERE {own})",)  # noqa: S608 - no input
    if wanted.chat_id:
        return ("f.chat_id = :chat_id",)
    return tuple(f"f.status = '{status}'" for status in wanted.statuses or _statuses_of(wanted.code))


def _statuses_of(code: ReasonCode | None) -> tuple[Status, ...]:
    """Return the states that a follow-up with this reason code can have; for None, return all states."""
    return tuple(status for status in Status if code is None or code in TRANSITIONS[Status.PENDING].get(status, ()))


# The query looks up the chat of each row. With EXISTS instead, the planner would join all chats of each workspace.
_ON_CHANNEL = """:channel = (
    SELECT c.channel FROM chats c WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id)"""


def _conditions(wanted: BrowseFilter) -> tuple[str, ...]:
    """Return the filter conditions that no index covers; they are checked row by row."""
    given = {
        "f.status = ANY(CAST(:statuses AS text[]))": wanted.statuses,
        "f.chat_id = :chat_id": wanted.chat_id,
        "split_part(f.reason, ':', 1) = :code": wanted.code,
        "f.due_date >= :due_after": wanted.due_after,
        "f.due_date < :due_before": wanted.due_before,
        "f.created_at <= :until": wanted.until,
        _ON_CHANNEL: wanted.channel,
    }
    return tuple(condition for condition, value in given.items() if value)


def _parameters(wanted: BrowseFilter) -> dict[str, Any]:
    return {
        "workspace_id": wanted.workspace_id,
        "statuses": [status.value for status in wanted.statuses],
        "code": wanted.code and wanted.code.value,
        "channel": wanted.channel,
        "due_after": wanted.due_after,
        "due_before": wanted.due_before,
        "any_id": wanted.any_id,
        "external_id": wanted.external_id,
        "chat_id": wanted.chat_id,
        "ids": list(wanted.ids),
        "until": wanted.until,
    }


@lru_cache(maxsize=256)
def _matching(branches: tuple[str, ...], conditions: tuple[str, ...], *, one: bool) -> str:
    """Return SQL that selects matching ids in order, up to ``:most`` from each index scan."""
    workspaces = "(SELECT CAST(:workspace_id AS uuid) AS id)" if one else "workspaces"
    narrowed = "".join(f" AND {condition}" for condition in conditions)
    # Several ids of one follow-up may match the search, so duplicates are removed. Each branch reads a different state,
    # so UNION ALL cannot return a row twice.
    union = " UNION " if any(":any_id" in branch for branch in branches) else " UNION ALL "
    ways = union.join(
        f"""(SELECT f.id, f.created_at FROM follow_ups f
              WHERE f.workspace_id = w.id AND {branch}{narrowed}
              ORDER BY f.created_at DESC, f.id LIMIT :most)"""  # noqa: S608 - no input, only the conditions above
        for branch in branches
    )
    return f"SELECT own.id, own.created_at FROM {workspaces} w CROSS JOIN LATERAL ({ways}) own"  # noqa: S608 - likewise


def _sql(wanted: BrowseFilter, *more: str) -> str:
    one = wanted.workspace_id is not None
    return _matching(_branches(wanted), (*_conditions(wanted), *more), one=one)


def _page(
    wanted: BrowseFilter, after: BrowseCursor | None, floor: datetime | None, most: int
) -> tuple[TextClause, dict[str, Any]]:
    """Return the query for one page of at most ``most`` rows, and its parameters."""
    columns = ", ".join(f"f.{column.name}" for column in _COLUMNS)
    parameters = _parameters(wanted) | {"most": most}
    bounds = []
    if after:
        bounds.append("f.created_at <= :at AND (f.created_at < :at OR f.id > :after)")
        parameters |= {"at": after.created_at, "after": after.id}
    if floor:
        bounds.append("f.created_at > :floor")
        parameters["floor"] = floor
    statement = text(f"""
        SELECT {columns}, left(f.message, {EXCERPT}) AS excerpt, c.channel, c.external_id,
               c.last_user_message_at, v.name AS workspace
          FROM ({_sql(wanted, *bounds)} ORDER BY own.created_at DESC, own.id LIMIT :most) page
          JOIN follow_ups f ON f.id = page.id
          JOIN chats c ON c.workspace_id = f.workspace_id AND c.id = f.chat_id
          JOIN workspaces v ON v.id = f.workspace_id
         ORDER BY f.created_at DESC, f.id
    """)  # noqa: S608 - no input, only the conditions above
    return statement, parameters


NIL = UUID(int=0)
FIRST_STEP = timedelta(minutes=10)
"""How far back in time the first step of a search reaches."""

LONGEST_STEP = timedelta(days=3650)
"""After a step of at least this length, the next step covers all older follow-ups."""

GROWTH = 100
"""A search step may be at most this many times as long as the previous step."""


class FollowUpPage(NamedTuple):
    """One page of search results."""

    rows: list[Row]
    following: BrowseCursor | None
    """Where the search continues, or None at the end of the list."""


def search(
    connection: Connection, wanted: BrowseFilter, after: BrowseCursor | None, size: int, limit: timedelta
) -> FollowUpPage | None:
    """Return at most ``size`` matching follow-ups after ``after``; the search stops after ``limit``.

    Return None if the first search step exceeds the time limit. Each search step is small enough that it will probably
    end before the time limit. A search for an id needs only one step, because the index finds few rows.
    """
    deadline = time.monotonic() + limit.total_seconds()
    step = None if wanted.ids or wanted.any_id or wanted.external_id or wanted.chat_id else FIRST_STEP
    rows: list[Row] = []
    place = after
    top = after.created_at if after else connection.execute(_NOW).scalar_one()
    while True:
        floor = top - step if step else None
        begun = time.monotonic()
        left = timedelta(seconds=deadline - begun)
        found = within(connection, left, *_page(wanted, place, floor, size - len(rows) + 1))
        if found is None:
            return FollowUpPage(rows, place) if rows or place != after else None
        rows += _rows_of(found)
        if len(rows) > size:
            return FollowUpPage(rows[:size], rows[size - 1].place)
        if floor is None or step is None:
            return FollowUpPage(rows, None)
        top, place = floor, BrowseCursor(floor, NIL)
        took = time.monotonic() - begun
        left = timedelta(seconds=deadline - time.monotonic())
        if left <= timedelta(0):
            return FollowUpPage(rows, place)
        # The step at least doubles, because a connection's first statement is always slow.
        step = step * max(2, min(left.total_seconds() / took / 2, GROWTH)) if step < LONGEST_STEP else None


_NOW = text("SELECT now()")


def _rows_of(found: Sequence[Any]) -> list[Row]:
    rows = []
    for row in found:
        values = {column.name: getattr(row, column.name) for column in _COLUMNS}
        rows.append(
            Row(FollowUp(**values), row.channel, row.external_id, row.last_user_message_at, row.workspace, row.excerpt)
        )
    return rows


def count_statement(wanted: BrowseFilter, most: int) -> tuple[TextClause, dict[str, Any]]:
    """Return the statement that counts up to ``most`` matching follow-ups, and its parameters."""
    statement = text(f"SELECT count(*) AS number FROM ({_sql(wanted)} LIMIT :most) AS found")  # noqa: S608 - likewise
    return statement, _parameters(wanted) | {"most": most}
