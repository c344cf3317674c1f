"""The transport ``http``: a POST of one JSON object, signed according to Standard Webhooks.

The contract with the endpoint is in deploy/ENDPOINT.md.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic_core import to_json

from followups.json_encoding import encode_json
from followups.telemetry.traces import current_traceparent
from followups.transports.answers import Dialect, Document
from followups.transports.endpoint import required_url
from followups.transports.http_client import HttpClient
from followups.transports.signing import Signer

if TYPE_CHECKING:
    from followups.settings import Settings
    from followups.transports.port import Delivery, Outcome


class HttpTransport:
    """Implements the port's `Transport`: posts each message to ``FOLLOWUPS_TRANSPORT_URL``."""

    name = "http"

    def __init__(self, settings: Settings) -> None:
        """Check the URL and the secret. Raises `TransportConfigurationError` if a value is missing or invalid."""
        self._url = required_url(settings, "the endpoint that receives the messages, https://host/path")
        secret = settings.transport_secret
        self._signer = Signer(secret.get_secret_value()) if secret else None
        self._client = HttpClient(settings)

    async def open(self) -> None:
        """Prepare for connections in the running event loop."""
        await self._client.open()

    async def send(self, delivery: Delivery) -> Outcome:
        """Post the message once; if it was sent but not answered, the outcome is unknown."""
        key = to_json(delivery.follow_up_id)[1:-1]  # without JSON's quotation marks; str() takes three times as long
        body = _body(delivery)
        return await self._client.deliver(self._url, self._headers(key, delivery.made_at, body), body, DIALECT)

    async def check(self) -> str:
        """Connect to the endpoint's host without sending a message."""
        return await self._client.check()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _headers(self, key: bytes, made_at: datetime | None, body: bytes) -> list[bytes]:
        headers = [b"idempotency-key: " + key, b"webhook-id: " + key]
        if traceparent := current_traceparent():
            headers.append(f"traceparent: {traceparent}".encode())
        if self._signer:
            now = made_at or datetime.now(UTC)
            headers.append(f"webhook-timestamp: {int(now.timestamp())}".encode())
            headers.append(f"webhook-signature: {self._signer.sign(key.decode(), now, body.decode())}".encode())
        return headers


def _body(delivery: Delivery) -> bytes:
    document = {
        "followUpId": delivery.follow_up_id,
        "workspaceId": delivery.workspace_id,
        "channel": delivery.channel,
        "chatId": delivery.chat_id,
        "externalChatId": delivery.external_chat_id,
        "triggerChatMessageId": delivery.trigger_chat_message_id,
        "message": delivery.message,
        "dueDate": _utc_text(delivery.due_date),
        "attempt": delivery.attempt,
    }
    return encode_json(document)


def _utc_text(moment: datetime) -> str:
    """Return the time as text in UTC, with six decimal places."""
    moment = moment.astimezone(UTC)
    if moment.microsecond:  # pydantic is twice as fast as `isoformat`, but omits the decimals if all are 0
        return to_json(moment)[1:-1].decode()
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _chat_message_id(document: Document) -> UUID | None:
    value = document.get("chatMessageId")
    if value is None:
        return None
    try:
        return UUID(value)  # type: ignore[arg-type]  # any JSON value; values that are not strings fail below
    except (ValueError, AttributeError, TypeError):
        message = "chatMessageId in the answer is not a UUID"
        raise ValueError(message) from None


def _reported_error(document: Document) -> str:
    if document.get("ok") is False or document.get("success") is False or document.get("error"):
        return "the body of the answer reports an error, but its status does not"
    return ""


DIALECT = Dialect(_chat_message_id, requested_delay=lambda _document: None, reported_error=_reported_error)
