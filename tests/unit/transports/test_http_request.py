"""Tests of the requests that the transport ``http`` sends: body, headers and signature (deploy/ENDPOINT.md)."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from followups.errors import SettingsError, TransportConfigurationError
from followups.transports.http import HttpTransport
from followups.transports.port import Delivery, Rejected, Sent
from unit.transports.doubles import (
    MESSAGE,
    SIGNING_SECRET,
    Request,
    a_delivery,
    answer,
    opened,
    scripted,
    settings_for,
)

OK = answer(200)


async def requested(delivery: Delivery, path: str = "/messages", **settings: object) -> Request:
    """Send a delivery and return the request that arrived."""
    async with (
        scripted(OK) as server,
        opened(HttpTransport(settings_for(f"{server.url}{path}", **settings))) as transport,
    ):
        assert await transport.send(delivery) == Sent(None, 200)
        return server.requests[0]


@pytest.mark.parametrize("channel", ["api", "whatsapp"])
async def test_the_body_has_exactly_the_fields_of_the_contract(channel: str) -> None:
    """The body is a JSON object of nine camelCase fields; the time is in UTC."""
    due_date = datetime(2026, 3, 1, 12, 30, 0, 5, timezone(timedelta(hours=2)))
    delivery = a_delivery(due_date=due_date, attempt=3, channel=channel)
    request = await requested(delivery)
    assert json.loads(request.body) == {
        "followUpId": str(delivery.follow_up_id),
        "workspaceId": str(delivery.workspace_id),
        "channel": channel,
        "chatId": str(delivery.chat_id),
        "externalChatId": delivery.external_chat_id,
        "triggerChatMessageId": str(delivery.trigger_chat_message_id),
        "message": MESSAGE,
        "dueDate": "2026-03-01T10:30:00.000005Z",
        "attempt": 3,
    }


async def test_a_whole_second_is_written_like_any_other_time() -> None:
    """A time in whole seconds has the same format as any other time."""
    request = await requested(a_delivery(due_date=datetime(2026, 3, 1, tzinfo=UTC)))
    assert json.loads(request.body)["dueDate"] == "2026-03-01T00:00:00.000000Z"


async def test_a_message_with_half_a_surrogate_pair_leaves_the_other_fields_unchanged() -> None:
    """If the standard library encodes the body, because pydantic cannot, ``dueDate`` keeps its format."""
    request = await requested(a_delivery(message="\ud800", due_date=datetime(2026, 3, 1, microsecond=5, tzinfo=UTC)))
    body = json.loads(request.body)
    assert (body["message"], body["dueDate"]) == ("?", "2026-03-01T00:00:00.000005Z")


async def test_a_chat_without_an_external_id_has_null() -> None:
    """If the chat has no external id, the body contains null for it."""
    request = await requested(a_delivery(external_chat_id=None))
    assert json.loads(request.body)["externalChatId"] is None


async def test_the_text_is_utf_8() -> None:
    """Non-ASCII letters are sent unescaped as UTF-8, which keeps bodies small."""
    request = await requested(
        a_delivery(message="\u0437\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439\u0442\u0435")
    )
    assert "\u0437\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439\u0442\u0435".encode() in request.body


async def test_the_key_is_the_follow_ups_id_on_every_attempt() -> None:
    """``idempotency-key`` and ``webhook-id`` are the follow-up's id, the same on every attempt."""
    delivery = a_delivery()
    for attempt in (1, 2):
        request = await requested(a_delivery(follow_up_id=delivery.follow_up_id, attempt=attempt))
        assert UUID(request.headers["idempotency-key"]) == delivery.follow_up_id
        assert request.headers["webhook-id"] == request.headers["idempotency-key"]


async def test_the_request_is_json_posted_to_the_url() -> None:
    """JSON is posted to the configured URL, including the URL's path and query."""
    request = await requested(a_delivery(), path="/in/box?token=a%2Bb&x=1")
    assert request.target == "/in/box?token=a%2Bb&x=1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(request.body))


async def test_dot_segments_of_the_path_are_kept() -> None:
    """The path is sent as it is configured, even if it contains dot segments."""
    request = await requested(a_delivery(), path="/in/./box/../messages/")
    assert request.target == "/in/./box/../messages/"


async def test_credentials_in_the_url_become_basic_authentication() -> None:
    """A user and password in the endpoint's URL are sent as basic authentication."""
    async with scripted(OK) as server:
        url = server.url.replace("http://", "http://user:pa%20ss@")
        async with opened(HttpTransport(settings_for(url))) as transport:
            await transport.send(a_delivery())
        assert server.requests[0].headers["authorization"] == "Basic dXNlcjpwYSBzcw=="


SHORT, LONG = (base64.b64encode(bytes(range(size))).decode() for size in (25, 64))
"""Two secrets: one whose base64 form has padding, and one of the maximum length."""


@pytest.mark.parametrize("secret", [SIGNING_SECRET, SIGNING_SECRET.removeprefix("whsec_"), SHORT, LONG])
async def test_a_delivery_is_signed_by_standard_webhooks(secret: str) -> None:
    """The Standard Webhooks library verifies the signature, with or without the secret's prefix."""
    request = await requested(a_delivery(), transport_secret=secret)
    assert Webhook(secret).verify(request.body, request.headers)["message"] == MESSAGE
    assert abs(int(request.headers["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 60


async def test_each_of_several_secrets_signs() -> None:
    """If there are two secrets, each delivery is signed with both.

    The receiver can verify the delivery with either secret.
    """
    request = await requested(a_delivery(), transport_secret=f" {SIGNING_SECRET}  whsec_{SHORT}\n")
    assert len(request.headers["webhook-signature"].split(" ")) == 2
    for secret in (SIGNING_SECRET, SHORT):
        assert Webhook(secret).verify(request.body, request.headers)["message"] == MESSAGE
    with pytest.raises(WebhookVerificationError):
        Webhook(LONG).verify(request.body, request.headers)


async def test_the_signature_covers_the_body() -> None:
    """A signature is valid only for its body and its secret."""
    request = await requested(a_delivery(message="\U0001f44d"), transport_secret=SIGNING_SECRET)
    Webhook(SIGNING_SECRET).verify(request.body, request.headers)
    for verifier, body in ((Webhook(SIGNING_SECRET), request.body + b" "), (Webhook(b"another"), request.body)):
        with pytest.raises(WebhookVerificationError):
            verifier.verify(body, request.headers)


async def test_without_a_secret_nothing_is_signed() -> None:
    """Without a secret, a delivery has no signature but still has its id."""
    request = await requested(a_delivery())
    assert not {"webhook-signature", "webhook-timestamp"} & request.headers.keys()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    """A redirect is a rejection; the message is sent only to the configured URL."""
    async with scripted(OK) as elsewhere, scripted(answer(status, location=elsewhere.url)) as server:
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            assert await transport.send(a_delivery()) == Rejected(f"HTTP {status}", status)
        assert (len(server.requests), len(elsewhere.requests)) == (1, 0)


async def test_the_proxy_of_the_environment_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY, ALL_PROXY and their lowercase forms have no effect."""
    async with scripted(OK) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        await requested(a_delivery())
        assert proxy.requests == []


async def test_cookies_are_not_kept() -> None:
    """Cookies from a response in one chat are not sent with requests for other chats."""
    async with (
        scripted(answer(200, set_cookie="session=1")) as server,
        opened(HttpTransport(settings_for(server.url))) as transport,
    ):
        for _ in range(2):
            await transport.send(a_delivery())
        assert all("cookie" not in request.headers for request in server.requests)


async def test_connections_are_kept_where_the_receiver_deduplicates() -> None:
    """If the receiver deduplicates, consecutive calls use one connection."""
    async with scripted(OK) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(5):
            await transport.send(a_delivery())
        assert (server.connections, len(server.requests)) == (1, 5)


async def test_no_connection_is_used_twice_where_the_receiver_does_not_deduplicate() -> None:
    """If the receiver does not deduplicate, each connection carries only one request.

    A request on a stale connection would get an unknown outcome, which is final without deduplication.
    """
    settings = {"transport_deduplicates": False}
    async with scripted(OK) as server, opened(HttpTransport(settings_for(server.url, **settings))) as transport:
        for _ in range(5):
            await transport.send(a_delivery())
        assert (server.connections, len(server.requests)) == (5, 5)
        assert {request.headers["connection"] for request in server.requests} == {"close"}


async def test_sending_before_opening_raises() -> None:
    """Calling `send` before `open` raises an exception, because it is a programming error."""
    with pytest.raises(RuntimeError, match="open"):
        await HttpTransport(settings_for("http://127.0.0.1:9")).send(a_delivery())


def test_a_missing_url_names_the_setting() -> None:
    """If the URL is missing, startup fails with an error that names the setting."""
    with pytest.raises(TransportConfigurationError, match=r"needs FOLLOWUPS_TRANSPORT_URL: set it to"):
        HttpTransport(settings_for(None))


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "https:///path", "http://host:port/", "http://[::1/", "http://host:0/", "http://a..b/"),
        *("http://a b/", "http://b\u00fccher.example/", "http://host/b\u00fccher", "http://user:p@ss@host/"),
        *("http://chat,example/", "http://chat%20host/", "http://[::1]x/", "http://[v1.a]/", "http://u%00:p@host/"),
        *("http://user:p%0A@host/", "http://.../"),
    ],
)
def test_an_invalid_url_stops_the_start(url: str) -> None:
    """A URL without a host, with an invalid port, or with characters that must be encoded is rejected at startup."""
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT_URL should be an address such as https://"):
        settings_for(url)


@pytest.mark.parametrize(
    "host", ["chat_server", "xn--bcher-kva.example.", "[fe80::1%25eth0]:80", "[::ffff:1.2.3.4]", "h:"]
)
def test_a_host_that_libcurl_accepts(host: str) -> None:
    """The setting accepts host names, IPv6 addresses, and ports."""
    assert settings_for(f"http://us%2Fer:p%C3%A4ss@{host}/path").transport_url


def test_a_plug_ins_url_has_any_scheme() -> None:
    """Only the transports http and matrix need an HTTP URL."""
    assert settings_for("amqp://host", transport="sandbox").transport_url == "amqp://host"
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT_URL should start with http:// or https://"):
        settings_for("amqp://host")


@pytest.mark.parametrize("address", ["user:hunter2@host:port", "us%3Aer:hunter2@host", "user:hunter2%E2%82%AC@host"])
def test_a_wrong_address_is_not_shown(address: str) -> None:
    """The error for a wrong URL does not contain any part of it.

    Startup fails if the credentials cannot be sent in a header.
    """
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT_URL should be an address") as caught:
        settings_for(f"http://{address}/token")
    assert not {"us", "hunter2", "token"} & set(re.split(r"\W", str(caught.value)))


WRONG = [
    *("not base64!", "whsec_", "whsec_%%%", "abcde", "p\u00e4ssword", " "),
    *(base64.b64encode(bytes(size)).decode() for size in (1, 23, 65, 100)),
    f"{SIGNING_SECRET} c2VjcmV0",
]


@pytest.mark.parametrize("secret", WRONG)
def test_an_invalid_secret_is_refused(secret: str) -> None:
    """If a secret is invalid or ambiguous, startup fails without showing the secret."""
    with pytest.raises(SettingsError, match="FOLLOWUPS_TRANSPORT_SECRET should be base64") as caught:
        settings_for("http://host", transport_secret=secret)
    assert len(secret) < 7 or secret not in str(caught.value)
