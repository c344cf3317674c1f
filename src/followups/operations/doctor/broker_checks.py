"""Checks of the broker: version, memory, permissions, queues, and the stored state of the breaker."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis

from followups.delivery.hints import CLUSTER, DELIVER, DISPATCH
from followups.errors import named
from followups.flow_control.breaker import CLOSED, read
from followups.operations.doctor import Finding
from followups.settings import hide_password
from followups.wording import span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.settings import Settings

OLDEST_REDIS = (6, 2)

PATIENCE = timedelta(seconds=3)
"""How long to wait for the broker to answer."""

UNVERIFIED = (
    "Make sure that this is your broker. Then set ssl_ca_certs in FOLLOWUPS_BROKER_URL to the file of the authority"
    " that signed the broker's certificate, and use the certificate's host name in the URL."
)
REFUSED = (
    "Repair the server: its disk or memory may be full, or a script may be running endlessly. Afterwards, processes"
    " continue by themselves."
)
"""Advice for errors that the broker returns to all clients."""

UNREAD_TICKS = 100
"""Number of queued ticks; if there are more, probably no worker reads the queue."""


def broker_client(settings: Settings, patience: timedelta = PATIENCE) -> redis.Redis:
    """Return a client of the broker that does not retry. The caller must close the client."""
    url, seconds = settings.broker_url.get_secret_value(), patience.total_seconds()
    return redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=None)


def broker(settings: Settings) -> Iterator[Finding]:
    """Check that the broker is reachable and new enough, permits all commands, and evicts no keys."""
    url = settings.broker_url.get_secret_value()
    try:
        with broker_client(settings) as client:
            refused = _refusals(client, settings.broker_prefix)
            information: dict[str, Any] = {} if "INFO" in refused else client.info()
    except (redis.RedisError, ValueError, OSError) as error:
        # The first line of the error message contains the host and the port, but never the password.
        detail = f"{hide_password(url)}: {named(error)}"
        unverified = "CERTIFICATE_VERIFY_FAILED" in str(error)
        yield Finding("broker", detail, UNVERIFIED if unverified else "Start it, or correct FOLLOWUPS_BROKER_URL.")
        return
    if information:
        yield _broker_version(information)
        yield _eviction(information)
    yield _permissions(settings, refused)


def _refusals(client: redis.Redis, prefix: str) -> dict[str, str]:
    """Return the commands that the processes need but the broker refuses, each with its error.

    The check executes none of the commands. Redis checks permissions when a command is queued in a transaction. The
    check discards the transaction instead of executing it.
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
    """Return all broker commands that the processes and their scripts use, with ``key`` as their key."""
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
    return Finding(
        "broker memory", detail, "Set maxmemory-policy to noeviction, because evicted queues make follow-ups late."
    )


def of_broker(settings: Settings) -> Iterator[Finding]:
    """Check whether the queues contain unread messages, and whether the breaker is open."""
    try:
        with broker_client(settings) as client:
            yield _queues(settings, client)
            yield _breaker(settings, client)
    except (redis.RedisError, OSError) as error:
        yield Finding("queues", type(error).__name__, "Repair the broker first.")


def _breaker(settings: Settings, client: redis.Redis) -> Finding:
    shown = read(client, settings)
    if shown.state == CLOSED:
        return Finding("breaker", "closed: no workspace is deferred")
    whom = f"{len(shown.tripped)} workspace{'' if len(shown.tripped) == 1 else 's'}"
    detail = f"{shown.state} for {span(timedelta(seconds=shown.seconds))}: the transport has failed for {whom}"
    if shown.state == "recovering":
        return Finding("breaker", f"{detail}; the rate of sends is growing again")
    advice = (
        "Repair the chat server, or replace the secret if the answers are 401 or 403. The chat server is probed every"
        " few seconds; due follow-ups wait, and are sent once a probe succeeds."
    )
    return Finding("breaker", detail, advice)


def _queues(settings: Settings, client: redis.Redis) -> Finding:
    batches, unread = (int(client.llen(f"{settings.broker_prefix}{name}")) for name in (DELIVER, DISPATCH))
    detail = f"{batches} batches in {DELIVER}, {unread} ticks in {DISPATCH}"
    # The in-flight limit bounds the number of leases, and thus also the number of valid hints. If the queue has more
    # than twice as many hints, some of them must be stale.
    if unread > UNREAD_TICKS or batches > 2 * max(settings.max_in_flight // settings.batch_size, 1):
        return Finding("queues", detail, "No worker reads them: start workers, or restart those that hang.")
    return Finding("queues", detail)
