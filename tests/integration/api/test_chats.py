"""Tests of requests about chats, which are sent to a running web process."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from web import CHAT_MESSAGES, CHATS, FOLLOW_UPS, in_days, is_problem, pointers

if TYPE_CHECKING:
    from typing import Any

    from web import Api


class TestPut:
    """PUT creates or updates a chat."""

    @pytest.mark.parametrize("channel", ["widget", "waha", "whatsapp", "instagram", "api", "matrix"])
    def test_created_and_updated(self, api: Api, channel: str) -> None:
        """The first PUT of a chat returns 201; the next returns 200 and replaces the chat's fields."""
        path = f"{CHATS}/{uuid4()}"
        created = api.client.put(path, json={"channel": channel, "externalId": "!room:host"})
        assert created.status_code == 201
        assert created.json()["externalId"] == "!room:host"
        updated = api.client.put(path, json={"channel": "api"})
        assert updated.status_code == 200
        assert updated.json() == created.json() | {
            "channel": "api",
            "externalId": None,
            "updatedAt": updated.json()["updatedAt"],
        }

    def test_messages_stay(self, api: Api) -> None:
        """Updating a chat keeps its messages."""
        chat_id = api.chat("api", "agent")
        api.client.put(f"{CHATS}/{chat_id}", json={"channel": "widget"})
        assert api.create(chat_id)

    @pytest.mark.parametrize(
        ("body", "pointer"),
        [
            ({}, "#/channel"),
            ({"channel": "sms"}, "#/channel"),
            ({"channel": "api", "externalId": ""}, "#/externalId"),
            ({"channel": "api", "externalId": "a\x00"}, "#/externalId"),
            ({"channel": "api", "externalId": 1}, "#/externalId"),
        ],
    )
    def test_bad_body(self, api: Api, body: dict[str, Any], pointer: str) -> None:
        """A chat with an invalid body is rejected with 422."""
        answer = api.client.put(f"{CHATS}/{uuid4()}", json=body)
        assert pointers(is_problem(answer, 422, "invalid-request")) == [pointer]

    def test_bad_id(self, api: Api) -> None:
        """A chat id that is not a UUID is rejected with 422."""
        answer = api.client.put(f"{CHATS}/abc", json={"channel": "api"})
        assert pointers(is_problem(answer, 422, "invalid-request")) == ["#/chatId"]


class TestRemove:
    """DELETE removes a chat."""

    def test_removed(self, api: Api) -> None:
        """Removing a chat cancels its pending follow-ups; later requests for the chat return 404."""
        chat_id = api.chat()
        created = api.create(chat_id)
        answer = api.client.delete(f"{CHATS}/{chat_id}")
        assert (answer.status_code, answer.content) == (204, b"")
        cancelled = api.read(created)
        assert (cancelled["status"], cancelled["reason"]) == ("cancelled", "chat_removed")
        assert cancelled["finishedAt"] is not None
        body = {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}
        is_problem(api.post(FOLLOW_UPS, body), 404, "not-found")
        is_problem(api.message(chat_id, "agent"), 404, "not-found")
        is_problem(api.client.delete(f"{CHATS}/{chat_id}"), 404, "not-found")

    def test_put_again(self, api: Api) -> None:
        """A removed chat that is created again has no messages."""
        chat_id = api.chat()
        api.client.delete(f"{CHATS}/{chat_id}")
        assert api.client.put(f"{CHATS}/{chat_id}", json={"channel": "api"}).status_code == 201
        body = {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}
        is_problem(api.post(FOLLOW_UPS, body), 409, "nothing-to-follow-up")

    def test_unknown(self, api: Api) -> None:
        """Removing an unknown chat returns 404."""
        is_problem(api.client.delete(f"{CHATS}/{uuid4()}"), 404, "not-found")


class TestMessages:
    """POST requests with a chat message."""

    @pytest.mark.parametrize(
        ("role", "reason"), [("user", "user_replied"), ("operator", "human_takeover"), ("agent", None)]
    )
    def test_cancels(self, api: Api, role: str, reason: str | None) -> None:
        """A user's or operator's message cancels the chat's pending follow-ups; an agent's message does not."""
        chat_id = api.chat()
        created, other = [api.create(chat_id) for _ in range(3)], api.create()
        answer = api.message(chat_id, role)
        assert answer.status_code == 201
        expected = sorted(each["id"] for each in created) if reason else []
        assert sorted(answer.json()["cancelledFollowUpIds"]) == expected
        assert {api.read(each)["reason"] for each in created} == {reason}
        assert api.read(other) == other

    def test_answer(self, api: Api) -> None:
        """The response to a chat message has exactly the documented fields.

        A chat that is still unknown is created. If the request contains a message text, the text is ignored.
        """
        body = {"id": str(uuid4()), "chatId": str(uuid4()), "role": "agent", "createdAt": "2030-01-01T01:00:00+01:00"}
        answer = api.post(CHAT_MESSAGES, body | {"text": "secret"})
        assert answer.status_code == 201
        assert answer.json() == body | {"createdAt": "2030-01-01T00:00:00Z", "cancelledFollowUpIds": []}
        assert api.create(body["chatId"])["triggerChatMessageId"] == body["id"]

    def test_repeated_message(self, api: Api) -> None:
        """If a message with the same id is already recorded, the request gets 200 and has no effect."""
        chat_id, stranger = api.chat(), str(uuid4())
        first = api.message(chat_id, "user")
        api.message(chat_id, "agent")
        created = api.create(chat_id)
        for chat in (chat_id, stranger):
            again = api.post(CHAT_MESSAGES, {"id": first.json()["id"], "chatId": chat, "role": "operator"})
            assert again.status_code == 200
            assert again.json() == first.json() | {"cancelledFollowUpIds": []}
        assert api.read(created) == created
        is_problem(api.client.delete(f"{CHATS}/{stranger}"), 404, "not-found")

    def test_older(self, api: Api) -> None:
        """A message older than the chat's last message is recorded but has no other effect."""
        created = api.create()
        answer = api.message(created["chatId"], "user", createdAt="2020-01-01T00:00:00Z")
        assert (answer.status_code, answer.json()["cancelledFollowUpIds"]) == (201, [])
        assert api.read(created) == created

    def test_clock_ahead(self, api: Api) -> None:
        """Even after a message dated in the future, a later reply counts as new."""
        chat_id = str(uuid4())
        api.message(chat_id, "agent", createdAt=in_days(1))
        created = api.create(chat_id)
        assert api.message(chat_id, "user").json()["cancelledFollowUpIds"] == [created["id"]]

    def test_in_flight(self, api: Api) -> None:
        """If a user replies while a follow-up is in flight, the attempt continues but is not retried."""
        created = api.create()
        api.world.put_in_flight(created["id"])
        assert api.message(created["chatId"], "user").json()["cancelledFollowUpIds"] == []
        assert api.read(created)["status"] == "pending"
        query = f"SELECT cancel_requested FROM follow_ups WHERE id = '{created['id']}'"  # noqa: S608 - the test's own id
        assert api.world.scalar(query) == "user_replied"

    @pytest.mark.parametrize(
        ("field", "value"),
        [("id", "x"), ("chatId", None), ("role", "bot"), ("createdAt", "2030-01-01T00:00:00"), ("createdAt", 1)],
    )
    def test_bad_field(self, api: Api, field: str, value: object) -> None:
        """A chat message with an invalid field is rejected with 422."""
        body: dict[str, object] = {"id": str(uuid4()), "chatId": str(uuid4()), "role": "user"}
        answer = api.post(CHAT_MESSAGES, body | {field: value})
        assert pointers(is_problem(answer, 422, "invalid-request")) == [f"#/{field}"]
