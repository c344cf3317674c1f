"""The checks of ``followups doctor``. Each takes the settings, returns its findings, and never raises."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups import schema
from followups.api.readiness import STALE_AT_LEAST, STALE_TICKS
from followups.cli.connection import broker_client, place_of
from followups.cli.failures import named, reason_of
from followups.cli.times import span
from followups.database import IS_READ_ONLY, takes_changes, unfit
from followups.errors import FollowUpsError
from followups.settings import LEASE_MARGIN, hide_password
from followups.store import last_tick
from followups.transports.registry import load_transport
from followups.worker.queues import CLUSTER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

OLDEST_POSTGRESQL = 14
OLDEST_REDIS = (6, 2)

PATIENCE = timedelta(seconds=3)
"""How long to wait for the broker, and for all workers together."""


REFUSED = "See to the server: a full disk, full memory, or a script without end; processes go on by themselves then."
"""What to do about errors that the broker returns to every client."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. ``advice`` says what to do; without advice all is well."""

    name: str
    detail: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return not self.advice

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "advice": self.advice}


def timeouts(settings: Settings) -> Finding:
    """Show the sum of the timeouts, which keeps a worker that is waiting for an answer from losing its lease."""
    detail = (
        f"transport timeout {span(settings.transport_timeout)} + margin {span(LEASE_MARGIN)}"
        f" <= lease {span(settings.lease)}"
    )
    return Finding("timeouts", detail)  # the settings refuse any other combination


def databases(settings: Settings, engine: Engine) -> Iterator[Finding]:
    """Check the database, its schema, and the age of its last recorded tick."""
    place = place_of(settings.database_url.get_secret_value())
    try:
        with engine.connect() as connection:
            yield _version(connection, place) if takes_changes(connection) else _unusable(place, IS_READ_ONLY)
        current, newest = schema.schema_versions(engine)
        yield _migrations(current, newest)
        if current is not None:
            with engine.connect() as connection:
                yield _tick(settings, last_tick.last_tick_age(connection))
    except SQLAlchemyError as error:
        reason = reason_of(getattr(error, "orig", None) or error)
        yield _unusable(place, unfit(error) or f"{reason}: start it, or correct FOLLOWUPS_DATABASE_URL")


def _unusable(place: str, said: str) -> Finding:
    detail, _, advice = said.rpartition(": ")
    return Finding("database", f"{place}: {detail}", f"{advice[:1].upper()}{advice[1:]}.")


def _version(connection: Connection, place: str) -> Finding:
    number = connection.execute(text("SELECT current_setting('server_version_num')::int / 10000")).scalar_one()
    detail = f"PostgreSQL {number}, {place}"
    advice = "" if number >= OLDEST_POSTGRESQL else f"Use PostgreSQL {OLDEST_POSTGRESQL} or newer."
    return Finding("database", detail, advice)


def _migrations(current: str | None, newest: str | None) -> Finding:
    if current == newest:
        return Finding("migrations", f"{current}, the newest")
    if schema.is_ready(current):
        return Finding("migrations", f"{current}, brought by a newer version than this one, which knows {newest}")
    return Finding("migrations", f"{current or 'none'}; the newest is {newest}", "Run followups migrate.")


def _tick(settings: Settings, age: timedelta | None) -> Finding:
    limit = max(settings.tick_interval * STALE_TICKS, STALE_AT_LEAST)
    detail = f"the last tick ran {span(age)} ago" if age is not None else "no tick has ever run"
    if age is not None and age <= limit:
        return Finding("ticks", f"{detail} (every {span(settings.tick_interval)})")
    advice = "Start beat and a worker: honcho start beat worker, or what else runs the Procfile."
    return Finding("ticks", f"{detail}; one is due every {span(settings.tick_interval)}", advice)


def broker(settings: Settings) -> Iterator[Finding]:
    """Check that the broker is reachable and new enough, allows all commands, and evicts nothing."""
    url = settings.broker_url.get_secret_value()
    try:
        with broker_client(settings, PATIENCE) as client:
            refused = _refusals(client, settings.broker_prefix)
            information: dict[str, Any] = {} if "INFO" in refused else client.info()
    except (redis.RedisError, ValueError, OSError) as error:
        # The first line of its message names host and port, never the password.
        detail = f"{hide_password(url)}: {named(error)}"
        yield Finding("broker", detail, "Start it, or correct FOLLOWUPS_BROKER_URL.")
        return
    if information:
        yield _broker_version(information)
        yield _eviction(information)
    yield _permissions(settings, refused)


def _refusals(client: redis.Redis, prefix: str) -> dict[str, str]:
    """Return which of our commands the broker would refuse, each with its error.

    Nothing is executed: each command is checked when it is queued in a transaction, which is then discarded.
    """
    refused: dict[str, str] = {}
    connection: Any = client.connection_pool.get_connection()
    try:
        for command in (("MULTI",), *broker_commands(f"{prefix}doctor"), ("DISCARD",)):
            connection.send_command(*command)
            try:
                connection.read_response()
            except redis.ResponseError as error:
                refused[command[0]] = _code(error)
    finally:
        connection.disconnect()
        client.connection_pool.release(connection)
    return refused


def broker_commands(key: str) -> tuple[tuple[str, ...], ...]:
    """Return every command that our processes send or their scripts call, applied to ``key``."""
    channel = f"{key}*"
    sha = "0" * 40
    return (
        *((name, key) for name in ("DEL", "GET", "HGETALL", "LLEN", "PTTL", "SCARD", "SMEMBERS", "ZCARD")),
        *(
            (name, key, "x")
            for name in ("HDEL", "HGET", "HMGET", "LPUSH", "SADD", "SET", "SREM", "ZRANK", "ZREM", "ZSCORE")
        ),
        *((name, key, "1") for name in ("BRPOP", "EXPIRE", "PEXPIRE")),
        *((name, key, "0", "1") for name in ("HINCRBY", "HSET", "ZADD", "ZCOUNT", "ZRANGEBYSCORE")),
        ("SUNIONSTORE", key, key),
        ("EVALSHA", sha, "1", key),
        ("SCRIPT", "LOAD", "return 1"),
        ("PUBLISH", channel, "x"),
        ("PSUBSCRIBE", channel),
        ("TIME",),
        ("INFO",),
    )


def _code(error: redis.ResponseError) -> str:
    return type(error).__name__ if type(error) is not redis.ResponseError else str(error).partition(" ")[0]


def _permissions(settings: Settings, refused: dict[str, str]) -> Finding:
    denied = sorted(name for name, error in refused.items() if error == "NoPermissionError")
    others = sorted(set(refused.values()) - {"NoPermissionError"})
    if denied:
        user = urlsplit(settings.broker_url.get_secret_value()).username or "default"
        rules = f"~{settings.broker_prefix}* allchannels +@all -@admin -@dangerous +info"
        return Finding("broker permissions", f"not allowed: {', '.join(denied)}", f"ACL SETUSER {user} {rules}")
    if others:
        return Finding("broker permissions", f"refused: {', '.join(others)}", REFUSED)
    return Finding("broker permissions", f"all commands are allowed on {settings.broker_prefix}*")


def _broker_version(information: dict[str, Any]) -> Finding:
    if information.get("cluster_enabled"):
        return Finding("broker", "in cluster mode", CLUSTER)
    if information.get("role") == "slave":
        return Finding("broker", "a replica, which is read-only", "Point FOLLOWUPS_BROKER_URL at the primary.")
    if valkey := information.get("valkey_version"):
        return Finding("broker", f"Valkey {valkey}")
    version = str(information.get("redis_version", "0"))
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    advice = "" if found >= OLDEST_REDIS else "Use Redis 6.2 or newer, or Valkey."
    return Finding("broker", f"Redis {version}", advice)


def _eviction(information: dict[str, Any]) -> Finding:
    limit, policy = information.get("maxmemory", 0), information.get("maxmemory_policy", "noeviction")
    detail = f"maxmemory-policy {policy}, maxmemory {limit or 'without limit'}"
    if not limit or policy == "noeviction":
        return Finding("broker memory", detail)
    return Finding("broker memory", detail, "Set maxmemory-policy to noeviction: an evicted queue costs time.")


def transport(settings: Settings) -> Finding:
    """Ask the transport whether its endpoint can be reached."""
    try:
        detail = asyncio.run(_checked(settings))
    except FollowUpsError as error:
        return Finding("transport", f"{settings.transport}: {error}", "Correct the FOLLOWUPS_TRANSPORT settings.")
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
        return Finding("transport", f"{settings.transport}: {named(error)}", "Ask who wrote the transport.")
    return Finding("transport", f"{settings.transport}: {detail}")


async def _checked(settings: Settings) -> str:
    made = load_transport(settings)
    await made.open()
    try:
        return await made.check()
    finally:
        await made.close()
