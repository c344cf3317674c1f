"""The transport ``matrix``: ``m.room.message`` through the client-server API of a homeserver.

``PUT .../rooms/{roomId}/send/m.room.message/{txnId}`` (Matrix specification v1.11, client-server API, "Sending events
to a room"). The follow-up's id is used as the transaction id. The homeserver recognises duplicates by this id. The
chat's external id serves as the room id.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import NAMESPACE_URL, UUID, uuid5

from followups.errors import TransportConfigurationError
from followups.json_encoding import encode_json
from followups.retry_policy import MAX_RETRY_AFTER
from followups.settings import NO_TOKEN, is_access_token
from followups.transports.answers import Dialect, Document
from followups.transports.endpoint import required_url
from followups.transports.http_client import HttpClient
from followups.transports.port import Delivery, Outcome, Rejected

if TYPE_CHECKING:
    from followups.settings import Settings

EVENT_NAMESPACE = uuid5(NAMESPACE_URL, "https://matrix.to/")
"""UUID namespace of the chat message ids. Event ids (``$...``) are not UUIDs. A chat message's id is therefore
``uuid5(EVENT_NAMESPACE, event_id)``.
"""

NO_ROOM = "the chat's external id is not a Matrix room id, which starts with ! and has no slash, blank, ?, # or %"
_ROOM_ID = re.compile(r"![^\s/\\%?#]+")
"""A room id. A proxy could take a room id with other characters for the path of another room."""


class MatrixTransport:
    """Sends each message to the Matrix room whose id is the chat's external id.

    Implements the `Transport` protocol of `followups.transports.port`.
    """

    name = "matrix"

    def __init__(self, settings: Settings) -> None:
        """Check the URL and the access token. Raises `TransportConfigurationError` if a value is missing or invalid."""
        url = required_url(settings, "the homeserver's base URL, https://host")
        if "@" in url or "?" in url or "#" in url:
            message = (
                "FOLLOWUPS_TRANSPORT_URL should be only the homeserver's base URL, without a user, query or fragment."
            )
            raise TransportConfigurationError(message)
        self._base = url.rstrip("/")
        self._client = HttpClient(settings, "PUT", {"authorization": f"Bearer {_token(settings)}"})

    async def open(self) -> None:
        """Prepare for connections in the running event loop."""
        await self._client.open()

    async def send(self, delivery: Delivery) -> Outcome:
        """Send the Matrix event once.

        If the chat has no room id, or shares its room with a chat of another workspace, the message is rejected without
        a call.
        """
        room = delivery.external_chat_id or ""
        if not (_ROOM_ID.fullmatch(room) and room.isprintable()):
            return Rejected(NO_ROOM)
        if delivery.external_chat_id_is_shared:
            return Rejected("another workspace has a chat with the same Matrix room")
        path = f"rooms/{quote(room, safe='')}/send/m.room.message/{delivery.follow_up_id}"
        content = {"msgtype": "m.text", "body": delivery.message}
        body = encode_json(content)
        return await self._client.deliver(f"{self._base}/_matrix/client/v3/{path}", [], body, DIALECT)

    async def check(self) -> str:
        """Connect to the homeserver without sending an event."""
        return await self._client.check()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _token(settings: Settings) -> str:
    token = settings.transport_secret.get_secret_value().strip() if settings.transport_secret else ""
    if not is_access_token(token):
        message = f"{NO_TOKEN}."
        raise TransportConfigurationError(message)
    return token


def _event(document: Document) -> UUID | None:
    event_id = document.get("event_id")
    if not isinstance(event_id, str) or not event_id:
        message = "the answer contains no event_id"
        raise ValueError(message)
    try:
        return uuid5(EVENT_NAMESPACE, event_id)
    except UnicodeEncodeError:  # its message would quote the answer
        message = "the event_id in the answer is not valid text"
        raise ValueError(message) from None


def _requested_delay(document: Document) -> timedelta | None:
    # Matrix 1.10 replaced the field `retry_after_ms` with the Retry-After header, but most homeservers still send the
    # field.
    wished = document.get("retry_after_ms")
    if isinstance(wished, bool) or not isinstance(wished, int | float) or not wished >= 0:
        return None
    return timedelta(milliseconds=min(wished, MAX_RETRY_AFTER / timedelta(milliseconds=1)))


DIALECT = Dialect(message_id=_event, requested_delay=_requested_delay)
