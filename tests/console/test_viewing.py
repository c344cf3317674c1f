"""Viewing follow-ups: the list with its filters, one follow-up with its timeline, and a chat."""

from __future__ import annotations

import re
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text

from console.person import heading, words
from followups.console.pages import follow_ups
from followups.store import browse
from followups.store.counts import within
from web import key_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from console.person import Person
    from world import World

NOW = text("now()")
HOUR = timedelta(hours=1)
EVIL = "<script>alert(1)</script> \"'&{{ 7*7 }} \u202eabc"


def listed(page: object) -> list[str]:
    """Return the ids of the rows in a list, in the order shown."""
    return re.findall(r'<tr id="row-([\w-]+)"', page.text)  # type: ignore[attr-defined] # an answer


def failed(world: World, reason: str = "rejected: HTTP 403 no", **columns: object) -> UUID:
    """Insert a failed follow-up."""
    return world.follow_up(due=-HOUR, status="failed", reason=reason, finished_at=NOW, **columns)


def test_each_row_has_an_explanation(person: Callable[..., Person], own: World) -> None:
    """Each row of a list shows the same explanation as `followups show`."""
    chat_id = own.chat(channel="whatsapp", external_id="5511987654321", last_user_message_at=NOW)
    ids = {
        "pending": own.follow_up(chat_id, due=HOUR),
        "failed": failed(own),
        "sent": own.follow_up(due=-HOUR, status="sent", finished_at=NOW, accepted_at=NOW),
        "cancelled": own.follow_up(due=HOUR, status="cancelled", reason="user_replied", finished_at=NOW),
    }
    page = person("viewer", own).get("/follow-ups")
    assert heading(page) == "Follow-ups"
    assert set(listed(page)) == {str(each) for each in ids.values()}
    said = words(page)
    for sentence in (
        "The follow-up will be sent in",
        "refused the follow-up for good",
        "The transport accepted the follow-up",
        "The user wrote in the chat",
    ):
        assert sentence in said
    assert "5511987654321" in said
    assert "Still there?" in said


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"state": "failed"}, {"failed"}),
        ({"state": "pending"}, {"near", "far"}),
        ({"reason": "rejected"}, {"failed"}),
        ({"reason": "too_late"}, set()),
        ({"channel": "whatsapp"}, {"near"}),
        ({"id": "5511987654321"}, {"near"}),
        ({"id": "CHAT"}, {"near"}),
        ({"id": "FAR"}, {"far"}),
        ({"due_from": "2100-01-01T00:00"}, {"far"}),
        ({"due_to": "2100-01-01T00:00", "state": "pending"}, {"near"}),
        ({"id": str(uuid4())}, set()),
        ({}, {"near", "far", "failed"}),
    ],
)
def test_the_list_is_filtered_by_its_url(
    query: dict[str, str], expected: set[str], person: Callable[..., Person], own: World, foreign: World
) -> None:
    """The list can be filtered by state, reason, channel, due range and any id.

    Follow-ups of other workspaces are never listed.
    """
    chat_id = own.chat(channel="whatsapp", external_id="5511987654321", last_user_message_at=NOW)
    ids = {
        "near": own.follow_up(chat_id, due=HOUR),
        "far": own.follow_up(due=100 * 365 * 24 * HOUR),
        "failed": failed(own),
    }
    foreign.follow_up(foreign.chat(channel="whatsapp", external_id="5511987654321"), due=HOUR)
    names = {"CHAT": str(chat_id), "FAR": str(ids["far"])}
    query = {name: names.get(value, value) for name, value in query.items()}
    page = person("viewer", own).get("/follow-ups", **query)
    assert page.status_code == 200
    assert set(listed(page)) == {str(ids[name]) for name in expected}
    everywhere = person("operator").get("/follow-ups", **query, workspace=str(own.workspace_id))
    assert set(listed(everywhere)) == {str(ids[name]) for name in expected}


@pytest.mark.parametrize(
    "query", [{"state": "x"}, {"reason": "x"}, {"channel": "x"}, {"due_from": "x"}, {"id": "a\x00"}]
)
def test_an_invalid_filter_is_reported(query: dict[str, str], person: Callable[..., Person], own: World) -> None:
    """The list reports an invalid filter and keeps the value that was typed."""
    assert person("viewer", own).get("/follow-ups", **query).status_code == 422


def test_paging_skips_no_follow_up(person: Callable[..., Person], own: World) -> None:
    """Paging skips no follow-up, even if many were created at once, and keeps the filter."""
    own.burst([HOUR] * 60)
    failed(own)
    one = person("viewer", own)
    seen: list[str] = []
    place = "/follow-ups?state=pending"
    while place:
        page = one.get(place)
        seen += listed(page)
        found = re.search(r'href="/console(/follow-ups\?[^"]*after=[^"]*)" rel="next"', page.text)
        place = found[1].replace("&amp;", "&") if found else ""
    assert len(seen) == len(set(seen)) == 60


def test_a_search_out_of_time_continues_by_a_link(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a search takes too long, the page says how far back it went and links to the rest."""
    calls = count()
    # The second step of each page runs out of time, so each page covers ten minutes.
    monkeypatch.setattr(browse, "within", lambda *given: None if next(calls) % 2 else within(*given))
    ids = [own.follow_up(due=HOUR, created_at=text(f"now() - interval '{age} min'")) for age in (5, 15, 35)]
    one = person("viewer", own)
    page = one.get("/follow-ups", channel="api")
    pages = [listed(page)]
    for _ in range(3):
        assert "Searched back to" in words(page)
        found = re.search(r'href="/console(/follow-ups\?[^"]*after=[^"]*)" rel="next"', page.text)
        assert found
        page = one.get(found[1].replace("&amp;", "&"))
        pages.append(listed(page))
    assert pages == [[str(ids[0])], [str(ids[1])], [], [str(ids[2])]]
    monkeypatch.undo()
    monkeypatch.setattr(follow_ups, "LIMIT", timedelta(minutes=1))  # long enough even on a slow machine
    page = one.get("/follow-ups", channel="api")
    assert listed(page) == [str(each) for each in ids]
    assert "Searched back to" not in words(page)


def test_operators_see_all_workspaces_and_no_texts(person: Callable[..., Person], own: World, foreign: World) -> None:
    """An operator sees a message only on request, even on the follow-up's page.

    Each request is recorded in the audit log.
    """
    secret = f"secret {uuid4()}"
    ids = [world.follow_up(due=HOUR, message=secret) for world in (own, foreign)]
    one = person("operator")
    page = one.get("/follow-ups", state="pending")
    assert {str(each) for each in ids} <= set(listed(page))
    assert secret not in page.text
    shown = one.get(f"/follow-ups/{ids[0]}")
    assert secret not in shown.text
    asked = one.submit(shown, f"/follow-ups/{ids[0]}/message")
    assert secret in asked.text
    event = f"SELECT count(*) FROM audit_events WHERE action = 'messages.shown' AND target_id = '{ids[0]}'"  # noqa: S608 - a test
    assert own.scalar(event) == 1
    assert secret not in own.scalar("SELECT COALESCE(string_agg(CAST(e AS text), ''), '') FROM audit_events e")


def test_ids_of_another_workspace_are_not_found(person: Callable[..., Person], own: World, foreign: World) -> None:
    """If an id belongs to another workspace, every page and every change returns 404."""
    chat_id = foreign.chat()
    follow_up_id = foreign.follow_up(chat_id, due=HOUR)
    one = person("admin", own)
    assert one.get(f"/chats/{chat_id}").status_code == 404
    assert one.get(f"/follow-ups/{follow_up_id}").status_code == 404
    for doing in ("", "/cancel", "/send", "/retry", "/message"):
        assert one.post(f"/follow-ups/{follow_up_id}{doing}", due="2030-01-01T09:00").status_code == 404
    before = foreign.row(follow_up_id)
    assert one.post("/follow-ups/new", chat=chat_id, message="x", due="2100-01-01T09:00").status_code == 422
    assert foreign.row(follow_up_id) == before
    assert foreign.scalar("SELECT count(*) FROM follow_ups WHERE message = 'x'") == 0


def test_a_session_for_one_chat_sees_only_that_chat(person: Callable[..., Person], own: World) -> None:
    """A session limited to one chat sees only that chat; the overview redirects to the chat."""
    chat_id = own.chat()
    mine, others = own.follow_up(chat_id, due=HOUR), own.follow_up(due=HOUR)
    one = person("agent", own, chat_id)
    assert one.get("/").headers["location"] == f"/console/chats/{chat_id}"
    assert heading(one.get(f"/chats/{chat_id}")) == "Chat"
    assert listed(one.get("/follow-ups")) == [str(mine)]
    assert listed(one.get("/follow-ups", id=str(others))) == []
    assert one.get(f"/follow-ups/{mine}").status_code == 200
    assert one.get(f"/follow-ups/{others}").status_code == 404
    other_chat = own.row(others).chat_id
    assert one.get(f"/chats/{other_chat}").status_code == 404
    refused = one.post("/follow-ups/new", chat=other_chat, message="x", due="2100-01-01T09:00")
    assert refused.status_code == 422


def test_untrusted_text_is_escaped(person: Callable[..., Person], own: World) -> None:
    """Messages, reasons, external ids and transport errors are escaped on every page."""
    chat_id = own.chat(external_id=EVIL)
    one = person("agent", own)
    ids = [own.follow_up(chat_id, due=HOUR, message=EVIL), failed(own, reason=f"rejected: {EVIL}", message=EVIL)]
    own.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, 'retry', :detail)",
        id=ids[1],
        detail=EVIL,
    )
    for path in ("/follow-ups", f"/chats/{chat_id}", *(f"/follow-ups/{each}" for each in ids)):
        page = one.get(path)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;" in page.text
        assert "49" not in words(page).split()
    found = one.get("/follow-ups", id=EVIL)
    assert listed(found) == [str(ids[0])]
    assert "<script>alert" not in found.text


def test_the_timeline_shows_each_event(person: Callable[..., Person], own: World) -> None:
    """The timeline shows a follow-up's creation, acceptance and end, and each of its attempts.

    For each attempt, the timeline shows the outcome, the code and the duration.
    """
    key_id, key = key_of(own)
    sent = {"status": "sent", "finished_at": NOW, "accepted_at": NOW, "accepted_duration": timedelta(milliseconds=85)}
    one_id = own.follow_up(due=-HOUR, attempts=2, created_by_key=key_id, **sent)
    own.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
        " VALUES (:id, 1, 'retry', 'HTTP 503 away', 503, interval '120 ms')",
        id=one_id,
    )
    said = words(person("viewer", own).get(f"/follow-ups/{one_id}")).partition("Timeline")[2]
    places = [
        said.index(each) for each in ("Created", "Attempt 1: failed for now", "HTTP 503", "120 ms", "HTTP 503 away")
    ]
    assert places == sorted(places)
    assert f"Created API key {key[:12]}…" in said
    assert "Accepted by the transport, attempt 2 took 85 ms" in said
    assert "Ended: sent" in said


@pytest.mark.parametrize(("status", "shown"), [("failed", False), ("sent", True)])
def test_a_hold_that_ended_without_opening(
    person: Callable[..., Person], own: World, status: str, *, shown: bool
) -> None:
    """The timeline does not claim that the sending hours opened if the follow-up was too late before that."""
    reason = "too_late" if status == "failed" else None
    one_id = own.follow_up(due=-HOUR, status=status, reason=reason, finished_at=NOW, held_until=NOW)
    page = words(person("viewer", own).get(f"/follow-ups/{one_id}"))
    assert ("Held until the sending hours opened" in page) is shown


def test_each_row_shows_position_and_messaging_window(person: Callable[..., Person], own: World) -> None:
    """A row shows a follow-up's position in its chat and whether the messaging window closes too early."""
    chat_id = own.chat(channel="whatsapp", last_user_message_at=text("now() - interval '20 hours'"))
    ids = [own.follow_up(chat_id, due=each * HOUR) for each in (1, 2, 5)]
    one = person("viewer", own)
    page = one.get("/follow-ups")
    rows = dict(zip(listed(page), re.findall(r'<span class="why">(.*?)</span>', page.text), strict=True))
    first, second, third = (rows[str(each)] for each in ids)
    assert "in its chat" not in first
    assert "It is number 2 in its chat" in second
    assert "window" not in second
    assert "messaging window closes before that" in third
    assert "It is number 3 in its chat" in words(one.get(f"/follow-ups/{ids[2]}"))


def send_by_day(own: World, days: int) -> None:
    """Set sending hours from 08:00 to 20:00 in Sao Paulo, on the days in the bit mask (Monday is bit 0)."""
    own.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'America/Sao_Paulo', '08:00', '20:00', :days, now(), now() + interval '1 hour')",
        id=own.workspace_id,
        days=days,
    )


def test_explanations_are_in_the_persons_language_and_zone(person: Callable[..., Person], own: World) -> None:
    """The console shows the explanations of `followups show` in the person's language and time zone."""
    send_by_day(own, days=31)
    one_id = own.follow_up(due_date=text("'2100-01-30T12:00:00Z'"))
    one = person("viewer", own)
    one.post("/preferences", language="pt-BR", zone="America/Sao_Paulo", next="/")
    for path in ("/follow-ups", f"/follow-ups/{one_id}"):
        said = words(one.get(path))
        assert "a menos que algo o cancele antes" in said
        assert "(08:00 às 20:00, seg-sex, America/Sao_Paulo): ficará retido até 2100-02-01 08:00:00." in said


def test_a_chat_shows_its_messages_and_follow_ups(person: Callable[..., Person], own: World) -> None:
    """A chat's page shows its messages without text, its follow-ups, and the messaging window."""
    chat_id = own.chat(channel="whatsapp", last_user_message_at=NOW)
    own.sql(
        "INSERT INTO chat_messages (workspace_id, id, chat_id, role) VALUES (:w, gen_random_uuid(), :c, 'user')",
        w=own.workspace_id,
        c=chat_id,
    )
    own.follow_up(chat_id, due=HOUR)
    failed(own, chat_id=chat_id)
    said = words(person("viewer", own).get(f"/chats/{chat_id}"))
    for part in ("open until", "Coming pending", "Past failed", "Who wrote when", "user"):
        assert part in said


def test_times_are_in_the_chosen_and_the_workspaces_zone(person: Callable[..., Person], own: World) -> None:
    """Times are shown in the workspace's time zone, unless the person chooses another."""
    send_by_day(own, days=127)
    one_id = own.follow_up(due_date=text("'2100-01-31T12:00:00Z'"))
    one = person("viewer", own)
    assert "2100-01-31 09:00:00" in words(one.get(f"/follow-ups/{one_id}"))
    one.post("/preferences", zone="Europe/Berlin", next="/")
    said = words(one.get(f"/follow-ups/{one_id}"))
    assert "2100-01-31 13:00:00 (2100-01-31 09:00:00 America/Sao_Paulo)" in said
