"""kombu's Redis transport for workers, which lives on when the broker holds what nobody of ours wrote.

kombu 5.7 raises out of the consumer for an entry that is no JSON, or JSON of another shape, and the worker
ends with it. Whoever can reach the broker could stop every worker with one LPUSH.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

log = get_logger(__name__)


class Channel(kombu_redis.Channel):
    """Drops an entry that cannot be read."""

    def _brpop_read(self, **options: Any) -> Any:  # noqa: ANN401 - kombu's own
        self.connection.delivering = False
        try:
            return super()._brpop_read(**options)
        except (*self.connection_errors, RedisError, self.connection.Empty):
            raise
        except Exception as error:  # whatever a hostile document makes a decoder raise
            if self.connection.delivering:
                raise  # it was read, and the error is the consumer's
            log.warning("broker_message_dropped", error=type(error).__name__)
            return True


class Transport(kombu_redis.Transport):
    """Drops an entry of another shape than kombu gives a message."""

    Channel = Channel
    Empty = queue.Empty
    delivering = False
    """An entry was read and is in the consumer's hands."""

    def _deliver(self, message: Any, source: str) -> None:  # noqa: ANN401 - whatever JSON holds
        if not is_message(message):
            log.warning("broker_message_dropped", queue=source, error="not a message")
            return
        self.delivering = True
        super()._deliver(message, source)


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
