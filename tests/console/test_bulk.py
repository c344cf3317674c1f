"""Bulk actions: preview, start, batches, progress and stop; no follow-up is processed twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy import text

from console.person import Form, heading, words
from followups.operations import bulk_runner
from followups.operations.bulk_runner import run_batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    import httpx
    import pytest

    from console.person import Person
    from world import World

HOUR = timedelta(hours=1)
NOW = text("now()")


def carry_out(world: World) -> None:
    """Run the worker's batches until no bulk action is left."""
    while run_batch(world.engine):
        pass


def failed(world: World) -> UUID:
    """Insert a failed follow-up."""
    return world.follow_up(due=-HOUR, status="failed", reason="rejected", finished_at=NOW)


def counted(world: World, condition: str) -> int:
    """Count the workspace's follow-ups."""
    query = f"SELECT count(*) FROM follow_ups WHERE workspace_id = '{world.workspace_id}' AND {condition}"  # noqa: S608 - a test
    return int(world.scalar(query))


def start(one: Person, **fields: object) -> httpx.Response:
    """Request the preview of a bulk action, start the action, and return its page."""
    seen = one.post("/bulk/preview", **fields)
    assert seen.status_code == 200, words(seen)
    form = next(form for form in Form(seen.text).forms if form["action"] == "/console/bulk")
    ticks = {"tick": fields["tick"]} if "tick" in fields else {}
    done = one.post("/bulk", **form["fields"] | ticks, do=fields["do"])
    assert done.status_code == 303, words(done)
    return one.get(done.headers["location"].removeprefix("/console"))


def test_selected_follow_ups_are_cancelled_after_a_preview(
    person: Callable[..., Person], own: World, foreign: World
) -> None:
    """A bulk cancel skips follow-ups that have finished, are in flight, or belong to another workspace.

    The preview of the bulk cancel changes nothing.
    """
    ids = [own.follow_up(due=HOUR) for _ in range(3)]
    done = failed(own)
    theirs = foreign.follow_up(due=HOUR)
    one = person("agent", own)
    ticks = [str(each) for each in (*ids, done, theirs)]
    seen = one.post("/bulk/preview", do="cancel", tick=ticks)
    assert heading(seen) == "Bulk action"
    assert "3 follow-ups to cancel." in words(seen)
    assert "2 of the ticked follow-ups are in another state" in words(seen)
    assert {row.status for row in own.rows(*ids)} == {"pending"}
    own.put_in_flight(ids[2])
    page = start(one, do="cancel", tick=ticks)
    assert "waits for a worker" in words(page)
    carry_out(own)
    assert [own.row(each).status for each in ids] == ["cancelled", "cancelled", "pending"]
    assert own.row(done).status == "failed"
    assert foreign.row(theirs).status == "pending"
    said = words(one.client.get(page.url))
    assert "2 done" in said
    assert "1: in flight" in said
    events = f"SELECT action || number || actor FROM audit_events WHERE workspace_id = '{own.workspace_id}'"  # noqa: S608 - a test
    assert own.scalar(events) == "follow_ups.cancelled3test agent"


def test_all_matching_follow_ups_are_cancelled_except_later_ones(person: Callable[..., Person], own: World) -> None:
    """A bulk cancel applies to all matching follow-ups, except those created after its start."""
    own.burst([HOUR] * 30)
    other = own.follow_up(own.chat(channel="whatsapp", last_user_message_at=NOW), due=HOUR)
    one = person("agent", own)
    with_batches = bulk_runner.CANCELS
    bulk_runner.CANCELS = 7
    try:
        page = start(one, do="cancel-all", channel="api", state="pending")
        later = own.follow_up(due=HOUR)
        carry_out(own)
    finally:
        bulk_runner.CANCELS = with_batches
    assert "30 done of 30" in words(one.client.get(page.url))
    assert own.row(other).status == own.row(later).status == "pending"
    assert counted(own, "status = 'cancelled'") == 30


def test_failed_follow_ups_are_retried_once_per_request(person: Callable[..., Person], own: World) -> None:
    """A repeated request starts no second action and retries no follow-up twice."""
    ids = [str(failed(own)) for _ in range(3)]
    one = person("agent", own)
    seen = one.post("/bulk/preview", do="retry", tick=ids)
    fields = next(form for form in Form(seen.text).forms if form["action"] == "/console/bulk")["fields"]
    places = {one.post("/bulk", **fields | {"tick": ids}, do="retry").headers["location"] for _ in range(3)}
    assert len(places) == 1
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: carry_out(own), range(3)))
    again = start(one, do="retry", tick=ids)
    carry_out(own)
    assert counted(own, "retry_of IS NOT NULL") == 3
    assert "3: already retried" in words(one.client.get(again.url))


def test_an_action_is_stopped_after_its_batch(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a bulk cancel is stopped, the follow-ups cancelled so far stay cancelled, and no others change."""
    carry_out(own)
    own.burst([HOUR] * 10)
    monkeypatch.setattr(bulk_runner, "CANCELS", 4)
    one = person("agent", own)
    page = start(one, do="cancel-all")
    assert run_batch(own.engine)
    running = one.client.get(page.url)
    assert "running" in words(running)
    assert one.submit(running, f"{running.url.path.removeprefix('/console')}/stop").status_code == 303
    carry_out(own)
    said = words(one.client.get(page.url))
    assert "stopped" in said
    assert "4 done of 10" in said
    assert "Stop" not in said.replace("stopped", "")


def test_another_workspaces_action_is_not_found(person: Callable[..., Person], own: World, foreign: World) -> None:
    """A bulk action that belongs to another workspace cannot be stopped.

    A session limited to one chat sees only the actions on that chat.
    """
    own.follow_up(due=HOUR)
    page = start(person("agent", own), do="cancel-all")
    path = page.url.path.removeprefix("/console")
    other, narrow = person("agent", foreign), person("agent", own, own.chat())
    for one in (other, narrow):
        assert one.get(path).status_code == 404
        assert one.post(f"{path}/stop").status_code == 404
        assert path not in one.get("/bulk").text
    assert path in person("viewer", own).get("/bulk").text
    carry_out(own)


def test_invalid_actions_are_refused(person: Callable[..., Person], own: World) -> None:
    """A bulk action is refused if it is unknown, selects nothing, or filters by an unsuitable state."""
    one = person("agent", own)
    for fields in (
        {"do": "cancel"},
        {"do": "explode", "tick": str(uuid4())},
        {"do": "cancel-all", "state": "sent"},
        {"do": "retry-all", "state": "pending"},
    ):
        assert one.post("/bulk/preview", **fields).status_code == 422
        assert one.post("/bulk", **fields).status_code == 422
