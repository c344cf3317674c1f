"""The page of one follow-up: its state, the reason, the history, and the actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from followups import checks, scheduling
from followups.console import reasons
from followups.console.access import Permission as Doing
from followups.console.timeline import timeline
from followups.console.zones import AmbiguousTimeError, Zone
from followups.delivery import events
from followups.errors import (
    AlreadyFinishedError,
    AlreadyRetriedError,
    ChatNotFoundError,
    ConflictError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    InvalidRequestError,
    NotFoundError,
)
from followups.models import MAX_MESSAGE_LENGTH, FollowUp
from followups.operations.circumstances import explained
from followups.states import MAX_REASON_LENGTH, Status
from followups.store import chats, follow_ups
from followups.store.audit import Action

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit
    from followups.states import Final


class ChangedMeanwhileError(ConflictError):
    """Another person or program has changed the follow-up since this page was loaded."""

    slug = "changed-meanwhile"


@dataclass(slots=True)
class FollowUpForm:
    """The values that a person has typed into the forms of the page. If saving fails, typed values are shown again."""

    message: str | None = None
    due: str | None = None
    reason: str = ""
    ambiguous: bool = False
    told: str = ""
    consequences: list[str] = field(default_factory=list)
    reveal: bool = False
    """Whether a person with access to all workspaces has asked to see the message text."""


def show(visit: Visit) -> Response:
    """Show the page of a follow-up."""
    return _page(visit, FollowUpForm())


def reveal(visit: Visit) -> Response:
    """Show the message to a person who sees all workspaces, and record this in the audit log."""
    with visit.transaction() as session:
        found = _own(visit, session)
        visit.record(session, Action.MESSAGES_SHOWN, found.workspace_id, found.id)
    return _page(visit, FollowUpForm(reveal=True))


def save(visit: Visit) -> Response:
    """Save the message and the due date; the "Check" button shows the consequences without saving."""
    form = visit.form
    typed = FollowUpForm(form.raw("message") if "message" in form else None, form.text("due"))

    def change(session: Session, found: FollowUp) -> FollowUp:
        changes = _changes(visit, found, typed)
        if form.text("do") == "check":
            now = session.execute(select(func.now())).scalar_one()
            chat = chats.lock_chat(session, found.workspace_id, found.chat_id)
            due = changes.get("due_date", found.due_date)
            typed.consequences = reasons.consequences_of(visit, session, chat, due, now)
            return found
        return _amend(visit, session, found, changes)

    return _changed(visit, typed, change)


def cancel(visit: Visit) -> Response:
    """Cancel the follow-up, with a reason if the person typed one."""
    typed = FollowUpForm(reason=visit.form.text("reason"))

    def change(session: Session, found: FollowUp) -> FollowUp:
        changes: dict[str, Any] = {"status": Status.CANCELLED}
        if typed.reason:
            changes["reason"] = typed.reason
        # Without this check, a second cancel with a different reason would be reported as a conflict.
        if found.status == Status.CANCELLED:
            raise AlreadyFinishedError
        changed = _amend(visit, session, found, changes)
        ends.append((changed.id, checks.final_of(Status.CANCELLED, typed.reason or None)))
        return changed

    ends: list[tuple[UUID, Final]] = []
    response = _changed(visit, typed, change)
    if response.status_code == HTTPStatus.SEE_OTHER:
        events.ended(ends)
    return response


def send_now(visit: Visit) -> Response:
    """Make the follow-up due now."""

    def change(session: Session, found: FollowUp) -> FollowUp:
        if found.status != Status.PENDING:
            raise AlreadyFinishedError
        return _amend(visit, session, found, {"due_date": session.execute(select(func.now())).scalar_one()})

    return _changed(visit, FollowUpForm(), change)


def retry(visit: Visit) -> Response:
    """Create a new follow-up from a failed one and redirect to the new follow-up.

    A failed follow-up can be retried only once.
    """

    def change(session: Session, found: FollowUp) -> FollowUp:
        new = scheduling.retry_once(session, found.id)
        visit.record(session, Action.FOLLOW_UP_RETRIED, found.workspace_id, found.id, retriedAs=str(new.id))
        return new

    return _changed(visit, FollowUpForm(), change)


def _amend(visit: Visit, session: Session, found: FollowUp, changes: dict[str, Any]) -> FollowUp:
    actor = visit.actor
    return scheduling.amend(session, found.id, changes, workspace_id=visit.person.workspace_id, actor=actor)


def _own(visit: Visit, session: Session) -> FollowUp:
    """Return the follow-up whose id is in the path.

    Raises `FollowUpNotFoundError` if the person may not see it.
    """
    found = follow_ups.find(session, visit.id(), visit.person.workspace_id)
    if found is None or not visit.person.sees(found.workspace_id, found.chat_id):
        raise FollowUpNotFoundError
    return found


def _changed(visit: Visit, typed: FollowUpForm, change: Callable[[Session, FollowUp], FollowUp]) -> Response:
    """Change the follow-up in one transaction; redirect, or show why the change was refused."""
    status = HTTPStatus.OK
    changed: UUID | None = None
    try:
        with visit.transaction() as session:
            found = _own(visit, session)
            chats.lock_chats_of(session, found.id, found.workspace_id, None)
            found = _own(visit, session)
            _check_version(visit, found)
            result = change(session, found)
            if not typed.consequences:
                changed = result.id
    except DeliveryInProgressError:
        typed.told = visit.t(
            "The follow-up is being delivered at this moment, so nothing has changed. Try again shortly."
        )
        status = HTTPStatus.CONFLICT
    except AlreadyFinishedError:
        typed.told = visit.t("The follow-up has finished in the meantime, and a finished follow-up never changes.")
        status = HTTPStatus.CONFLICT
    except AlreadyRetriedError:
        typed.told = visit.t("The follow-up has already been retried.")
        status = HTTPStatus.CONFLICT
    except ChangedMeanwhileError:
        typed.told = visit.t(
            "The follow-up was changed in the meantime. Your input is below, the stored version is above;"
            " save again to replace the stored version."
        )
        status = HTTPStatus.CONFLICT
    except (ConflictError, ChatNotFoundError) as error:
        typed.told, status = visit.said(error.sentence), HTTPStatus.CONFLICT
    except AmbiguousTimeError as error:
        typed.told, typed.ambiguous, status = visit.said(error.sentence), True, HTTPStatus.UNPROCESSABLE_ENTITY
    except InvalidRequestError as error:
        typed.told, status = visit.said(error.sentence), HTTPStatus.UNPROCESSABLE_ENTITY
    if changed is not None:
        visit.services.nudge()
        return visit.redirect(f"/follow-ups/{changed}")
    return _page(visit, typed, status)


def _check_version(visit: Visit, found: FollowUp) -> None:
    """Raise `ChangedMeanwhileError` if the follow-up has been changed since the page was loaded."""
    given = visit.form.text("version")
    if given and found.status == Status.PENDING and given != found.updated_at.isoformat():
        raise ChangedMeanwhileError


def _as_typed(message: str) -> str:
    """Return the message with line feeds as its only line breaks, like text from the console's forms."""
    return message.replace("\r\n", "\n").replace("\r", "\n")


def _changes(visit: Visit, found: FollowUp, typed: FollowUpForm) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if typed.message is not None and typed.message != _as_typed(found.message):
        changes["message"] = typed.message
    zone = Zone(visit.form.text("due_zone", visit.zone.name))
    # Browsers omit the seconds of a time if the seconds are zero.
    if typed.due and typed.due not in {zone.typed(found.due_date), zone.typed(found.due_date).removesuffix(":00")}:
        changes["due_date"] = zone.read(typed.due, visit.form.text("fold"))
    return changes


def _page(visit: Visit, typed: FollowUpForm, status: int = HTTPStatus.OK) -> Response:
    with visit.transaction() as session:
        _own(visit, session)
        try:
            found = explained(session, visit.id(), visit.services.settings)
        except FollowUpNotFoundError as error:
            raise NotFoundError from error
        session.expunge_all()
    one = found.follow_up
    editable = one.status == Status.PENDING and visit.may(Doing.CHANGE)
    return visit.page(
        "follow_up.html",
        status,
        found=found,
        one=one,
        explanation=visit.said(found.explanation),
        typed=typed,
        due=typed.due if typed.due is not None else visit.zone.typed(one.due_date),
        message=typed.message if typed.message is not None else one.message,
        shows_text=visit.person.sees_texts or typed.reveal,
        timeline=timeline(found),
        editable=editable,
        retriable=one.status == Status.FAILED and visit.may(Doing.CHANGE) and found.around.retried_as is None,
        bounds={"message": MAX_MESSAGE_LENGTH, "reason": MAX_REASON_LENGTH},
    )
