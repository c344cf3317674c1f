"""The form that schedules a new follow-up."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy import func, select, text

from followups import checks, scheduling
from followups.console import reasons
from followups.console.visit import uuid_or_none
from followups.console.zones import AmbiguousTimeError, Zone
from followups.errors import ChatNotFoundError, ConflictError, InvalidRequestError, WorkspaceNotFoundError
from followups.models import MAX_MESSAGE_LENGTH, Chat
from followups.store import idempotency, workspaces
from followups.store.audit import Action
from followups.store.idempotency import StoredResponse

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit

_BY_EXTERNAL_ID = text("""
    SELECT id FROM chats
     WHERE external_id = :external_id AND workspace_id = :workspace_id AND removed_at IS NULL LIMIT 2
""")


@dataclass(slots=True)
class ScheduleForm:
    """The values that the person has typed into the form."""

    chat: str = ""
    message: str = ""
    due: str = ""
    workspace: str = ""
    token: UUID = field(default_factory=uuid4)
    """The form's identifier, by which a repeated submission is recognised."""
    told: str = ""
    ambiguous: bool = False
    consequences: list[str] = field(default_factory=list)


def show(visit: Visit) -> Response:
    """Show the form. If the URL names a chat, the form's chat field is already filled in."""
    chat = visit.person.chat_id or visit.query.text("chat")
    workspace = visit.query.text("workspace")
    if not workspace and visit.person.workspace_id is None and len(names := visit.workspace_names()) == 1:
        workspace = names[0]
    return _page(visit, ScheduleForm(chat=str(chat), workspace=workspace))


def schedule(visit: Visit) -> Response:
    """Schedule the follow-up and redirect to it.

    The "Check" button shows the consequences without scheduling anything.
    """
    form = visit.form
    typed = ScheduleForm(form.text("chat"), form.raw("message"), form.text("due"), form.text("workspace"))
    typed.token = form.uuid("token") or typed.token
    created: UUID | None = None
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    try:
        with visit.transaction() as session:
            chat = _chat(visit, session, typed)
            due = Zone(form.text("due_zone", visit.zone.name)).read(typed.due, form.text("fold"))
            now = session.execute(select(func.now())).scalar_one()
            if form.text("do") == "check":
                typed.consequences = reasons.consequences_of(visit, session, chat, due, now)
                status = HTTPStatus.OK
            else:
                created = _schedule_once(visit, session, chat, typed, due)
    except (ChatNotFoundError, WorkspaceNotFoundError) as error:
        typed.told = visit.said(error.sentence)
    except ConflictError as error:
        typed.told, status = visit.said(error.sentence), HTTPStatus.CONFLICT
    except AmbiguousTimeError as error:
        typed.told, typed.ambiguous = visit.said(error.sentence), True
    except InvalidRequestError as error:
        typed.told = visit.said(error.sentence)
    if created is None:
        return _page(visit, typed, status)
    visit.services.nudge()
    return visit.redirect(f"/follow-ups/{created}")


def _schedule_once(visit: Visit, session: Session, chat: Chat, typed: ScheduleForm, due: datetime) -> UUID:
    """Schedule the follow-up and return its id. Submitting the form twice schedules only one follow-up."""
    submitted = idempotency.hash_of(repr((chat.id, typed.message, due)).encode(errors="surrogatepass"))
    key = f"console form {typed.token} {submitted.hex()}"
    if known := idempotency.recall(session, chat.workspace_id, key, submitted, wait=True):
        return UUID(known.location)
    new = scheduling.schedule(
        session, workspace_id=chat.workspace_id, chat_id=chat.id, message=typed.message, due_date=due
    )
    visit.record(session, Action.FOLLOW_UP_CREATED, chat.workspace_id, new.id)
    response = StoredResponse(HTTPStatus.SEE_OTHER, str(new.id), b"")
    idempotency.remember(session, chat.workspace_id, key, submitted, response)
    return new.id


def _chat(visit: Visit, session: Session, typed: ScheduleForm) -> Chat:
    """Return the chat that has this id or external id.

    Raises `ChatNotFoundError` if the person may not see the chat.
    """
    viewer = visit.person
    workspace_id = viewer.workspace_id
    if workspace_id is None:
        if not typed.workspace:
            message = visit.t("Name the workspace of the chat.")
            raise InvalidRequestError(message, field="workspace")
        workspace_id = workspaces.find(session, typed.workspace).id
    chat_id = uuid_or_none(typed.chat)
    if chat_id is None:
        checks.check_text(typed.chat, "chat")
        given = {"external_id": typed.chat, "workspace_id": workspace_id}
        found = session.scalars(_BY_EXTERNAL_ID, given).all()
        if len(found) > 1:
            message = visit.t("Several chats have this external id; give the chat's own id.")
            raise InvalidRequestError(message, field="chat")
        chat_id = found[0] if found else None
    chat = session.get(Chat, (workspace_id, chat_id)) if chat_id else None
    if chat is None or chat.removed_at is not None or not viewer.sees(workspace_id, chat.id):
        raise ChatNotFoundError
    return chat


def _page(visit: Visit, typed: ScheduleForm, status: int = HTTPStatus.OK) -> Response:
    return visit.page("new.html", status, typed=typed, longest=MAX_MESSAGE_LENGTH)
