"""Tests of the requests that the transport ``matrix`` sends to a homeserver."""

from __future__ import annotations

import json

import pytest

from followups.errors import SettingsError, TransportConfigurationError
from followups.transports.matrix import NO_ROOM, MatrixTransport
from followups.transports.port import Rejected, Sent
from unit.transports.doubles import MESSAGE, TOKEN, a_delivery, answer, opened, scripted, settings_for


def matrix(url: str | None, secret: str | None = TOKEN) -> MatrixTransport:
    """Return the transport for a homeserver."""
    return MatrixTransport(settings_for(url, transport="matrix", transport_secret=secret))


@pytest.mark.parametrize("slash", ["", "/"])
async def test_a_text_event_is_put_into_the_chats_room(slash: str) -> None:
    """The request's path contains the room and the follow-up's id; the body is ``m.text``."""
    delivery = a_delivery(external_chat_id="!room:example.org")
    async with scripted(answer(200, b'{"event_id": "$1"}')) as server, opened(matrix(server.url + slash)) as transport:
        assert isinstance(await transport.send(delivery), Sent)
        request = server.requests[0]
    assert request.target.replace("%21", "!").replace("%3A", ":") == (
        f"/_matrix/client/v3/rooms/!room:example.org/send/m.room.message/{delivery.follow_up_id}"
    )
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert json.loads(request.body) == {"msgtype": "m.text", "body": MESSAGE}


@pytest.mark.parametrize(
    "room",
    [None, "", "!", "#alias:example.org", "..", "49301234567"]
    + [f"!a{part}b:example.org" for part in ("/", "/../!", "\\", "?", "#", "%2f", " ", "\n", "\u200b", "\0")],
)
async def test_a_chat_without_a_room_id_is_rejected_without_a_call(room: str | None) -> None:
    """A follow-up in a chat without a room id is rejected without a call.

    A proxy could take a room id such as ``!a/../!b:host`` for the path of another room.
    """
    async with scripted(answer(200)) as server, opened(matrix(server.url)) as transport:
        outcome = await transport.send(a_delivery(external_chat_id=room))
        assert outcome == Rejected(NO_ROOM)
        assert server.requests == []


async def test_a_room_that_several_workspaces_share_is_rejected_without_a_call() -> None:
    """If another workspace has a chat with the same room, the follow-up is rejected without a call."""
    async with scripted(answer(200)) as server, opened(matrix(server.url)) as transport:
        outcome = await transport.send(a_delivery(external_chat_id_is_shared=True))
        assert outcome == Rejected("another workspace has a chat with the same Matrix room")
        assert server.requests == []


@pytest.mark.parametrize("event_id", ["", "\ud800secret", 5, None])
async def test_an_invalid_event_id(event_id: object) -> None:
    """An accepted message counts as sent, even if its event id is invalid; the detail does not quote the event id."""
    async with (
        scripted(answer(200, json.dumps({"event_id": event_id}).encode())) as server,
        opened(matrix(server.url)) as transport,
    ):
        outcome = await transport.send(a_delivery())
    assert outcome in {
        Sent(None, 200, "the answer contains no event_id"),
        Sent(None, 200, "the event_id in the answer is not valid text"),
    }


async def test_a_wrong_token_is_a_rejection() -> None:
    """If the homeserver answers M_UNKNOWN_TOKEN, the call is rejected, and the rejection quotes it."""
    async with (
        scripted(answer(401, b'{"errcode":"M_UNKNOWN_TOKEN"}')) as server,
        opened(matrix(server.url)) as transport,
    ):
        assert await transport.send(a_delivery()) == Rejected('HTTP 401 {"errcode":"M_UNKNOWN_TOKEN"}', 401)


def test_a_missing_url_names_the_setting() -> None:
    """If the homeserver's URL is missing, startup fails."""
    with pytest.raises(TransportConfigurationError, match="set it to the homeserver's base URL"):
        matrix(None)


@pytest.mark.parametrize("url", ["http://user:hunter2@host", "http://host?x=1", "http://host/#x"])
def test_a_url_with_credentials_query_or_fragment_is_refused(url: str) -> None:
    """A URL with credentials, a query or a fragment is rejected without being shown."""
    with pytest.raises(TransportConfigurationError, match="only the homeserver's base URL") as caught:
        matrix(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("secret", [None, "", " ", "two words", "line\nbreak", "t\u00f6ken"])
def test_an_invalid_token_names_the_setting(secret: str | None) -> None:
    """If the access token is missing, or contains anything but visible ASCII characters, startup fails."""
    with pytest.raises(SettingsError, match="FOLLOWUPS_TRANSPORT_SECRET should be the access token"):
        matrix("http://host", secret)


async def test_check_connects_to_the_homeserver() -> None:
    """`check` connects to the homeserver without sending a request."""
    async with scripted(answer(200)) as server:
        assert (await matrix(server.url).check()).startswith(f"{server.url} accepts connections")
        assert server.requests == []
