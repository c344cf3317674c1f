"""kombu's Redis transport for workers, which lives on when the broker holds what nobody of ours wrote.

kombu 5.7 raises out of the consumer for an entry that is no JSON, or JSON of another shape, and the worker
ends with it. Whoever can reach the broker could stop every worker with one LPUSH.

It also ends in order while the broker is silent. Celery 5.7 sends its heartbeats to Flower from the consumer's
own loop, and tries that without end, without a word and deaf to SIGTERM.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from celery.worker import state
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

log = get_logger(__name__)


class Consumer:
    """What this process's consumer last did: the proof that it consumes, and not only seems to run.

    It asks the broker for work (BRPOP) all the time and gets an answer within a second, be it "nothing". A worker
    that is asked for a sign of life by Celery's ``ping`` answers on another connection, also when this has stopped.
    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        """Begin with nothing done yet."""
        self.answered_at = 0.0
        self.connecting_at = 0.0
        self.queues: frozenset[str] = frozenset()
        """Those that it asked for."""

    def answered(self, queues: Iterable[str]) -> None:
        """Note that the broker has answered."""
        self.answered_at = time.monotonic()
        self.queues = frozenset(queues)

    def connects(self) -> None:
        """Note that it tries to reach the broker."""
        self.connecting_at = time.monotonic()


CONSUMER = Consumer()


class Channel(kombu_redis.Channel):
    """Drops an entry that cannot be read."""

    def _brpop_read(self, **options: Any) -> Any:  # noqa: ANN401 - kombu's own
        self.connection.delivering = False
        try:
            read = super()._brpop_read(**options)
        except self.connection.Empty:
            CONSUMER.answered(self.active_queues)
            raise
        except (*self.connection_errors, RedisError):
            raise
        except Exception as error:  # whatever a hostile document makes a decoder raise
            if self.connection.delivering:
                raise  # it was read, and the error is the consumer's
            log.warning("broker_message_dropped", error=type(error).__name__)
            read = True
        CONSUMER.answered(self.active_queues)
        return read


class Transport(kombu_redis.Transport):
    """Drops an entry of another shape than kombu gives a message."""

    Channel = Channel
    Empty = queue.Empty
    delivering = False
    """An entry was read and is in the consumer's hands."""
    _stopping = False
    """An order to stop was obeyed: what connects after it belongs to the drain."""

    def establish_connection(self) -> Any:  # noqa: ANN401 - kombu's own
        """Connect. Raises `celery.exceptions.WorkerShutdown` in the consumer's thread when SIGTERM has come."""
        if state.should_stop is not None and not Transport._stopping and _is_consumers_thread():
            Transport._stopping = True
            state.maybe_shutdown()
        if _is_consumers_thread():
            CONSUMER.connects()
        try:
            return super().establish_connection()
        except self.connection_errors as error:
            log.warning("broker_unreachable", step="connect", error=type(error).__name__)
            raise

    def _deliver(self, message: Any, source: str) -> None:  # noqa: ANN401 - whatever JSON holds
        if not is_message(message):
            log.warning("broker_message_dropped", queue=source, error="not a message")
            return
        self.delivering = True
        super()._deliver(message, source)


def _is_consumers_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def is_message(message: object) -> bool:
    """Say whether a decoded entry has the shape of kombu's virtual messages.

    >>> is_message({"body": "e30="}), is_message([])
    (False, False)
    """
    if not isinstance(message, dict) or not isinstance(message.get("body"), str):
        return False
    properties = message.get("properties")
    return isinstance(message.get("headers"), dict) and isinstance(properties, dict) and _is_addressed(properties)


def _is_addressed(properties: Mapping[str, Any]) -> bool:
    delivery = properties.get("delivery_info")
    return (
        isinstance(properties.get("delivery_tag"), str)
        and isinstance(delivery, dict)
        and isinstance(delivery.get("exchange"), str)
        and isinstance(delivery.get("routing_key"), str)
    )
