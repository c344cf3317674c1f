"""Celery's broker connection: kombu's Redis transport, but tolerant of bad entries and Redis errors.

The consumer of kombu 5.7 raises an exception if a queue entry is malformed or not JSON. The consumer also raises an
exception if Redis rejects a read (READONLY, MISCONF, NOPERM). Any exception that escaped from the consumer would end
the worker. With kombu's consumer, one malformed entry or a failover of Redis would stop every worker.

A worker shuts down cleanly even while the broker does not answer. Celery 5.7 sends its heartbeats to Flower from the
consumer's own loop. While the broker is silent, Celery retries a heartbeat endlessly, logs nothing and ignores SIGTERM.

A worker accepts only read-only remote control commands from the broker.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app import amqp
from celery.loaders.app import AppLoader
from celery.worker import state
from celery.worker.control import Panel
from kombu.connection import Connection as KombuConnection
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis.exceptions import NoPermissionError, RedisError

from followups.delivery.hints import CLUSTER
from followups.telemetry.logs import get_logger
from followups.urls import tls_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


log = get_logger(__name__)

# The transport keeps the name of kombu's transport, so that logs still show redis://.
TRANSPORT_ALIASES.update(
    redis="followups.worker.broker:BrokerTransport", rediss="followups.worker.broker:BrokerTransport"
)

LONGEST_PAUSE = 3.0
"""The longest pause, in seconds, between two attempts to reach the broker.

Celery itself would wait up to thirty seconds between two tries.
"""

FIRST_PAUSE = 0.25
"""Seconds to wait before reconnecting if the last connection was short-lived. Each further pause is twice as long as
the previous pause.
"""

LASTS = 5.0
"""If reads are still answered after this many seconds, the connection counts as good.

A Redis ACL may allow reads of the queues but forbid subscriptions. One read may therefore be answered while another is
rejected.
"""


LONGEST_BODY = 4 * 1024 * 1024
"""Maximum number of characters in a broker message's body; the largest hint has 1.5 million."""


class Loader(AppLoader):
    """A Celery loader that ignores the environment variable for a configuration module."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:  # noqa: ARG002 - Celery's own
        """Return an empty configuration."""
        return {}


class BrokerConnection(KombuConnection):
    """A broker connection that retries every few seconds, even after a long outage."""

    def ensure_connection(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - kombu's own
        """Connect to the broker, and retry until that succeeds."""
        pauses = {"interval_start": 1, "interval_step": 1, "interval_max": LONGEST_PAUSE}
        return super().ensure_connection(*arguments, **(pauses | named))


class AMQP(amqp.AMQP):
    """Celery's AMQP layer with our `BrokerConnection`."""

    Connection = BrokerConnection


class App(Celery):
    """A Celery app that uses the settings' broker and ignores CELERY_BROKER_URL and similar variables."""

    amqp_cls = AMQP
    backend_cls = "disabled"

    def __init__(self, name: str, url: str) -> None:
        """Store the broker's URL without connecting."""
        self._url = url
        super().__init__(name, broker=url, loader=Loader)
        # This setting is for Flower. A connection reads its TLS options from the URL.
        self.conf.broker_use_ssl = tls_of(url)

    def connection_for_read(self, url: str | None = None, **named: Any) -> Any:  # noqa: ANN401, ARG002 - Celery's own
        """Return a connection for a consumer."""
        return super().connection_for_read(self._url, **named)

    def connection_for_write(self, url: str | None = None, **named: Any) -> Any:  # noqa: ANN401, ARG002 - Celery's own
        """Return a connection for a producer."""
        return super().connection_for_write(self._url, **named)


class Consumer:
    """The latest activity of the process's consumer, as proof that messages are being consumed.

    The consumer polls the broker continuously (BRPOP). Even with empty queues, the broker answers within a second.
    Celery's ``ping`` is not enough, because a worker that has stopped consuming can still answer it. Times are
    monotonic seconds.
    """

    def __init__(self) -> None:
        """Create the object; no activity of the consumer is recorded yet."""
        self.thread: threading.Thread | None = None
        """The thread in which the consumer runs, or None in a process that consumes nothing."""
        self.answered_at = 0.0
        self.connecting_at = 0.0
        self.connected_at = 0.0
        self.refused = 0
        """Number of consecutive broker connections that were lost soon after they were opened."""
        self.queues: frozenset[str] = frozenset()
        """The queues that the consumer has polled."""

    def answered(self, queues: Iterable[str]) -> None:
        """Record that the broker has answered."""
        self.answered_at = time.monotonic()
        if self.answered_at - self.connected_at > LASTS:
            self.refused = 0
        self.queues = frozenset(queues)

    def connects(self) -> None:
        """Record an attempt to reach the broker."""
        self.connecting_at = time.monotonic()

    def connected(self) -> None:
        """Count a new connection as refused until a read is answered more than `LASTS` seconds later."""
        self.connected_at = time.monotonic()
        self.refused += 1

    def pause(self) -> float:
        """Return the seconds to wait before the next connection."""
        return min(FIRST_PAUSE * 2 ** min(self.refused - 1, 10), LONGEST_PAUSE) if self.refused else 0.0


CONSUMER = Consumer()


class BrokerChannel(kombu_redis.Channel):
    """A kombu channel that drops unreadable entries, and closes its connections if Redis rejects a message."""

    _reused_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - kombu's own
        # By default, kombu creates a client for each command, and creating it takes as long as the command. A client
        # that borrows connections from a pool has no state, so one client is used until the pool is replaced.
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._reused_client is None or self._reused_client.connection_pool is not self.pool:
            self._reused_client = super()._create_client()
        return self._reused_client

    def _put(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - kombu's own
        try:
            super()._put(*arguments, **named)
        except RedisError:
            # After a failover, the old server is read-only. The broker's address may already lead to another server.
            self._disconnect_pools()
            raise

    def _brpop_read(self, **options: Any) -> Any:  # noqa: ANN401 - kombu's own
        self.connection.delivering = False
        try:
            read = super()._brpop_read(**options)
        except self.connection.Empty:
            CONSUMER.answered(self.active_queues)
            raise
        except (*self.connection_errors, RedisError) as error:
            _report("read", error)
            raise
        except Exception as error:  # a malicious document can cause any error in a decoder
            if self.connection.delivering:
                raise  # the entry could be decoded, so this error comes from the consumer
            log.warning("broker_message_dropped", error=type(error).__name__)
            read = True
        CONSUMER.answered(self.active_queues)
        return read


class BrokerTransport(kombu_redis.Transport):
    """A Celery transport that drops queue entries that are not valid messages.

    Every error response from Redis is treated as a connection error.
    """

    Channel = BrokerChannel
    connection_errors = (*kombu_redis.Transport.connection_errors, RedisError)
    """Errors after which Celery opens a new connection.

    Error replies from Redis count too: they may be temporary, or caused by a failover.
    """
    Empty = queue.Empty
    delivering = False
    """Whether the last entry read from the broker was passed to the consumer."""
    _stopping = False
    """Whether shutdown has begun. While draining, the worker may still open connections."""

    def establish_connection(self) -> Any:  # noqa: ANN401 - kombu's own
        """Connect to the broker.

        Raises `celery.exceptions.WorkerShutdown` in the consumer's thread after SIGTERM.
        """
        if state.should_stop is not None and not BrokerTransport._stopping and _is_consumers_thread():
            BrokerTransport._stopping = True
            state.maybe_shutdown()
        if not _is_consumers_thread():
            return super().establish_connection()
        CONSUMER.connects()
        time.sleep(CONSUMER.pause())
        try:
            connection = super().establish_connection()
        except self.connection_errors as error:
            _report("connect", error)
            raise
        CONSUMER.connected()
        _refuse_cluster(self._avail_channels[-1].client)
        return connection

    def _deliver(self, message: Any, source: str) -> None:  # noqa: ANN401 - whatever JSON holds
        if not is_message(message):
            log.warning("broker_message_dropped", queue=source, error="not a message")
            return
        self.delivering = True
        super()._deliver(message, source)


def _report(step: str, error: Exception) -> None:
    if _is_consumers_thread():  # other threads report their own failures
        log.warning("broker_unreachable", step=step, error=type(error).__name__, code=code_of(error))


def code_of(error: Exception) -> str:
    """Return the code of a Redis error reply, or '' for any other error.

    >>> code_of(RedisError("MISCONF Redis is configured to save RDB snapshots")), code_of(OSError("No route"))
    ('MISCONF', '')
    """
    first = str(error).partition(" ")[0]
    return first if isinstance(error, RedisError) and first.isalpha() and first.isupper() else ""


def _refuse_cluster(client: Any) -> None:  # noqa: ANN401 - of a class that kombu makes
    """End the process with an error if the broker is a cluster; clusters are not supported."""
    try:
        clustered = client.info("cluster").get("cluster_enabled")
    except NoPermissionError:
        return
    if clustered:
        sys.stderr.write(f"followups: {CLUSTER}\n")
        raise SystemExit(2)


def _is_consumers_thread() -> bool:
    return CONSUMER.thread is threading.current_thread()


def is_message(message: object) -> bool:
    """Return whether a decoded entry looks like a message from our processes.

    Compressed messages are rejected, because a few kilobytes could expand to fill the memory. Messages other than UTF-8
    JSON are rejected too, because kombu would decode them with any Python codec.

    >>> is_message({"body": "e30="}), is_message([])
    (False, False)
    """
    if not isinstance(message, dict) or not isinstance(body := message.get("body"), str) or len(body) > LONGEST_BODY:
        return False
    if message.get("content-type") != "application/json" or message.get("content-encoding") != "utf-8":
        return False
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict) or headers.get("compression"):
        return False
    return isinstance(properties, dict) and properties.get("body_encoding") == "base64" and _is_addressed(properties)


def _is_addressed(properties: Mapping[str, Any]) -> bool:
    delivery = properties.get("delivery_info")
    return (
        isinstance(properties.get("delivery_tag"), str)
        and isinstance(delivery, dict)
        and isinstance(delivery.get("exchange"), str)
        and isinstance(delivery.get("routing_key"), str)
    )


READ_ONLY_COMMANDS = frozenset(
    {
        *("ping", "stats", "active", "reserved", "scheduled", "registered", "active_queues", "query_task", "clock"),
        *("revoked", "conf", "report", "signs_of_life"),
        *("dump_active", "dump_reserved", "dump_schedule", "dump_revoked", "dump_tasks"),
        *("enable_events", "heartbeat"),  # Flower needs these commands to show a worker
    }
)
"""Read-only commands, whose results `celery inspect` and Flower's pages show.

Any other command stops a worker, changes it, or writes files on its host.
"""

COMMAND_REFUSED = "this worker accepts no such commands; FOLLOWUPS_REMOTE_CONTROL=true allows them"


def restrict_remote_control() -> None:
    """Reject every remote control command except those that only read.

    Any client that can write to the broker can send remote control commands.
    """
    for name in Panel.data.keys() - READ_ONLY_COMMANDS:
        Panel.data[name] = _refuse_command


def _refuse_command(*_: object, **__: object) -> dict[str, str]:
    return {"error": COMMAND_REFUSED}
