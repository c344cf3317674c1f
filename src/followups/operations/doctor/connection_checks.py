"""Checks of the connections: whether database and broker use verified TLS, and whether the transport is reachable."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import psycopg
import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups.errors import FollowUpsError, named
from followups.operations.doctor import Finding
from followups.operations.doctor.broker_checks import broker_client
from followups.settings import LEASE_MARGIN
from followups.transports.registry import load_transport
from followups.wording import span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings


VERIFIED = {"verify-full": "certificate and host name verified", "verify-ca": "certificate verified, host name not"}
"""What each `sslmode` verifies. Any other `sslmode` verifies nothing."""

_OF_THE_SERVER = text("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


def of_database(engine: Engine) -> Iterator[Finding]:
    """Report whether the database connection is encrypted and the server was verified.

    Yields nothing if the database does not answer.
    """
    try:
        with engine.connect() as connection:
            yield Finding("database connection", _database(connection))
    except SQLAlchemyError:
        return  # the finding `database` already reports that the database does not answer


def _database(connection: Connection) -> str:
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        return "of an unknown driver"
    if driver.info.host.startswith("/"):
        return "through a Unix socket"
    if not driver.pgconn.ssl_in_use:
        return "without TLS (sslmode=verify-full in FOLLOWUPS_DATABASE_URL requires and verifies it)"
    mode = next((each.val or b"" for each in driver.pgconn.info if each.keyword == b"sslmode"), b"").decode()
    # Behind a pooler, the server sees only the pooler's connection.
    version = connection.scalar(_OF_THE_SERVER) or "TLS"
    return f"{version}, {VERIFIED.get(mode, f'not verified (sslmode is {mode}; verify-full verifies)')}"


def of_broker(settings: Settings) -> Iterator[Finding]:
    """Report whether the broker connection is encrypted and whether the server is verified."""
    try:
        with broker_client(settings) as client:
            connection: Any = client.connection_pool.get_connection()
            yield Finding("broker connection", _broker(connection))
            client.connection_pool.release(connection)
    except (redis.RedisError, OSError):
        return  # another check reports this problem


def _broker(connection: Any) -> str:  # noqa: ANN401 - redis-py has several classes
    if not isinstance(connection, redis.SSLConnection):
        return "without TLS (rediss:// in FOLLOWUPS_BROKER_URL requires and verifies it)"
    secured: Any = connection._sock  # noqa: SLF001 - redis-py shows it nowhere else
    version = secured.version()
    if connection.cert_reqs == ssl.CERT_NONE:
        return f"{version}, not verified (ssl_cert_reqs is none)"
    return f"{version}, {VERIFIED['verify-full' if connection.check_hostname else 'verify-ca']}"


def timeouts(settings: Settings) -> Finding:
    """Report how long a call can take: the sum of its timeouts.

    No lease is shorter than this sum, so a lease cannot expire during a call.
    """
    detail = (
        f"transport timeout {span(settings.transport_timeout)} + margin {span(LEASE_MARGIN)}"
        f" <= lease {span(settings.lease)}"
    )
    return Finding("timeouts", detail)  # the settings reject a lease that is shorter than the timeouts


def transport(settings: Settings) -> Finding:
    """Use the transport to check whether its endpoint is reachable."""
    try:
        detail = asyncio.run(_checked(settings))
    except FollowUpsError as error:
        return Finding("transport", f"{settings.transport}: {error}", "Correct the FOLLOWUPS_TRANSPORT settings.")
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
        return Finding("transport", f"{settings.transport}: {named(error)}", "Report it to the transport's author.")
    return Finding("transport", f"{settings.transport}: {detail}")


async def _checked(settings: Settings) -> str:
    made = load_transport(settings)
    await made.open()
    try:
        return await made.check()
    finally:
        await made.close()
