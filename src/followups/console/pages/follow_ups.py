"""The page with the list of follow-ups. The URL contains the filters, and each row explains a follow-up's state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.channels import Channel
from followups.console import reasons
from followups.console.visit import uuid_or_none
from followups.errors import InvalidRequestError, WorkspaceNotFoundError
from followups.states import ReasonCode, Status
from followups.store import browse, workspaces
from followups.store.browse import BrowseCursor, BrowseFilter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Fields, Visit
    from followups.wording import Sentence

SIZE = 25
"""Number of rows on a page."""

LIMIT = timedelta(milliseconds=200)
"""Time limit for a search."""

LONGEST_EXTERNAL_ID = 1_000

NOW = text("SELECT now()")


@dataclass(frozen=True, slots=True)
class ListFilters:
    """The filters of the list, as the user typed them."""

    state: str
    reason: str
    channel: str
    due_from: str
    due_to: str
    id: str
    workspace: str

    @classmethod
    def of(cls, fields: Fields) -> ListFilters:
        """Return the filters in a query string or form."""
        names = ("state", "reason", "channel", "due_from", "due_to", "id", "workspace")
        return cls(**{name: fields.text(name)[:LONGEST_EXTERNAL_ID] for name in names})

    def query(self) -> dict[str, str]:
        """Return the filters that are in use, keyed by their names."""
        return {name: getattr(self, name) for name in self.__slots__ if getattr(self, name)}


def show(visit: Visit) -> Response:
    """Show one page of the list of follow-ups."""
    asked = ListFilters.of(visit.query)
    told, following = "", None
    rows: list[browse.Row] = []
    sentences: Mapping[UUID, Sentence] = {}
    status = 200
    with visit.transaction() as session:
        now = session.execute(NOW).scalar_one()
        try:
            wanted = filter_of(visit, session, asked)
        except InvalidRequestError as error:
            told, status = visit.said(error.sentence), 422
        else:
            found = browse.search(session.connection(), wanted, _place(visit), SIZE, LIMIT)
            if found is None:
                told = visit.t("The search took too long. Narrow the search to a chat, a workspace, or a state.")
            else:
                rows, following = found
                sentences = reasons.of_rows(visit.services, session, rows, now)
    return visit.page(
        "follow_ups.html",
        status,
        asked=asked,
        told=told,
        rows=rows,
        sentences=sentences,
        older=_next(visit, asked, following) if following else "",
        searched_back_to=following.created_at if following and len(rows) < SIZE else None,
        newest=visit.url("/follow-ups", **asked.query()) if "after" in visit.query else "",
        now=now,
        choices=_choices(),
    )


def _choices() -> Mapping[str, list[str]]:
    return {
        "states": [each.value for each in Status],
        "reasons": [each.value for each in ReasonCode],
        "channels": [each.value for each in Channel],
    }


def filter_of(visit: Visit, session: Session, asked: ListFilters) -> BrowseFilter:
    """Return a query for the filtered follow-ups that the person may see.

    Raises `InvalidRequestError`.
    """
    viewer = visit.person
    any_id = uuid_or_none(asked.id)
    external_id = asked.id if asked.id and any_id is None else None
    if external_id is not None and "\x00" in external_id:
        message = "An id must not contain NUL characters."
        raise InvalidRequestError(message, field="id")
    wanted = BrowseFilter(
        workspace_id=_workspace(session, asked.workspace) if viewer.workspace_id is None else None,
        statuses=(Status(asked.state),) if _one_of(Status, asked.state, "state") else (),
        code=ReasonCode(asked.reason) if _one_of(ReasonCode, asked.reason, "reason") else None,
        channel=asked.channel if _one_of(Channel, asked.channel, "channel") else None,
        due_after=_moment(visit, asked.due_from),
        due_before=_moment(visit, asked.due_to),
        any_id=any_id,
        external_id=external_id,
    )
    return wanted.narrowed(viewer.workspace_id, viewer.chat_id)


def _one_of(values: type[Status | ReasonCode | Channel], given: str, field: str) -> bool:
    """Return whether a value was chosen for a filter. Raises `InvalidRequestError` for an unknown value."""
    if given and given not in {each.value for each in values}:
        message = f"There is no such {field}."
        raise InvalidRequestError(message, field=field)
    return bool(given)


def _workspace(session: Session, name: str) -> UUID | None:
    if not name:
        return None
    try:
        return workspaces.find(session, name).id
    except WorkspaceNotFoundError as error:
        raise InvalidRequestError(error.sentence, field="workspace") from None


def _moment(visit: Visit, typed: str) -> datetime | None:
    # If clocks go back and a local time occurs twice, the filter uses the first occurrence.
    return visit.zone.read(typed, "first") if typed else None


def _place(visit: Visit) -> BrowseCursor | None:
    at, _, after = visit.query.text("after").rpartition("_")
    found = uuid_or_none(after)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        return None
    return BrowseCursor(moment, found) if found and moment.utcoffset() is not None else None


def _next(visit: Visit, asked: ListFilters, place: BrowseCursor) -> str:
    return visit.url("/follow-ups", **asked.query(), after=f"{place.created_at.isoformat()}_{place.id}")
