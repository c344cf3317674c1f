"""Tests of scheduling, changing, cancelling, sending now and retrying with the console's forms."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from console.person import heading, words
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from console.person import Person
    from world import World

HOUR = timedelta(hours=1)
NOW = text("now()")


def events(world: World, target: UUID | str) -> list[str]:
    """Return the audit events of one follow-up with their actors."""
    with world.engine.connect() as connection:
        query = text("SELECT action || ' ' || actor || ' ' || way FROM audit_events WHERE target_id = :id ORDER BY at")
        return list(connection.scalars(query, {"id": target}))


def test_an_agent_schedules_a_follow_up(person: Callable[..., Person], own: World) -> None:
    """An agent schedules a follow-up in a chat given by its id or external id.

    The response shows the new follow-up.
    """
    chat_id = own.chat(external_id="room 7")
    one = person("agent", own)
    for chat in (str(chat_id), "room 7"):
        page = one.get("/follow-ups/new")
        assert heading(page) == "New follow-up"
        answer = one.submit(
            page, "/follow-ups/new", chat=chat, message="Hello\r\nyou", due="2100-01-31T09:00", do="schedule"
        )
        assert answer.status_code == 303, words(answer)
        one_id = answer.headers["location"].rpartition("/")[2]
        row = own.row(one_id)
        assert (row.message, row.due_date.isoformat()) == ("Hello\nyou", "2100-01-31T09:00:00+00:00")
        assert events(own, one_id) == ["follow_up.created test agent console"]
        assert "Created console, test agent" in words(one.get(f"/follow-ups/{one_id}"))


def test_a_form_that_is_submitted_twice_schedules_one(person: Callable[..., Person], own: World) -> None:
    """A repeated submission leads to the same follow-up; a changed form schedules another one."""
    one = person("agent", own)
    page = one.get("/follow-ups/new")
    fields = {"chat": str(own.chat()), "message": "Once", "due": "2100-01-31T09:00", "do": "schedule"}
    with ThreadPoolExecutor(2) as pool:
        with own.engine.begin() as connection:
            connection.execute(text("SELECT 1 FROM chats WHERE id = :id FOR UPDATE"), {"id": fields["chat"]})
            submitted = [pool.submit(one.submit, page, "/follow-ups/new", **fields) for _ in range(2)]
            wait_until(lambda: own.waiting_for_locks() == 2)
        answers = [each.result() for each in submitted]
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    again = one.submit(page, "/follow-ups/new", **fields | {"message": "Twice"})
    assert again.headers["location"] != answers[0].headers["location"]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"chat": str(uuid4())}, 422, "The chat was not found."),
        ({"chat": ""}, 422, "The chat was not found."),
        ({"chat": "a\x00"}, 422, "NUL"),
        ({"message": ""}, 422, "1 to 65,536"),
        ({"message": "a\x00"}, 422, "NUL"),
        ({"due": ""}, 422, "is not a time"),
        ({"due": "soon"}, 422, "is not a time"),
        ({"due": "0001-01-01T00:00"}, 422, "years"),
    ],
)
def test_a_refused_schedule_keeps_the_typed_values(
    fields: dict[str, str], status: int, told: str, person: Callable[..., Person], own: World
) -> None:
    """If scheduling fails, the form is shown again with the values that the user typed."""
    given = {"chat": str(own.chat()), "message": "Take care", "due": "2100-01-31T09:00"} | fields
    answer = person("agent", own).post("/follow-ups/new", **given)
    assert answer.status_code == status
    assert told in words(answer)
    if "message" not in fields:
        assert "Take care" in answer.text
    assert own.scalar(f"SELECT count(*) FROM follow_ups WHERE workspace_id = '{own.workspace_id}'") == 0  # noqa: S608 - a test


def test_a_chat_whose_last_message_is_the_users_is_a_conflict(person: Callable[..., Person], own: World) -> None:
    """If a chat's last message is from the user, scheduling a follow-up there returns 409."""
    chat_id = own.chat(last_message_role="user")
    answer = person("agent", own).post("/follow-ups/new", chat=chat_id, message="Kept", due="2100-01-31T09:00")
    assert answer.status_code == 409
    assert "Kept" in answer.text


def test_the_consequences_are_shown_before_saving(person: Callable[..., Person], own: World) -> None:
    """Checking a due date shows the time in UTC, the sending hours and the pause, but stores nothing."""
    own.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'America/Sao_Paulo', '08:00', '20:00', 31, now(), now() + interval '1 hour')",
        id=own.workspace_id,
    )
    own.sql("INSERT INTO pauses (workspace_id) VALUES (:id)", id=own.workspace_id)
    one = person("agent", own)
    fields = {"chat": str(own.chat()), "message": "Hello", "due": "2100-01-30T08:00", "do": "check"}
    answer = one.submit(one.get("/follow-ups/new"), "/follow-ups/new", **fields)
    said = words(answer)
    assert answer.status_code == 200
    assert "2100-01-30 08:00:00 in America/Sao_Paulo is 2100-01-30 11:00:00 UTC." in said
    assert "held until Monday 2100-02-01 08:00." in said
    assert "Sending has been paused since" in said
    assert "Hello" in answer.text
    assert own.scalar(f"SELECT count(*) FROM follow_ups WHERE workspace_id = '{own.workspace_id}'") == 0  # noqa: S608 - a test


def test_a_skipped_time_is_refused_and_a_repeated_time_needs_a_choice(
    person: Callable[..., Person], own: World
) -> None:
    """A local time that the clock skips is refused. For a local time that occurs twice, the form offers a choice."""
    one = person("agent", own)
    one.post("/preferences", zone="Europe/Berlin", next="/")
    fields = {"chat": str(own.chat()), "message": "Hello", "do": "schedule"}
    gap = one.submit(one.get("/follow-ups/new"), "/follow-ups/new", due="2029-03-25T02:30", **fields)
    assert gap.status_code == 422
    assert "skip 02:30" in words(gap)
    twice = one.submit(one.get("/follow-ups/new"), "/follow-ups/new", due="2029-10-28T02:30", **fields)
    assert twice.status_code == 422
    assert "Which of the two?" in words(twice)
    done = one.submit(twice, "/follow-ups/new", fold="second", do="schedule")
    assert done.status_code == 303
    assert own.row(done.headers["location"].rpartition("/")[2]).due_date.isoformat() == "2029-10-28T01:30:00+00:00"


def test_saving_changes_message_and_due_date(person: Callable[..., Person], own: World) -> None:
    """Saving updates the message, with its line breaks and spaces, and the due date.

    The timeline shows the old and new due dates and who changed them.
    """
    one_id = own.follow_up(due_date=text("'2100-01-31T09:00:00Z'"), message="  Old\n\nwords ")
    one = person("agent", own)
    page = one.get(f"/follow-ups/{one_id}")
    same = one.submit(page, f"/follow-ups/{one_id}", do="save")
    assert same.status_code == 303
    assert own.row(one_id).message == "  Old\n\nwords "
    assert events(own, one_id) == []
    saved = one.submit(page, f"/follow-ups/{one_id}", message="New", due="2100-02-01T10:30", do="save")
    assert saved.status_code == 303
    row = own.row(one_id)
    assert (row.message, row.due_date.isoformat()) == ("New", "2100-02-01T10:30:00+00:00")
    assert "Moved from 2100-01-31 09:00:00 to 2100-02-01 10:30:00" in words(one.get(f"/follow-ups/{one_id}"))


def test_two_people_edit_one_follow_up(person: Callable[..., Person], own: World) -> None:
    """If two people edit one follow-up, the second person to save sees both texts.

    Saving again replaces the stored text.
    """
    one_id = own.follow_up(due=HOUR, message="Original")
    ann, ben = person("agent", own), person("agent", own)
    pages = [each.get(f"/follow-ups/{one_id}") for each in (ann, ben)]
    assert ann.submit(pages[0], f"/follow-ups/{one_id}", message="Ann's", do="save").status_code == 303
    told = ben.submit(pages[1], f"/follow-ups/{one_id}", message="Ben's", do="save")
    assert told.status_code == 409
    assert "changed in the meantime" in words(told)
    assert "Ann&#39;s" in told.text
    assert "Ben&#39;s" in told.text
    assert own.row(one_id).message == "Ann's"
    assert ben.submit(told, f"/follow-ups/{one_id}", do="save").status_code == 303
    assert own.row(one_id).message == "Ben's"


@pytest.mark.parametrize("doing", ["", "/cancel", "/send"])
def test_a_conflict_keeps_the_typed_values(doing: str, person: Callable[..., Person], own: World) -> None:
    """If a follow-up cannot be changed (409), the form keeps the typed values."""
    one_id = own.follow_up(due=HOUR)
    one = person("agent", own)
    page = one.get(f"/follow-ups/{one_id}")
    typed: dict[str, Any] = {"": {"message": "My words"}, "/cancel": {"reason": "My words"}, "/send": {}}[doing]
    own.put_in_flight(one_id)
    in_flight = one.submit(page, f"/follow-ups/{one_id}{doing}", **typed)
    assert in_flight.status_code == 409
    assert "being delivered at this moment" in words(in_flight)
    assert not typed or "My words" in in_flight.text
    own.sql("UPDATE follow_ups SET status = 'sent', finished_at = now(), begun_at = NULL WHERE id = :id", id=one_id)
    finished = one.submit(page, f"/follow-ups/{one_id}{doing}", **typed)
    assert finished.status_code == 409
    assert "The follow-up has finished in the meantime" in words(finished)
    assert not typed or "My words" in finished.text
    assert own.row(one_id).status == "sent"
    assert events(own, one_id) == []


def test_cancelling_is_final_and_keeps_the_reason(person: Callable[..., Person], own: World) -> None:
    """A cancelled follow-up has the reason that the person typed, or the default code."""
    for reason, stored in (("The customer called", "The customer called"), ("", "cancelled_by_api")):
        one_id = own.follow_up(due=HOUR)
        one = person("agent", own)
        answer = one.submit(one.get(f"/follow-ups/{one_id}"), f"/follow-ups/{one_id}/cancel", reason=reason)
        assert answer.status_code == 303
        assert (own.row(one_id).status, own.row(one_id).reason) == ("cancelled", stored)
        assert events(own, one_id) == ["follow_up.ended test agent console"]


def test_send_now_makes_a_follow_up_due(person: Callable[..., Person], own: World) -> None:
    """A follow-up that waits for its next attempt can be made due immediately."""
    one_id = own.follow_up(due=HOUR)
    one = person("agent", own)
    assert one.submit(one.get(f"/follow-ups/{one_id}"), f"/follow-ups/{one_id}/send").status_code == 303
    assert own.scalar(f"SELECT due_date <= now() AND next_attempt_at IS NULL FROM follow_ups WHERE id = '{one_id}'")  # noqa: S608 - a test
    assert events(own, one_id) == ["follow_up.changed test agent console"]


def test_a_failed_follow_up_is_retried_once(person: Callable[..., Person], own: World) -> None:
    """A failed follow-up can be retried only once, and the retry opens the new follow-up's page.

    Repeating the request creates no second follow-up.
    """
    one_id = own.follow_up(due=-HOUR, status="failed", reason="rejected", finished_at=NOW)
    one = person("agent", own)
    page = one.get(f"/follow-ups/{one_id}")
    done = one.submit(page, f"/follow-ups/{one_id}/retry")
    assert done.status_code == 303
    assert str(own.row(done.headers["location"].rpartition("/")[2]).retry_of) == str(one_id)
    again = one.submit(page, f"/follow-ups/{one_id}/retry")
    assert again.status_code == 409
    assert "already been retried" in words(again)
    assert events(own, one_id) == ["follow_up.retried test agent console"]


def test_a_viewer_has_no_buttons(person: Callable[..., Person], own: World) -> None:
    """A page offers only the actions that the person's role allows."""
    one_id = own.follow_up(due=HOUR)
    page = person("viewer", own).get(f"/follow-ups/{one_id}")
    for button in ("Save", "Cancel follow-up", "Send now", "Retry"):
        assert button not in words(page)


def test_an_error_shows_an_operator_only_what_was_typed(person: Callable[..., Person], own: World) -> None:
    """After an error, an operator sees the text that was typed, but not the stored message.

    The stored message is shown only after a click, which is recorded as an audit event.
    """
    one_id = own.follow_up(due=HOUR, message="Private words")
    told = person("operator").post(f"/follow-ups/{one_id}", message="My words", version="stale")
    assert told.status_code == 409
    assert "My words" in told.text
    assert "Private words" not in told.text


def test_a_message_with_other_line_ends_is_kept(person: Callable[..., Person], own: World) -> None:
    """If only the due date is changed, the message keeps its line endings.

    Browsers send CRLF for every line end.
    """
    one_id = own.follow_up(due=HOUR, message="a\r\nb\rc")
    one = person("agent", own)
    fields = {"message": "a\r\nb\r\nc", "due": "2100-02-01T10:30", "do": "save"}
    assert one.post(f"/follow-ups/{one_id}", **fields).status_code == 303
    assert own.row(one_id).message == "a\r\nb\rc"


def test_a_retry_in_a_removed_chat_shows_its_error(person: Callable[..., Person], own: World) -> None:
    """If someone retries a follow-up of a removed chat, the follow-up's page shows an error."""
    one_id = own.follow_up(due=-HOUR, status="failed", reason="rejected", finished_at=NOW)
    own.sql("UPDATE chats SET removed_at = now() WHERE id = (SELECT chat_id FROM follow_ups WHERE id = :id)", id=one_id)
    told = person("agent", own).post(f"/follow-ups/{one_id}/retry")
    assert told.status_code == 409
    assert "The chat was not found" in words(told)


@pytest.mark.parametrize("due", ["0001-01-01T00:00+14:00", "9999-12-31T10:00", "9999-12-31T23:59"])
def test_the_edge_of_the_calendar_is_refused(due: str, person: Callable[..., Person], own: World) -> None:
    """A due date in the calendar's first or last year is refused; such a filter causes no server error."""
    own.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'America/Sao_Paulo', '08:00', '20:00', 31, now(), now() + interval '1 hour')",
        id=own.workspace_id,
    )
    one = person("agent", own)
    answer = one.post("/follow-ups/new", chat=str(own.chat()), message="Hello", due=due, do="check")
    assert answer.status_code == 422
    assert "years 2 to 9998" in words(answer)
    for zone in ("America/Sao_Paulo", "Asia/Tokyo"):
        one.client.cookies.set("followups_zone", zone)
        for moment in (due, "0001-01-01T00:00"):
            assert one.get("/follow-ups", due_from=moment).status_code in {200, 422}


def test_a_due_date_with_an_offset_is_shown_in_utc(person: Callable[..., Person], own: World) -> None:
    """In the preview, a due date with an offset other than UTC is converted to UTC."""
    fields = {"chat": str(own.chat()), "message": "Hello", "due": "2100-01-30T08:00+02:00", "do": "check"}
    assert "is 2100-01-30 06:00:00 UTC." in words(person("agent", own).post("/follow-ups/new", **fields))


def test_extreme_hours_and_numbers_cause_no_server_error(person: Callable[..., Person], own: World) -> None:
    """Sending hours with a UTC offset, or a huge number in a bulk action, cause no server error."""
    hours = {"time_zone": "UTC", "from": "08:00+02:00", "to": "20:00", "day": "0", "do": "save"}
    told = person("admin", own).post("/settings/hours", **hours)
    assert "as in 08:00" in words(told)
    many = {"do": "cancel", "tick": str(own.follow_up(due=HOUR)), "action_id": str(uuid4()), "expected": "9" * 5_000}
    assert person("agent", own).post("/bulk", **many).status_code == 303
