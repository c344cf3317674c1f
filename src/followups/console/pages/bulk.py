"""Pages for bulk actions: preview, start, progress, stop and history.

Workers carry out the bulk actions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy import text

from followups.console import reasons
from followups.console.pages.follow_ups import LIMIT, ListFilters, filter_of
from followups.console.visit import uuid_or_none
from followups.errors import InvalidRequestError, NotFoundError
from followups.states import Status
from followups.store import browse, bulk_actions
from followups.store.browse import BrowseFilter
from followups.store.counts import within

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit
    from followups.models import BulkAction

SAMPLE = 5
"""Number of follow-ups that the preview lists."""

MOST = 10_000
"""Maximum number of matching follow-ups that a preview counts exactly."""

LONGEST_EXPECTED = 9
"""Maximum number of digits in the expected count that the form sends.

Python refuses to convert strings of thousands of digits to numbers.
"""

NEEDED = {"cancel": Status.PENDING, "retry": Status.FAILED}
"""The state that follow-ups must have for each bulk action."""

NOW = text("SELECT now()")


def history(visit: Visit) -> Response:
    """Show the newest bulk actions."""
    with visit.transaction() as session:
        actions = [each for each in bulk_actions.newest(session, visit.person.workspace_id) if _sees(visit, each)]
        session.expunge_all()
    return visit.page("bulk_history.html", actions=actions)


def preview(visit: Visit) -> Response:
    """Show a sample of the matching follow-ups, their number, and how many would be skipped. Nothing is changed."""
    kind, everything = _kind(visit)
    asked = ListFilters.of(visit.form)
    ids = () if everything else _ticked(visit)
    with visit.transaction() as session:
        now = session.execute(NOW).scalar_one()
        wanted = _selection(visit, session, asked, kind, ids)
        statement, parameters = browse.count_statement(wanted, MOST + 1)
        counted = within(session.connection(), LIMIT / 2, statement, parameters)
        found = browse.search(session.connection(), wanted, None, SAMPLE, LIMIT / 2)
        rows = found.rows if found else []
        sentences = reasons.of_rows(visit.services, session, rows, now)
    number = counted[0].number if counted else None
    return visit.page(
        "bulk_preview.html",
        kind=kind,
        number=number,
        most=MOST,
        passed=len(ids) - (number or 0) if ids else 0,
        rows=rows,
        sentences=sentences,
        asked=asked,
        ids=ids,
        action_id=uuid4(),
    )


def start(visit: Visit) -> Response:
    """Create the bulk action and redirect to the page that shows its progress.

    A repeated request does not start a second action.
    """
    kind, everything = _kind(visit)
    action_id = visit.form.uuid("action_id")
    if action_id is None:
        message = visit.t("Ask for a preview first.")
        raise InvalidRequestError(message, field="action_id")
    with visit.transaction() as session:
        wanted = _selection(visit, session, ListFilters.of(visit.form), kind, () if everything else _ticked(visit))
        expected = visit.form.text("expected")[:LONGEST_EXPECTED]
        bulk_actions.create(
            session,
            id=action_id,
            workspace_id=wanted.workspace_id,
            kind=kind,
            chosen=wanted.document(),
            created_by=visit.person.session.name,
            expected=min(int(expected), MOST + 1) if expected.isascii() and expected.isdigit() else MOST + 1,
        )
    visit.services.nudge()
    return visit.redirect(f"/bulk/{action_id}")


def show(visit: Visit) -> Response:
    """Show the progress of a bulk action."""
    with visit.transaction() as session:
        action = _own(visit, session)
        session.expunge_all()
    return visit.page("bulk.html", action=action, most=MOST)


def stop(visit: Visit) -> Response:
    """Stop the bulk action after its current batch."""
    with visit.transaction() as session:
        bulk_actions.stop(session, _own(visit, session).id)
    visit.services.nudge()
    return visit.redirect(f"/bulk/{visit.id()}")


def _own(visit: Visit, session: Session) -> BulkAction:
    action = bulk_actions.find(session, visit.id(), visit.person.workspace_id)
    if action is None or not _sees(visit, action):
        raise NotFoundError
    return action


def _sees(visit: Visit, action: BulkAction) -> bool:
    """Return whether the person in this session may see the bulk action.

    A session limited to one chat sees only the actions on that chat.
    """
    chat_id = visit.person.chat_id
    return chat_id is None or action.chosen.get("chat_id") == str(chat_id)


def _kind(visit: Visit) -> tuple[str, bool]:
    """Return the chosen action, and whether it applies to all matching follow-ups. Raises `InvalidRequestError`."""
    kind, _, everything = visit.form.text("do").partition("-")
    if kind not in NEEDED or everything not in {"", "all"}:
        message = visit.t("Choose what to do.")
        raise InvalidRequestError(message, field="do")
    return kind, everything == "all"


def _ticked(visit: Visit) -> tuple[UUID, ...]:
    ids = tuple(found for each in visit.form.every("tick") if (found := uuid_or_none(each)))
    if not ids:
        message = visit.t("Tick at least one follow-up first.")
        raise InvalidRequestError(message, field="tick")
    return ids


def _selection(visit: Visit, session: Session, asked: ListFilters, kind: str, ids: tuple[UUID, ...]) -> BrowseFilter:
    """Return the action's follow-ups that the person may see."""
    needed = NEEDED[kind]
    if ids:
        return BrowseFilter(ids=ids, statuses=(needed,)).narrowed(visit.person.workspace_id, visit.person.chat_id)
    wanted = filter_of(visit, session, asked)
    if wanted.statuses and needed not in wanted.statuses:
        message = visit.t("Only pending follow-ups can be cancelled, and only failed ones retried.")
        raise InvalidRequestError(message, field="state")
    return replace(wanted, statuses=(needed,))
