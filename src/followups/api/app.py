"""The ASGI application."""

from __future__ import annotations

import gc
import math
import sys
from contextlib import asynccontextmanager
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import Match

from followups.api import documentation, problems
from followups.api.access_log import Access
from followups.api.authentication import ApiServices, KnownKeys, LastUse
from followups.api.gate import CONSOLE, Gate
from followups.api.key_rate_limit import KeyRateLimit
from followups.api.listening import MetricsPort
from followups.api.metrics import Exposition
from followups.api.pagination import PageStarts
from followups.api.request_limits import RequestLimits, SharedResult
from followups.api.routes import chats, console_links, follow_ups, health
from followups.api.routes.health import ReadinessChecks
from followups.console.application import Console
from followups.database import make_engine
from followups.errors import FollowUpsError, SettingsError
from followups.event_loop import Database
from followups.settings import load_settings
from followups.store.counter_totals import CounterTotals
from followups.telemetry import traces
from followups.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fastapi.responses import Response
    from starlette.types import ASGIApp

    from followups.settings import Settings

NAME = "followups-web"

POOL_SIZE = 8
"""Maximum number of database connections for API requests."""

THREADS = 2
"""Maximum number of threads that serve probes and scrapes. Each thread uses one database connection."""

STATEMENT_TIMEOUT = timedelta(seconds=10)
"""Time limit of one SQL statement. A statement normally takes milliseconds, and most clients give up before this limit.
"""


ROUTERS = (
    follow_ups.lists,
    follow_ups.router,
    chats.router,
    console_links.router,
    health.router,
    documentation.router,
)


def create_app(settings: Settings, nudge: Callable[[], None] | None = None) -> FastAPI:
    """Return the application, which opens its connections when they are first used.

    ``nudge`` is called after a commit that makes a follow-up due within the next two ticks. By default, ``nudge`` asks
    the workers to run a tick.
    """
    url = settings.database_url.get_secret_value()
    engine = make_engine(url, pool_size=THREADS, application_name=NAME, statement_timeout=STATEMENT_TIMEOUT)
    database = Database(url, pool_size=POOL_SIZE, application_name=NAME, statement_timeout=STATEMENT_TIMEOUT)
    app = _routes()
    app.state.metrics_port = settings.metrics_port
    checks = ReadinessChecks(settings, engine)
    app.state.document = SharedResult(lambda: to_json(app.openapi()), math.inf)
    app.state.readiness = SharedResult(checks.checks)
    totals = CounterTotals(engine)
    app.state.metrics = SharedResult(Exposition(engine, settings.max_in_flight, totals).text)
    app.state.services = ApiServices(
        database=database,
        rate_limit=KeyRateLimit(settings),
        nudge=nudge or _nudge_workers,
        tick_interval=settings.tick_interval,
        last_use=LastUse(),
        known_keys=KnownKeys(),
        request_limits=RequestLimits(),
        starts=PageStarts(),
        exclusive_external_ids=settings.exclusive_external_ids,
    )

    console = Console(settings, nudge or _nudge_workers) if settings.console else None
    if console:
        app.state.console = console
        app.mount(CONSOLE, console)
        app.add_route(CONSOLE, _to_console)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        totals.start()
        traces.start(NAME)
        # modules are never freed; scanning them would lengthen each garbage collection by 0.1 s
        gc.freeze()
        yield
        totals.stop()
        traces.stop()
        await app.state.services.rate_limit.close()
        checks.close()
        await database.close()
        if console:
            console.close()
        engine.dispose()

    app.router.lifespan_context = lifespan
    return app


def app_from_environment() -> FastAPI:
    """Return the application with the settings from the environment.

    If a setting is invalid, exit with an error message.
    """
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.stderr.write(f"followups: {error}\n")
        raise SystemExit(2) from None
    configure_logging(settings.log_format, settings.log_level)
    from followups.worker.celery_app import nudge  # noqa: PLC0415 - Celery; loaded now, or the first request would wait for it

    return create_app(settings, nudge)


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; building it needs neither settings nor a database."""
    return _routes().openapi()


class Application(FastAPI):
    """FastAPI with this project's OpenAPI document, its gate and its access log."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which is generated only once."""
        self.openapi_schema = self.openapi_schema or documentation.describe(self)
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        """Put the gate around Starlette's error middleware, because that middleware re-raises errors.

        The access log is the outermost middleware.
        """
        inner = MetricsPort(super().build_middleware_stack(), self.state.metrics_port)
        return Access(Gate(inner))


def _routes() -> FastAPI:
    app = Application(
        title=documentation.TITLE,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        strict_content_type=False,
        # By default, newer versions of FastAPI trace and log request bodies, which contain message texts.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            FollowUpsError: _error_response,
            RequestValidationError: _validation_response,
            HTTPException: _status_response,
            Exception: _exception_response,
        },
    )
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _error_response(_: Request, error: Exception) -> Response:
    return problems.of_error(error).response()  # type: ignore[arg-type] # registered for this class


async def _validation_response(_: Request, error: Exception) -> Response:
    return problems.of_validation(error.errors()).response()  # type: ignore[attr-defined] # as above


async def _exception_response(_: Request, error: Exception) -> Response:
    return problems.of_exception(error).response()


async def _status_response(request: Request, error: Exception) -> Response:
    status: int = error.status_code  # type: ignore[attr-defined] # as above
    if status == HTTPStatus.BAD_REQUEST:  # FastAPI's response if the body is not JSON or not valid UTF-8
        return problems.of_validation([{"type": "json_invalid", "loc": (), "msg": "The body is not JSON"}]).response()
    if status == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette's own response lists only the methods of one route
        return problems.of_status(status, headers={"allow": ", ".join(_methods(request))}).response()
    detail = "There is nothing at this path." if status == HTTPStatus.NOT_FOUND else ""
    return problems.of_status(status, detail).response()


def _methods(request: Request) -> list[str]:
    methods: set[str] = set()
    for route in (*request.app.routes, *(route for router in ROUTERS for route in router.routes)):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


async def _to_console(request: Request) -> Response:
    return RedirectResponse(request.app.state.console.services.base + "/")


def _nudge_workers() -> None:
    from followups.worker.celery_app import nudge  # noqa: PLC0415 - Celery is wanted only when something is due soon

    nudge()
