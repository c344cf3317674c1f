"""Authentication: the API key, and the one transaction in which the request is served.

The key is looked up in the request's own transaction, so that a revocation counts from its commit on and costs no round
trip of its own. FastAPI's dependencies would each take a thread and run after the body's validation; yet a stranger's
bad body must be 401, not 422 (`AuthenticatedRoute`).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from structlog.contextvars import bind_contextvars

from followups.api.access_log import KEY
from followups.database_errors import is_undone
from followups.delivery.claim import AHEAD_TICKS
from followups.errors import UnauthorizedError
from followups.states import Final, Status, finish
from followups.store import api_keys
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from datetime import datetime

    from fastapi.responses import Response
    from sqlalchemy.orm import Session, sessionmaker
    from starlette.types import Scope

    from followups.api.access_log import Seen
    from followups.api.key_rate_limit import RateLimit
    from followups.models import FollowUp
    from followups.states import ReasonCode
    from followups.store.api_keys import Identity

log = get_logger(__name__)

USE_RECORDED_EVERY = timedelta(minutes=1)
"""Precision of `last_used_at`."""

KNOWN_FOR = timedelta(seconds=10)
KNOWN_AT_MOST = 10_000
"""Maximum number of keys remembered as valid."""


class LastUse:
    """Keys whose use was recorded recently, so that most requests cost no write."""

    def __init__(self) -> None:
        """Start without any."""
        self._recorded: dict[UUID, float] = {}
        self._lock = threading.Lock()

    def is_news(self, key_id: UUID) -> bool:
        """Return whether the key's use should be recorded now, which is once a minute."""
        now = time.monotonic()
        with self._lock:
            if now < self._recorded.get(key_id, 0.0):
                return False
            self._recorded[key_id] = now + USE_RECORDED_EVERY.total_seconds()
            return True


class KnownKeys:
    """Hashes of recently validated keys, whose requests are read without asking the database first.

    The transaction of each request checks the key again, so a revocation still takes effect at once. An instance
    belongs to one event loop.
    """

    def __init__(self) -> None:
        """Know of none."""
        self._until: dict[bytes, float] = {}

    def has(self, hashed: bytes) -> bool:
        """Return whether the key was valid within the last `KNOWN_FOR`."""
        return time.monotonic() < self._until.get(hashed, 0.0)

    def add(self, hashed: bytes) -> None:
        """Remember a valid key, and forget the oldest one if there are too many."""
        self._until.pop(hashed, None)
        self._until[hashed] = time.monotonic() + KNOWN_FOR.total_seconds()
        if len(self._until) > KNOWN_AT_MOST:
            del self._until[next(iter(self._until))]


@dataclass(frozen=True, slots=True)
class Services:
    """What all requests share: `app.state.services`."""

    sessions: sessionmaker[Session]
    rate_limit: RateLimit
    nudge: Callable[[], None]
    tick_interval: timedelta
    last_use: LastUse
    known_keys: KnownKeys
    exclusive_external_ids: bool
    """Whether each external id belongs to one workspace only.

    This is needed where nothing but the external id identifies a chat's workspace.
    """


@dataclass(slots=True)
class Work:
    """The request's transaction, with its workspace and its start by the database's clock."""

    session: Session
    workspace_id: UUID
    now: datetime
    due_until: datetime
    nudges: bool = False
    ends: tuple[tuple[UUID, Final], ...] = ()

    def report(self, follow_up: FollowUp, finished_at: datetime | None = None) -> None:
        """Record what this transaction did to the follow-up: it may be due soon, or have ended.

        ``finished_at`` is the caller's own time of the end, or None for now.
        """
        if follow_up.status == Status.PENDING:
            self.nudges = self.nudges or follow_up.due_date <= self.due_until
        # Otherwise it had ended before, and at most its chat message's id was filled in.
        elif follow_up.updated_at == self.now and follow_up.finished_at == (finished_at or self.now):
            self.ends = (*self.ends, (follow_up.id, Final(Status(follow_up.status), follow_up.reason)))
            self.nudges = True  # a later one of its chat may have waited for it

    def cancelled(self, ids: Iterable[UUID], code: ReasonCode) -> None:
        """Record that this transaction cancelled these."""
        final = finish(Status.CANCELLED, code)
        self.ends = (*self.ends, *((each, final) for each in ids))


class Caller:
    """The sender of a request."""

    def __init__(self, request: Request) -> None:
        """Take the request; its key is not checked yet."""
        self._services: Services = request.app.state.services
        self._given = request.headers.get("authorization", "")
        self._seen: Seen = request.scope[KEY]

    @property
    def exclusive_external_ids(self) -> bool:
        """Whether each external id belongs to one workspace only."""
        return self._services.exclusive_external_ids

    @property
    def key_id(self) -> UUID:
        """The id of the key, once it has been checked."""
        return UUID(self._seen.key_id)

    @contextmanager
    def transaction(self) -> Iterator[Work]:
        """Open the transaction, check the key, commit at the end, and then log what was done.

        Raises `UnauthorizedError` and `TooManyRequestsError`.
        """
        identity: Identity | None = None
        try:
            with self._services.sessions() as session, session.begin():
                identity = self._identify(session)
                due_until = identity.now + AHEAD_TICKS * self._services.tick_interval
                work = Work(session, identity.workspace_id, identity.now, due_until)
                yield work
        finally:
            if identity is not None:
                self._record_use(identity.key_id)
        if work.nudges:
            self._services.nudge()
        if work.ends:
            _tell(work.ends)

    def check(self) -> None:
        """Check the key and nothing else. Raises as `transaction`."""
        with self.transaction():
            pass

    def _identify(self, session: Session) -> Identity:
        found = api_keys.authenticate(session, key_in(self._given))
        if found is None:
            raise UnauthorizedError
        self._seen.workspace_id, self._seen.key_id = str(found.workspace_id), str(found.key_id)
        # in this thread's copy of the context, which ends with its work
        bind_contextvars(workspace_id=self._seen.workspace_id)
        self._services.rate_limit.check(found.key_id)
        return found

    def _record_use(self, key_id: UUID) -> None:
        if not self._services.last_use.is_news(key_id):
            return
        # In a transaction of its own: otherwise the key's row would stay locked until the request's end.
        with suppress(SQLAlchemyError), self._services.sessions() as session, session.begin():
            api_keys.record_use(session, key_id)


def _tell(ends: tuple[tuple[UUID, Final], ...]) -> None:
    from followups.delivery import events  # noqa: PLC0415 - with it comes the HTTP client, which `openapi` needs not

    events.ended(ends)


def key_in(given: str) -> str:
    """Return the API key of an authorization header, either bare or after ``Bearer``.

    >>> key_in("bearer abc"), key_in(" abc ")
    ('abc', 'abc')
    """
    scheme, _, rest = given.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else given.strip()


async def admit(scope: Scope) -> None:
    """Check that the request has a valid key before its body is read.

    Raises `UnauthorizedError` and database errors.
    """
    services: Services = scope["app"].state.services
    key = key_in(Headers(scope=scope).get("authorization", ""))
    hashed = api_keys.hash_of(key)
    if hashed is None:
        raise UnauthorizedError
    if not services.known_keys.has(hashed):
        if not await run_in_threadpool(_is_good, services, key):
            raise UnauthorizedError
        services.known_keys.add(hashed)


def _is_good(services: Services, key: str) -> bool:
    with services.sessions() as session:
        return api_keys.authenticate(session, key) is not None


async def _caller(request: Request) -> Caller:
    return Caller(request)


Authenticated = Annotated[Caller, Depends(_caller)]


class AuthenticatedRoute(APIRoute):
    """A route that answers 401 to a stranger, whatever else is wrong with the request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, extended to check the key before it reports an invalid request.

        A request whose transaction was rolled back in a conflict with another one is handled once more, since none of
        its work was done.
        """
        handle = super().get_route_handler()

        async def authenticated(request: Request) -> Response:
            try:
                try:
                    return await handle(request)
                except DBAPIError as error:
                    if not is_undone(error):
                        raise
                    log.info("request_tried_again", error=type(error.orig).__name__)
                    return await handle(request)
            except (RequestValidationError, HTTPException):
                await run_in_threadpool(Caller(request).check)
                raise

        return authenticated
