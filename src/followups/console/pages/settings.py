"""The settings page of a workspace: API keys, sending hours, rate limits, pauses and sessions.

A person who may see all workspaces can select one. With access to all workspaces, a person can also view the rate
limits and pauses that apply to every workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from followups.channels import Channel
from followups.console.zones import Zone
from followups.errors import InvalidRequestError, NotFoundError, WorkspaceNotFoundError
from followups.models import ApiKey, AuditEvent, Workspace
from followups.operations import administration, bulk
from followups.sending_hours import DAYS, SendingHours, span_of
from followups.store import console_sessions, holds, pauses, rate_limits, sending_hours, workspaces
from followups.store.audit import Action
from followups.wording import SECONDS, Sentence, rate_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit

MOST_KEYS = 200
MOST_SESSIONS = 100
MOST_PAUSES = 100
MOST_LIMITS = 100

LIVES = {"": None, "30": timedelta(days=30), "90": timedelta(days=90), "365": timedelta(days=365)}
"""Lifetimes of an API key, keyed by the value of the form field."""

LEAST_RATE, MOST_RATE = 0.01 / SECONDS["d"], 1_000_000
PREVIEWED = timedelta(days=7)

RELEASE_LIMIT = timedelta(seconds=2)
"""Maximum time for which one request may release held follow-ups.

About ten thousand follow-ups are released per second.
"""


@dataclass(slots=True)
class PageResult:
    """The message that the page shows after a change has succeeded or has been refused."""

    wrong: str = ""
    done: str = ""
    key: str = ""
    """A new API key, which is shown only once."""
    typed: dict[str, str] = field(default_factory=dict)
    hours: SendingHours | None = None
    """Sending hours in a preview, not yet saved."""


@dataclass(frozen=True, slots=True)
class HoursForm:
    """The values in the form for the sending hours."""

    zone: str
    opening: str
    closing: str
    days: frozenset[int]


def show(visit: Visit) -> Response:
    """Show the settings page of the workspace."""
    with visit.transaction() as session:
        return _page(visit, session, _chosen(visit, session), PageResult())


def create_key(visit: Visit) -> Response:
    """Create an API key and show it once."""
    with visit.transaction() as session:
        workspace = _required(visit, session)
        try:
            life = _life(visit)
            actor = visit.actor
            _, key = administration.create_key(session, actor, workspace.id, visit.form.text("name"), life)
        except InvalidRequestError as error:
            return _page(
                visit,
                session,
                workspace,
                PageResult(visit.said(error.sentence), typed={"name": visit.form.text("name")}),
            )
        return _page(visit, session, workspace, PageResult(key=key))


def _life(visit: Visit) -> timedelta | None:
    chosen = visit.form.text("expires")
    if chosen not in LIVES:
        message = visit.t("Choose when the key expires.")
        raise InvalidRequestError(message, field="expires")
    return LIVES[chosen]


def ask_to_revoke(visit: Visit) -> Response:
    """Show when the API key was last used, and ask whether to revoke it."""
    with visit.transaction() as session:
        key = _key(visit, session)
        workspace = session.get_one(Workspace, key.workspace_id).name
        session.expunge_all()
    return visit.page("revoke.html", key=key, workspace=workspace)


def revoke_key(visit: Visit) -> Response:
    """Revoke the API key."""
    with visit.transaction() as session:
        key = _key(visit, session)
        administration.revoke_key(session, visit.actor, key.id)
        name = session.get_one(Workspace, key.workspace_id).name
    return _back(visit, name, "api-keys")


def _key(visit: Visit, session: Session) -> ApiKey:
    key = session.get(ApiKey, visit.id())
    if key is None or visit.person.workspace_id not in {None, key.workspace_id}:
        raise NotFoundError
    return key


def set_hours(visit: Visit) -> Response:
    """Save, preview or remove the workspace's sending hours."""
    doing = visit.form.text("do")
    with visit.transaction() as session:
        workspace = _required(visit, session)
        actor = visit.actor
        try:
            if doing == "always":
                administration.clear_hours(session, actor, workspace.id)
            else:
                hours = _typed_hours(visit)
                if doing == "preview":
                    _week(hours, session.execute(select(func.now())).scalar_one())
                    return _page(visit, session, workspace, PageResult(hours=hours))
                administration.set_hours(session, actor, workspace.id, hours)
        except InvalidRequestError as error:
            return _page(visit, session, workspace, PageResult(visit.said(error.sentence), typed=_typed(visit)))
        except LookupError:
            told = visit.t("These hours are never open: {hours}.", hours=_typed_hours(visit).in_words)
            return _page(visit, session, workspace, PageResult(told, typed=_typed(visit)))
        workspace_id, name = workspace.id, workspace.name
    finished = _within_time(_release_held(visit, workspace_id))
    visit.services.nudge()
    if finished:
        return _back(visit, name, "sending-hours")
    with visit.transaction() as session:
        done = visit.t(
            "The hours are saved. Some follow-ups are still held by the former hours: save again to release more."
        )
        return _page(visit, session, _required(visit, session), PageResult(done=done))


def _release_held(visit: Visit, workspace_id: UUID) -> Iterator[None]:
    """Release the follow-ups that were held by the former sending hours. Each batch is a short transaction."""
    released = 1
    while released:
        with visit.services.engine.begin() as connection:
            released = holds.release_held(connection, workspace_id)
        yield


def _within_time(batches: Iterator[object]) -> bool:
    """Process batches until all are done or `RELEASE_LIMIT` has passed. Return whether all batches were processed."""
    deadline = monotonic() + RELEASE_LIMIT.total_seconds()
    return not any(monotonic() > deadline for _ in batches)


def _typed(visit: Visit) -> dict[str, str]:
    return {name: visit.form.text(name) for name in ("time_zone", "from", "to")}


def _typed_hours(visit: Visit) -> SendingHours:
    try:
        opening, closing = (time.fromisoformat(visit.form.text(name)).replace(second=0) for name in ("from", "to"))
        days = frozenset(DAYS.index(each) for each in visit.form.every("day"))
    except ValueError:
        message = visit.t("Give both times of the day, as in 08:00.")
        raise InvalidRequestError(message, field="from") from None
    if opening.tzinfo or closing.tzinfo:
        message = visit.t("Give both times of the day, as in 08:00.")
        raise InvalidRequestError(message, field="from")
    if not days:
        message = visit.t("Choose at least one day.")
        raise InvalidRequestError(message, field="days")
    if not visit.services.is_zone(visit.form.text("time_zone")):
        message = visit.t("There is no such time zone; use a name such as America/Sao_Paulo.")
        raise InvalidRequestError(message, field="time_zone")
    return SendingHours(visit.form.text("time_zone"), opening, closing, days)


def _week(hours: SendingHours, now: datetime) -> list[tuple[datetime, datetime]]:
    """Return the sending periods of the coming week. Raises `LookupError` if the sending hours never begin."""
    spans: list[tuple[datetime, datetime]] = []
    moment = now
    while moment < now + PREVIEWED:
        opening, closing = span_of(hours, moment)
        if opening > now + PREVIEWED:
            break
        spans.append((opening, closing))
        moment = closing
    return spans


def set_limit(visit: Visit) -> Response:
    """Set a rate limit."""
    with visit.transaction() as session:
        workspace = _chosen(visit, session)
        try:
            scope = _limit_scope(visit, workspace)
            rate, burst = _rate(visit)
            administration.set_limit(session, visit.actor, scope, rate, burst)
        except InvalidRequestError as error:
            return _page(
                visit,
                session,
                workspace,
                PageResult(visit.said(error.sentence), typed={"rate": visit.form.text("rate")}),
            )
        name = workspace.name if workspace else ""
    return _back(visit, name, "rate-limits")


def _rate(visit: Visit) -> tuple[float, int]:
    """Return the rate in follow-ups per second, and the burst."""
    form = visit.form
    try:
        rate = float(form.text("rate")) / SECONDS[form.text("per_unit")]
        burst = int(form.text("burst")) if form.text("burst") else max(1, int(rate))
    except (ValueError, KeyError, OverflowError):
        rate, burst = 0.0, 0
    if not (LEAST_RATE <= rate <= MOST_RATE and 1 <= burst <= MOST_RATE):
        message = visit.t("The rate, and the number at once, must be above 0.")
        raise InvalidRequestError(message, field="rate")
    return rate, burst


def clear_limit(visit: Visit) -> Response:
    """Remove a rate limit."""
    with visit.transaction() as session:
        workspace = _chosen(visit, session)
        administration.clear_limit(session, visit.actor, _limit_scope(visit, workspace))
        name = workspace.name if workspace else ""
    visit.services.nudge()
    return _back(visit, name, "rate-limits")


def _limit_scope(visit: Visit, workspace: Workspace | None) -> rate_limits.LimitScope:
    per = visit.form.text("per", "all")
    if per not in {"all", "chat", "workspace"} or (workspace and per == "workspace"):
        message = visit.t("Choose what the limit is for.")
        raise InvalidRequestError(message, field="per")
    return rate_limits.LimitScope(workspace.id if workspace else None, _channel(visit), per)


def _channel(visit: Visit) -> str | None:
    channel = visit.form.text("channel")
    if channel and channel not in set(Channel):
        message = visit.t("There is no such channel.")
        raise InvalidRequestError(message, field="channel")
    return channel or None


def pause(visit: Visit) -> Response:
    """Pause the workspace or a channel."""
    with visit.transaction() as session:
        workspace = _chosen(visit, session)
        channel = _channel(visit)
        if workspace is None and channel is None:
            told = PageResult(visit.t("Choose a channel, or a workspace first."))
            return _page(visit, session, workspace, told)
        scope = pauses.PauseScope(workspace.id if workspace else None, channel)
        administration.pause(session, visit.actor, scope)
        name = workspace.name if workspace else ""
    return _back(visit, name, "pauses")


def resume(visit: Visit) -> Response:
    """End a pause and release the follow-ups that were held by it."""
    with visit.transaction() as session:
        workspace = _chosen(visit, session)
        scope = pauses.PauseScope(workspace.id if workspace else None, _channel(visit))
        administration.resume(session, visit.actor, scope)
        name = workspace.name if workspace else ""
    _within_time(bulk.release_paused(visit.services.engine))  # the workers release the follow-ups that are still held
    visit.services.nudge()
    return _back(visit, name, "pauses")


def end_session(visit: Visit) -> Response:
    """End one of the workspace's console sessions."""
    with visit.transaction() as session:
        workspace = _chosen(visit, session)
        if not console_sessions.end_one(session, visit.id(), visit.person.workspace_id):
            raise NotFoundError
        name = workspace.name if workspace else ""
    return _back(visit, name, "sessions")


def _chosen(visit: Visit, session: Session) -> Workspace | None:
    """Return the session's workspace, or the one an operator has chosen; None means all workspaces."""
    viewer = visit.person
    if viewer.workspace_id is not None:
        return session.get_one(Workspace, viewer.workspace_id)
    name = visit.form.text("workspace") or visit.query.text("workspace")
    if not name:
        return None
    try:
        return workspaces.find(session, name)
    except WorkspaceNotFoundError as error:
        raise NotFoundError from error


def _required(visit: Visit, session: Session) -> Workspace:
    workspace = _chosen(visit, session)
    if workspace is None:
        message = visit.t("Choose a workspace first.")
        raise InvalidRequestError(message, field="workspace")
    return workspace


def _back(visit: Visit, workspace: str, section: str) -> Response:
    query = {"workspace": workspace} if visit.person.workspace_id is None else {}
    response = visit.redirect("/settings", **query)
    response.headers["location"] += f"#{section}"
    return response


def _page(visit: Visit, session: Session, workspace: Workspace | None, told: PageResult) -> Response:
    connection = session.connection()
    workspace_id = workspace.id if workspace else None
    now = session.execute(select(func.now())).scalar_one()
    stored = sending_hours.find(session, workspace_id) if workspace_id else None
    shown = told.hours or stored
    week: Sequence[tuple[datetime, datetime]] = ()
    if shown is not None:
        try:
            week = _week(shown, now)
        except LookupError:
            week = ()
    context: dict[str, Any] = {
        "workspace": workspace.name if workspace else "",
        "told": told,
        "keys": _keys(session, workspace_id) if workspace_id else [],
        "stored": stored,
        "hours": _shown_hours(shown, told, visit),
        "week": week,
        "week_zone": Zone(shown.time_zone) if shown and visit.services.is_zone(shown.time_zone) else None,
        "limits": rate_limits.concerning(connection, workspace_id, MOST_LIMITS),
        "pauses": pauses.in_force(connection, workspace_id, MOST_PAUSES),
        "sessions": console_sessions.of_workspace(session, workspace_id, MOST_SESSIONS),
        "channels": [each.value for each in Channel],
        "days": DAYS,
        "lives": [life for life in LIVES if life],
        "units": list(SECONDS),
        "rate": rate_in_words,
        "now": now,
    }
    status = HTTPStatus.UNPROCESSABLE_ENTITY if told.wrong else HTTPStatus.OK
    return visit.page("settings.html", status, **context)


def _shown_hours(shown: SendingHours | None, told: PageResult, visit: Visit) -> HoursForm:
    if told.typed.get("time_zone") is not None:
        days = frozenset(DAYS.index(each) for each in visit.form.every("day") if each in DAYS)
        return HoursForm(told.typed["time_zone"], told.typed["from"], told.typed["to"], days)
    if shown is None:
        return HoursForm(visit.zone.name, "08:00", "20:00", frozenset(range(5)))
    return HoursForm(shown.time_zone, f"{shown.opening:%H:%M}", f"{shown.closing:%H:%M}", shown.days)


def _keys(session: Session, workspace_id: UUID) -> list[tuple[ApiKey, Sentence | None]]:
    """Return a workspace's newest API keys, with each key's creator if recorded."""
    query = select(ApiKey).where(ApiKey.workspace_id == workspace_id).order_by(ApiKey.created_at.desc())
    keys = session.scalars(query.limit(MOST_KEYS)).all()
    created = select(AuditEvent).where(
        AuditEvent.target_id.in_([key.id for key in keys]), AuditEvent.action == Action.API_KEY_CREATED.value
    )
    creators = {event.target_id: event.by for event in session.scalars(created)}
    return [(key, creators.get(key.id)) for key in keys]
