"""Authentication: validation of the API key in the transaction that serves the request.

The first statement of a request also looks up the request's API key. A revocation takes effect as soon as it is
committed. Looking up the key takes no additional round trip. FastAPI validates the body before it runs dependencies.
Without a valid key, even a request with an invalid body must get 401 instead of 422: see `AuthenticatedRoute`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from structlog.contextvars import bind_contextvars

from followups import event_loop
from followups.api.access_log import KEY
from followups.database_errors import is_undone
from followups.delivery.claim import AHEAD_TICKS
from followups.errors import FollowUpsError, UnauthorizedError
from followups.statements import Statement
from followups.states import Final, Status, finish
from followups.store import api_keys
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from fastapi import Request
    from fastapi.responses import Response
    from starlette.types import Scope

    from followups.api.access_log import RequestRecord
    from followups.api.key_rate_limit import KeyRateLimit
    from followups.api.pagination import PageStarts
    from followups.api.request_limits import RequestLimits
    from followups.event_loop import Connection, Database
    from followups.models import FollowUp
    from followups.statements import Query, Steps
    from followups.states import ReasonCode
    from followups.store.api_keys import Identity

T = TypeVar("T")

log = get_logger(__name__)

IDENTITY = "followups.identity"
"""The key under which an ASGI scope contains the request's `Identity`."""

KEY_HASH = "followups.key_hash"
"""The key in an ASGI scope under which the hash of the request's API key is stored."""

USE_RECORDED_EVERY = timedelta(minutes=1)
"""Minimum time between two updates of an API key's `last_used_at`."""

KNOWN_AT_MOST = 10_000
"""Maximum number of API keys that are remembered as valid."""


class LastUse:
    """The API keys whose use was recorded recently. Most requests therefore need not record the use of their key."""

    def __init__(self) -> None:
        """Start with no API keys."""
        self._recorded: dict[UUID, float] = {}

    def is_due(self, key_id: UUID) -> bool:
        """Return whether to record this use of the key; a use is recorded at most once a minute."""
        now = time.monotonic()
        if now < self._recorded.get(key_id, 0.0):
            return False
        self._recorded[key_id] = now + USE_RECORDED_EVERY.total_seconds()
        return True


class KnownKeys:
    """API keys that were valid when they were last used.

    For a known key, a request's body is read before the key is looked up. Each request's transaction checks the API key
    again. A revocation takes effect immediately and removes the key from the known keys. A key that stays in use needs
    a separate lookup only for its first request. A flood of requests with unknown keys cannot delay requests with known
    keys. An instance belongs to one event loop.
    """

    def __init__(self) -> None:
        """Create the cache without any known key."""
        self._known: dict[bytes, Identity] = {}

    def get(self, hashed: bytes) -> Identity | None:
        """Return the key's owner, or None if the key is not known."""
        identity = self._known.pop(hashed, None)
        if identity is not None:
            self._known[hashed] = identity  # moves the key to the end, as the most recently used one
        return identity

    def add(self, hashed: bytes, identity: Identity) -> None:
        """Remember a valid key. If there are more than `KNOWN_AT_MOST` keys, forget the least recently used key."""
        self._known[hashed] = identity
        if len(self._known) > KNOWN_AT_MOST:
            del self._known[next(iter(self._known))]

    def forget(self, hashed: bytes) -> None:
        """Remove an invalid key from the cache."""
        self._known.pop(hashed, None)


@dataclass(frozen=True, slots=True)
class ApiServices:
    """The objects that all requests share, stored in `app.state.services`."""

    database: Database
    rate_limit: KeyRateLimit
    nudge: Callable[[], None]
    tick_interval: timedelta
    last_use: LastUse
    known_keys: KnownKeys
    request_limits: RequestLimits
    starts: PageStarts
    exclusive_external_ids: bool
    """Whether an external id may belong to only one workspace (`Settings.exclusive_external_ids`)."""


@dataclass(slots=True)
class Work:
    """A request's transaction: its workspace, its start time by the database's clock, and its changes."""

    workspace_id: UUID
    key_id: UUID
    ahead: timedelta
    now: datetime = field(init=False)
    """The start time of the transaction. The start time is known once the transaction's first statement has run."""
    nudges: bool = False
    ends: tuple[tuple[UUID, Final], ...] = ()

    def report(self, follow_up: FollowUp, finished_at: datetime | None = None) -> None:
        """Record that the follow-up was changed, because it may now be due soon or have ended.

        ``finished_at`` is the end time reported by the client; None means the current time.
        """
        if follow_up.status == Status.PENDING:
            self.nudges = self.nudges or follow_up.due_date <= self.now + self.ahead
        # The follow-up may have ended before this request. If the follow-up had already ended, a request can only add a
        # chat message's id.
        elif follow_up.updated_at == self.now and follow_up.finished_at == (finished_at or self.now):
            self.ends = (*self.ends, (follow_up.id, Final(Status(follow_up.status), follow_up.reason)))
            self.nudges = True  # the ended follow-up may have blocked a later one in the same chat

    def cancelled(self, ids: Iterable[UUID], code: ReasonCode) -> None:
        """Record which follow-ups the transaction cancelled."""
        final = finish(Status.CANCELLED, code)
        self.ends = (*self.ends, *((each, final) for each in ids))


class Caller:
    """The client that sent a request with a valid API key.

    The first statement of each transaction checks the API key again.
    """

    def __init__(self, request: Request) -> None:
        """Store the request."""
        self._services: ApiServices = request.app.state.services
        self._identity: Identity = request.scope[IDENTITY]
        self._key_hash: bytes = request.scope[KEY_HASH]
        self._is_valid = False

    @property
    def exclusive_external_ids(self) -> bool:
        """Whether an external id may belong to only one workspace."""
        return self._services.exclusive_external_ids

    @property
    def key_id(self) -> UUID:
        """The id of the client's API key."""
        return self._identity.key_id

    @property
    def starts(self) -> PageStarts:
        """The stored starting points of deep pages."""
        return self._services.starts

    async def read(self, rule: Callable[[Work], Steps[T]]) -> T:
        """Run a read-only rule with each statement in a separate transaction.

        Raises the same errors as `change`.
        """
        await self._services.rate_limit.check(self._identity.key_id)
        return await self.read_more(rule)

    async def read_more(self, rule: Callable[[Work], Steps[T]]) -> T:
        """Run another read-only rule of the same request, without counting the request again."""
        async with self._services.request_limits.of(self._identity.workspace_id):
            try:
                async with self._services.database.reading() as connection:
                    return (await self._run(connection, rule))[1]
            finally:
                await self._record_use()

    async def change(
        self, rule: Callable[[Work], Steps[T]], at_once: Callable[[Work], Steps[T | None]] | None = None
    ) -> T:
        """Run the rule in a transaction, commit it, and then log its changes.

        ``at_once`` is an alternative rule with the same effect. ``at_once`` needs only one statement to check the API
        key and make the change. If ``at_once`` returns None, it has changed nothing. If a conflict rolls back the
        transaction, the transaction is retried once. Raises `UnauthorizedError` and `TooManyRequestsError`.
        """
        await self._services.rate_limit.check(self._identity.key_id)
        async with self._services.request_limits.of(self._identity.workspace_id):
            try:
                work, result = (at_once and await self._run_alone(at_once)) or await self._transact(rule)
            except psycopg.Error as error:
                if not is_undone(error):
                    raise
                log.info("request_tried_again", error=type(error).__name__)
                work, result = await self._transact(rule)
            finally:
                await self._record_use()
        if work.nudges:
            self._services.nudge()
        if work.ends:
            _log_transitions(work.ends)
        return result

    async def check(self) -> None:
        """Check the API key without doing anything else. Raises the same errors as `change`."""
        await self.read(_nothing)

    async def _run_alone(self, rule: Callable[[Work], Steps[T | None]]) -> tuple[Work, T] | None:
        work = self._work()
        try:
            async with self._services.database.reading() as connection:
                result = await event_loop.run(connection, rule(work))
        except FollowUpsError:
            return None  # the transaction checks the key again, and raises this error
        if result is None:
            return None
        self._is_valid = True
        return work, result

    async def _transact(self, rule: Callable[[Work], Steps[T]]) -> tuple[Work, T]:
        async with self._services.database.transaction() as connection:
            return await self._run(connection, rule)

    async def _run(self, connection: Connection, rule: Callable[[Work], Steps[T]]) -> tuple[Work, T]:
        work = self._work()
        steps = rule(work)
        try:
            first = next(steps)
        except FollowUpsError:  # an invalid request is reported only to a client with a valid key
            await self._ask(connection, _NOTHING())
            raise
        except StopIteration as end:  # the rule returned its result without a query
            await self._ask(connection, _NOTHING())
            result: T = end.value
            return work, result
        rows = await self._ask(connection, first)
        work.now = rows[0].key_now
        return work, await event_loop.resume(connection, steps, rows if rows[0].is_row else ())

    def _work(self) -> Work:
        return Work(self._identity.workspace_id, self._identity.key_id, AHEAD_TICKS * self._services.tick_interval)

    async def _ask(self, connection: Connection, query: Query) -> Sequence[Any]:
        """Execute the query and look up the API key in one statement."""
        parameters = {**query.parameters, "this_key": self._identity.key_id}
        rows = await event_loop.rows_of(connection, api_keys.with_key(query.statement.driver_sql), parameters)
        if not rows:
            self._services.known_keys.forget(self._key_hash)
            raise UnauthorizedError
        self._is_valid = True
        return rows

    async def _record_use(self) -> None:
        if self._is_valid and self._services.last_use.is_due(self._identity.key_id):
            # The last use of the API key is recorded in a separate transaction. In the request's own transaction, this
            # update would lock the API key's row until the request ends.
            with suppress(psycopg.Error, SQLAlchemyError):
                async with self._services.database.reading() as connection:
                    await event_loop.run(connection, api_keys.record_use.steps(self._identity.key_id))


_NOTHING = Statement("SELECT 1 AS one")


def _nothing(_: Work) -> Steps[None]:
    yield _NOTHING()


def _log_transitions(ends: tuple[tuple[UUID, Final], ...]) -> None:
    from followups.delivery import events  # noqa: PLC0415 - with it comes the HTTP client, which `openapi` needs not

    events.ended(ends)


def key_in(given: str) -> str:
    """Return the API key from an authorization header, with or without ``Bearer``.

    >>> key_in("bearer abc"), key_in(" abc ")
    ('abc', 'abc')
    """
    scheme, _, rest = given.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else given.strip()


async def admit(scope: Scope) -> None:
    """Check the request's API key before its body is read, and store the key's owner in the scope.

    Raises `UnauthorizedError`, `TooManyRequestsError` and database errors.
    """
    services: ApiServices = scope["app"].state.services
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    key = key_in(given.decode("latin-1"))
    hashed = api_keys.hash_of(key)
    identity = services.known_keys.get(hashed) if hashed else None
    if identity is None:
        await services.request_limits.throttle()
        if hashed is None:
            raise UnauthorizedError
        unknown_keys = services.request_limits.unknown_keys
        await unknown_keys.acquire()
        try:
            async with unknown_keys, services.database.reading() as connection:
                identity = await event_loop.run(connection, api_keys.authenticate.steps(key))
        finally:
            unknown_keys.release()
        if identity is None:
            raise UnauthorizedError
        services.known_keys.add(hashed, identity)
    scope[IDENTITY], scope[KEY_HASH] = identity, hashed
    seen: RequestRecord = scope[KEY]
    seen.workspace_id, seen.key_id = str(identity.workspace_id), str(identity.key_id)
    bind_contextvars(workspace_id=seen.workspace_id)


class AuthenticatedRoute(APIRoute):
    """A route that checks the API key first: without a valid key, any request gets 401."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, extended to check the API key before an invalid request is reported."""
        handle = super().get_route_handler()

        async def authenticated(request: Request) -> Response:
            try:
                return await handle(request)
            except (RequestValidationError, HTTPException):
                await Caller(request).check()
                raise

        return authenticated
