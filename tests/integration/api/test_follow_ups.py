"""Tests that create and get follow-ups through the API of a running web process."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from followups.sending_hours import SendingHours
from followups.store import sending_hours
from web import FOLLOW_UPS, in_days, is_problem, pointers
from world import FIELDS

if TYPE_CHECKING:
    from typing import Any

    from web import Api

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class TestCreate:
    """POST creates a pending follow-up or returns an error with the reason for the rejection."""

    def test_created(self, api: Api) -> None:
        """A create request returns 201 with exactly the documented fields and the follow-up's location.

        Times in the response are in UTC and end with Z.
        """
        chat_id = str(uuid4())
        agent = api.message(chat_id, "agent").json()
        body = {"chatId": chat_id, "dueDate": "2035-01-01T10:00:00+02:00", "message": "Da? \N{WAVING HAND SIGN}"}
        answer = api.post(FOLLOW_UPS, body)
        assert answer.status_code == 201
        created = answer.json()
        assert list(created) == FIELDS
        assert answer.headers["location"] == f"{FOLLOW_UPS}/{created['id']}"
        assert all(TIME.fullmatch(created[name]) for name in ("createdAt", "updatedAt", "dueDate"))
        assert UUID(created["id"]).version == 4
        assert created | {"id": "", "createdAt": "", "updatedAt": ""} == {
            "id": "", "createdAt": "", "updatedAt": "", "chatId": chat_id, "chatMessageId": None,
            "dueDate": "2035-01-01T08:00:00Z", "finishedAt": None, "message": body["message"], "reason": None,
            "status": "pending", "triggerChatMessageId": agent["id"],
        }  # fmt: skip
        assert api.get(answer.headers["location"]).json() == created

    def test_unknown_chat(self, api: Api) -> None:
        """A follow-up in an unknown chat is rejected with 404 and the documented text."""
        answer = api.post(FOLLOW_UPS, {"chatId": str(uuid4()), "dueDate": in_days(1), "message": "?"})
        assert is_problem(answer, 404, "not-found")["detail"] == "The chat was not found."

    @pytest.mark.parametrize("roles", [(), ("agent", "user")], ids=["no messages", "last is the user's"])
    def test_nothing_to_follow_up(self, api: Api, roles: tuple[str, ...]) -> None:
        """If the chat is empty or the user wrote last, scheduling fails with 409."""
        chat_id = str(uuid4())
        api.client.put(f"/api/v1/chats/{chat_id}", json={"channel": "widget"})
        for role in roles:
            api.message(chat_id, role)
        answer = api.post(FOLLOW_UPS, {"chatId": chat_id, "dueDate": in_days(1), "message": "?"})
        problem = is_problem(answer, 409, "nothing-to-follow-up")
        assert problem["detail"] == "The chat has no messages or the last message is from the user."

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("chatId", "42"),
            ("chatId", None),
            ("chatId", "{6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11}"),
            ("chatId", "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11\x00"),
            ("dueDate", "2030-01-01T00:00:00"),
            ("dueDate", "2030-01-01"),
            ("dueDate", "2030-13-01T00:00:00Z"),
            ("dueDate", "0001-01-01T00:00:00+10:00"),
            ("dueDate", 1893456000),
            ("dueDate", "1893456000"),
            ("message", ""),
            ("message", "x" * 65_537),
            ("message", "a\x00b"),
            ("message", 1),
            ("message", None),
        ],
    )
    def test_bad_field(self, api: Api, field: str, value: object) -> None:
        """If a field is invalid, the response is a 422 with an error that points only at this field."""
        body: dict[str, Any] = {"chatId": str(uuid4()), "dueDate": in_days(1), "message": "?"} | {field: value}
        assert pointers(is_problem(api.post(FOLLOW_UPS, body), 422, "invalid-request")) == [f"#/{field}"]

    @pytest.mark.parametrize(
        "raw", [b"", b"{", b"[]", b"null", b'"\xff"', b"\xff", b"[" * 100_000, b'{"message":"\\ud800"}']
    )
    def test_bad_body(self, api: Api, raw: bytes) -> None:
        """If a body is not a JSON object or contains invalid text, the create request gets 422."""
        headers = {"content-type": "application/json"}
        is_problem(api.client.post(FOLLOW_UPS, content=raw, headers=headers), 422, "invalid-request")

    def test_longest_message(self, api: Api) -> None:
        """A message may have 65,536 characters, even if each takes twelve bytes of JSON."""
        text = "\N{GRINNING FACE}" * 65_536
        assert api.create(text=text)["message"] == text

    def test_past_due_date(self, api: Api) -> None:
        """A due date in the past is stored as given."""
        assert api.create(due="2001-02-03T04:05:06.789Z")["dueDate"] == "2001-02-03T04:05:06.789000Z"

    def test_unknown_fields_are_ignored(self, api: Api) -> None:
        """Unknown fields in a request body are ignored."""
        body = {"chatId": api.chat(), "dueDate": in_days(1), "message": "?", "priority": 1}
        assert api.post(FOLLOW_UPS, body).status_code == 201

    @pytest.mark.parametrize("channel", ["whatsapp", "instagram"])
    def test_messaging_window(self, api: Api, channel: str) -> None:
        """On a channel with a messaging window, a follow-up must be due within 24 hours of the user's last message."""
        chat_id = api.chat(channel, "user", "agent")
        assert api.create(chat_id, in_days(0.99))
        body = {"chatId": chat_id, "dueDate": in_days(1.01), "message": "?"}
        problem = is_problem(api.post(FOLLOW_UPS, body), 422, "outside-messaging-window")
        assert pointers(problem) == ["#/dueDate"]

    def test_sending_hours_and_the_window(self, api: Api) -> None:
        """A due date outside sending hours is accepted if the hours begin before the messaging window ends.

        A create request gets 422 if the messaging window ends before sending hours begin.
        """
        now = datetime.now(UTC)
        # The sending hours end in one hour and begin again 23 hours from now. The user wrote 2 hours ago, so the
        # messaging window closes before the next sending hours begin.
        hours = SendingHours("UTC", (now - timedelta(hours=1)).time(), (now + timedelta(hours=1)).time())
        with Session(api.world.engine) as session, session.begin():
            sending_hours.put(session, api.world.workspace_id, hours)
        outside = in_days(2 / 24)
        assert api.create(due=outside)["status"] == "pending"
        chat_id = api.chat("whatsapp")
        api.world.sql("UPDATE chats SET last_user_message_at = now() - interval '2 hours' WHERE id = :id", id=chat_id)
        problem = is_problem(
            api.post(FOLLOW_UPS, {"chatId": chat_id, "dueDate": outside, "message": "?"}),
            422,
            "outside-messaging-window",
        )
        assert pointers(problem) == ["#/dueDate"]
        assert "outside the workspace's sending hours" in problem["detail"]
        inside = api.create(chat_id, in_days(0.5 / 24))
        is_problem(api.patch(inside, dueDate=outside), 422, "outside-messaging-window")

    def test_no_window_without_a_user(self, api: Api) -> None:
        """If the user has never written, a channel with a messaging window accepts no follow-up."""
        body = {"chatId": api.chat("whatsapp"), "dueDate": "2001-01-01T00:00:00Z", "message": "?"}
        is_problem(api.post(FOLLOW_UPS, body), 422, "outside-messaging-window")


class TestGet:
    """GET returns a single follow-up."""

    def test_unknown_id(self, api: Api) -> None:
        """A request for a follow-up with an unknown id returns 404."""
        is_problem(api.get(f"{FOLLOW_UPS}/{uuid4()}"), 404, "not-found")

    @pytest.mark.parametrize("bad", ["42", "%00", "x" * 1000, "6a1f3f0e4f0e4b398f5b0f6a3f1f7c11", "..%2e", "'--"])
    def test_no_uuid(self, api: Api, bad: str) -> None:
        """Getting a follow-up with an id that is not a UUID returns 422."""
        is_problem(api.get(f"{FOLLOW_UPS}/{bad}"), 422, "invalid-request")


def test_times_are_the_database_s(api: Api) -> None:
    """The `createdAt` of a new follow-up is the current time in UTC."""
    created = datetime.fromisoformat(api.create()["createdAt"])
    assert abs(datetime.now(UTC) - created) < timedelta(seconds=20)
