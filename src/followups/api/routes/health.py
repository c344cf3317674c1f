"""Endpoints for operators, without an API key: liveness, readiness with its checks, and metrics."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.exc import SQLAlchemyError

from followups.api import responses
from followups.api.problems import ProblemAnswer
from followups.api.schemas import Check, Health, Readiness
from followups.database_errors import IS_READ_ONLY, takes_changes, unfit
from followups.schema import alembic_config, is_ready
from followups.store import last_tick

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from followups.api.request_limits import SharedResult
    from followups.settings import Settings


TIMEOUT = timedelta(seconds=1)
"""How long to wait for the broker to answer."""


class ReadinessChecks:
    """The readiness checks of one process."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Store the settings and the engine. Connections are opened on first use."""
        self._engine = engine
        self._stale = last_tick.stale_after(settings.tick_interval)
        self._broker = Redis.from_url(
            settings.broker_url.get_secret_value(),
            socket_timeout=TIMEOUT.total_seconds(),
            socket_connect_timeout=TIMEOUT.total_seconds(),
            retry=Retry(NoBackoff(), 0),
        )

    def checks(self) -> dict[str, Check]:
        """Run every check and return its result."""
        return self._database() | {"broker": self._check_broker()}

    def close(self) -> None:
        """Close the connection to the broker."""
        self._broker.close()

    def _database(self) -> dict[str, Check]:
        unknown = Check(ok=False, detail="unknown: the database cannot be queried")
        checks = {"database": unknown, "migrations": unknown, "tick": unknown}
        try:
            with self._engine.connect() as connection:
                writable = takes_changes(connection)
                checks["database"] = Check(ok=writable, detail="answers" if writable else IS_READ_ONLY)
                checks["migrations"] = _migrations(connection)
                if checks["migrations"].ok:
                    checks["tick"] = self._tick(connection)
                else:
                    checks["tick"] = Check(ok=False, detail="unknown: the database is not migrated")
        except SQLAlchemyError as error:
            checks["database"] = Check(ok=False, detail=unfit(error) or f"does not answer ({type(error).__name__})")
        return checks

    def _tick(self, connection: Connection) -> Check:
        age = last_tick.last_tick_age(connection)
        if age is None:
            return Check(ok=False, detail="none yet: start beat and a worker")
        if age > self._stale:
            return Check(ok=False, detail=f"none for {age.total_seconds():.0f} s: start beat and a worker")
        return Check(ok=True, detail=f"{age.total_seconds():.1f} s ago")

    def _check_broker(self) -> Check:
        try:
            self._broker.ping()
        except (RedisError, OSError) as error:
            return Check(ok=False, detail=f"does not answer ({type(error).__name__})")
        return Check(ok=True, detail="answers")


def _migrations(connection: Connection) -> Check:
    found, newest = MigrationContext.configure(connection).get_current_revision(), _newest_revision()
    if found == newest:
        return Check(ok=True, detail=str(found))
    if _is_ready(found):
        return Check(ok=True, detail=f"at {found}, newer than {newest}: replace this process with the newer version")
    return Check(ok=False, detail=f"at {found or 'none'}, wants {newest}: run followups migrate")


_is_ready = lru_cache(maxsize=8)(is_ready)


@lru_cache(maxsize=1)
def _newest_revision() -> str | None:
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


router = APIRouter(tags=["Service"])


@router.get("/healthz", operation_id="health", response_model=Health, responses=responses.HEALTH)
async def health() -> Response:
    """Report that the process is running, without checking anything else."""
    return responses.answer(b'{"status":"up"}')


@router.get("/readyz", operation_id="readiness", response_model=Readiness, responses=responses.READINESS)
async def readiness(request: Request) -> Response:
    """Check the database, its migrations, the age of the last tick, and the broker."""
    result: SharedResult[dict[str, Check]] = request.app.state.readiness
    checks = await result.get()
    failing = [f"{name} ({check.detail})" for name, check in checks.items() if not check.ok]
    if not failing:
        return responses.answer(Readiness(status="ready", checks=checks).model_dump_json().encode())
    told = {name: check.model_dump() for name, check in checks.items()}
    detail = f"Not ready: {', '.join(failing)}."
    return ProblemAnswer(503, "not-ready", detail, {"retry-after": "5"}, {"checks": told}).response()


@router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse, responses=responses.METRICS)
async def metrics(request: Request) -> Response:
    """Return the counters of all processes and the gauges of the backlog in Prometheus text format."""
    result: SharedResult[bytes] = request.app.state.metrics
    return Response(await result.get(), media_type=CONTENT_TYPE_LATEST)
