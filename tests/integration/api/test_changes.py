"""Changes to follow-ups through the API of a running web process."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from web import in_days, is_problem, pointers

if TYPE_CHECKING:
    from typing import Any

    from web import Api


class TestChange:
    """PATCH requests for a pending follow-up."""

    def test_fields(self, api: Api) -> None:
        """Every field of a pending follow-up can be changed; the other fields stay the same."""
        before, chat_id = api.create(), api.chat()
        changes = {
            "chatId": chat_id,
            "chatMessageId": str(uuid4()),
            "dueDate": "2036-01-01T00:00:00Z",
            "message": "New",
            "triggerChatMessageId": str(uuid4()),
        }
        answer = api.patch(before, **changes)
        assert answer.status_code == 200
        after = answer.json()
        assert after == before | changes | {"updatedAt": after["updatedAt"]}
        assert after["updatedAt"] > before["updatedAt"]
        assert api.read(before) == after

    def test_nothing(self, api: Api) -> None:
        """A PATCH that changes no value leaves even `updatedAt` unchanged."""
        before = api.create()
        same = {name: before[name] for name in ("dueDate", "message", "status", "chatId", "chatMessageId", "reason")}
        del same["reason"]
        for changes in ({}, same, {"reason": None, "finishedAt": None, "chatMessageId": None}):
            assert api.patch(before, **changes).json() == before

    def test_a_new_due_date_invalidates_the_lease(self, api: Api) -> None:
        """Rescheduling a follow-up invalidates all its earlier hints."""
        before = api.create()
        api.world.sql(
            "UPDATE follow_ups SET lease_token = 7, lease_until = now() + interval '1 min', next_attempt_at = now()"
        )
        assert api.patch(before, dueDate=in_days(3)).status_code == 200
        row = api.world.row(UUID(before["id"]))
        assert row.lease_token > 7
        assert (row.lease_until, row.next_attempt_at) == (None, None)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"status": "cancelled"}, "cancelled_by_api"),
            ({"status": "cancelled", "reason": None}, "cancelled_by_api"),
            ({"status": "cancelled", "reason": "He called"}, "He called"),
            ({"status": "failed"}, "failed_by_api"),
            ({"status": "failed", "reason": "rejected: by hand"}, "rejected: by hand"),
            ({"status": "sent"}, None),
            ({"status": "sent", "chatMessageId": str(uuid4())}, None),
        ],
    )
    def test_transition(self, api: Api, changes: dict[str, Any], reason: str | None) -> None:
        """If a PATCH sets a final status, the caller's reason or the default code is stored.

        A repeated PATCH has no effect.
        """
        created = api.create()
        ended = api.patch(created, **changes).json()
        assert (ended["status"], ended["reason"]) == (changes["status"], reason)
        assert ended["finishedAt"] == ended["updatedAt"]
        again = api.patch(created, **changes)
        assert (again.status_code, again.json()) == (200, ended)

    def test_finished_at(self, api: Api) -> None:
        """The caller may state when a follow-up ended."""
        ended = api.patch(api.create(), status="sent", finishedAt="2020-01-01T00:00:00Z").json()
        assert ended["finishedAt"] == "2020-01-01T00:00:00Z"

    @pytest.mark.parametrize(
        ("changes", "pointer"),
        [
            ({"reason": "x"}, "#/reason"),
            ({"reason": "x", "status": "pending"}, "#/reason"),
            ({"finishedAt": "2020-01-01T00:00:00Z"}, "#/finishedAt"),
            ({"status": "sent", "reason": "x"}, "#/reason"),
            ({"status": "cancelled", "reason": ""}, "#/reason"),
            ({"status": "cancelled", "reason": "a\x00"}, "#/reason"),
            ({"status": "cancelled", "reason": "x" * 2001}, "#/reason"),
            ({"status": "done"}, "#/status"),
            ({"status": None}, "#/status"),
            ({"dueDate": None}, "#/dueDate"),
            ({"dueDate": "2030-01-01T00:00:00"}, "#/dueDate"),
            ({"message": None}, "#/message"),
            ({"message": ""}, "#/message"),
            ({"chatId": None}, "#/chatId"),
            ({"duedate": "2030-01-01T00:00:00Z"}, "#/duedate"),
            ({"id": str(uuid4())}, "#/id"),
        ],
    )
    def test_bad_change(self, api: Api, changes: dict[str, Any], pointer: str) -> None:
        """A forbidden change is rejected with 422 and an error that names the field.

        The rejected request changes nothing.
        """
        before = api.create()
        assert pointers(is_problem(api.patch(before, **changes), 422, "invalid-request")) == [pointer]
        assert api.read(before) == before

    def test_unknown_ids(self, api: Api) -> None:
        """A change to an unknown follow-up, or a move to an unknown chat, is rejected with 404."""
        nobody = {"id": str(uuid4())}
        for changes in ({}, {"message": "x"}, {"chatMessageId": None}, {"dueDate": in_days(1)}):
            is_problem(api.patch(nobody, **changes), 404, "not-found")
        is_problem(api.patch(api.create(), chatId=str(uuid4())), 404, "not-found")

    def test_chat_of_the_user(self, api: Api) -> None:
        """A follow-up cannot be moved into a chat whose last message is from the user."""
        is_problem(api.patch(api.create(), chatId=api.chat("api", "user")), 409, "nothing-to-follow-up")

    def test_messaging_window(self, api: Api) -> None:
        """The new due date of a follow-up must be within the channel's messaging window."""
        created = api.create(api.chat("whatsapp", "user", "agent"), in_days(0.5))
        is_problem(api.patch(created, dueDate=in_days(2)), 422, "outside-messaging-window")
        assert api.patch(created, dueDate=in_days(0.6)).status_code == 200


class TestFinished:
    """Tests of PATCH requests for a follow-up that has ended or is in flight."""

    @pytest.mark.parametrize("status", ["sent", "failed", "cancelled"])
    def test_never_changes(self, api: Api, status: str) -> None:
        """Every change to a finished follow-up is rejected with 409."""
        created = api.create()
        ended = api.patch(created, status=status).json()
        others = {"sent", "failed", "cancelled", "pending"} - {status}
        for changes in (
            {"message": "x"},
            {"dueDate": in_days(1)},
            {"status": others.pop()},
            {"status": others.pop()},
            {"status": others.pop()},
            {"status": status, "finishedAt": "2020-01-01T00:00:00Z"},
        ):
            is_problem(api.patch(created, **changes), 409, "already-finished")
        assert api.read(created) == ended

    def test_chat_message_id_is_added_once(self, api: Api) -> None:
        """The chat message id of a sent follow-up can be added later, but only once.

        A follow-up that failed or was cancelled cannot be given a chat message id.
        """
        sent, failed, name = api.create(), api.create(), str(uuid4())
        api.patch(sent, status="sent")
        api.patch(failed, status="failed")
        assert api.patch(sent, chatMessageId=name).json()["chatMessageId"] == name
        assert api.patch(sent, chatMessageId=name).status_code == 200
        is_problem(api.patch(sent, chatMessageId=str(uuid4())), 409, "already-finished")
        is_problem(api.patch(failed, chatMessageId=name), 409, "already-finished")

    def test_in_flight(self, api: Api) -> None:
        """While an attempt is in flight, every change is rejected with 409 and Retry-After."""
        created = api.create()
        api.world.put_in_flight(created["id"])
        for changes in ({"message": "x"}, {"dueDate": in_days(1)}, {"status": "cancelled"}):
            answer = api.patch(created, **changes)
            is_problem(answer, 409, "delivery-in-progress")
            assert int(answer.headers["retry-after"]) >= 1
        assert api.read(created) == created

    def test_an_earlier_end_unblocks_the_later(self, api: Api) -> None:
        """When an earlier follow-up in a chat is cancelled, the next follow-up can be claimed."""
        chat_id = api.chat()
        first, second = api.create(chat_id), api.create(chat_id)
        api.world.sql(
            "UPDATE follow_ups SET waits_for = :first WHERE id = :second", first=first["id"], second=second["id"]
        )
        api.patch(first, status="cancelled")
        assert api.world.row(UUID(second["id"])).waits_for is None


def test_changes_are_recorded_with_their_key(api: Api) -> None:
    """Each change by PATCH records an audit event that names the API key but contains no message text.

    A create request leaves no audit event.
    """
    follow_up = api.create()
    for changes in ({"message": "Ann's secret"}, {"message": "Ann's secret"}, {"status": "cancelled", "reason": "Ann"}):
        assert api.patch(follow_up, **changes).status_code == 200
    assert api.patch(follow_up, message="again").status_code == 409
    with api.world.engine.connect() as connection:
        query = text("SELECT * FROM audit_events WHERE workspace_id = :id ORDER BY at")
        changed, ended = connection.execute(query, {"id": api.world.workspace_id}).all()
    assert (changed.way, changed.actor_id, changed.target_id) == ("api", api.key_id, UUID(follow_up["id"]))
    assert (changed.action, changed.details) == ("follow_up.changed", {"fields": ["message"]})
    assert (ended.action, ended.details) == ("follow_up.ended", {"fields": ["reason", "status"], "status": "cancelled"})


def test_a_removed_chat_is_recorded_with_what_it_cancelled(api: Api) -> None:
    """Removing a chat leaves one audit event with the number of cancelled follow-ups.

    Removing a chat without pending follow-ups leaves no audit event.
    """
    chat_id, empty = api.chat("api", "agent"), api.chat("api", "agent")
    for _ in range(2):
        api.create(chat_id)
    for one in (chat_id, empty):
        assert api.client.delete(f"/api/v1/chats/{one}").status_code == 204
    with api.world.engine.connect() as connection:
        query = text("SELECT * FROM audit_events WHERE workspace_id = :id")
        event = connection.execute(query, {"id": api.world.workspace_id}).one()
    assert (event.action, event.number, str(event.target_id)) == ("chat.removed", 2, chat_id)
    assert event.actor_id == api.key_id
