"""Tests for event streams: their viewers, their maximum number, and how they end."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import httpx
import pytest

from console.person import Person
from followups.console import live
from web import served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from followups.settings import Settings
    from world import World

HOUR = timedelta(hours=1)


class EventStream:
    """An open event stream, read in a thread."""

    def __init__(self, one: Person, path: str = "/console/stream") -> None:
        self.events: list[str] = []
        self.ended = threading.Event()
        self.status = 0
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(one, path), daemon=True)
        self._thread.start()
        assert self._open.wait(10)

    def _read(self, one: Person, path: str) -> None:
        cookies = dict(one.client.cookies)
        try:
            with httpx.stream("GET", f"{one.url}{path}", cookies=cookies, timeout=20) as answer:
                self.status = answer.status_code
                self._open.set()
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        self.events.append(line.removeprefix("event: "))
        except httpx.HTTPError:
            pass
        finally:
            self._open.set()
            self.ended.set()

    def wait_for(self, event: str, within: float = 8.0) -> bool:
        """Return whether the event arrived in time."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            if event in self.events:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def sign_in(console_settings: Settings, own: World) -> Iterator[Callable[..., Person]]:
    """Serve the application for one test, and return a function that signs a person in.

    The server and its streams are stopped when the test ends.
    """
    people: list[Person] = []
    with served(console_settings) as (host, port):

        def one(role: str = "viewer", world: World | None = own) -> Person:
            people.append(Person(f"http://{host}:{port}", own.engine))
            return people[-1].signed_in(role, world and world.workspace_id)

        yield one
        for each in people:
            each.client.close()


def test_a_change_sends_an_event_to_open_pages(sign_in: Callable[..., Person], own: World, foreign: World) -> None:
    """Open lists receive an event for a new follow-up; a follow-up's open page, for each change.

    A stream never reports another workspace's follow-ups, even if its client requests them.
    """
    one_id = own.follow_up(due=HOUR)
    ours = EventStream(sign_in())
    single = EventStream(sign_in(), f"/console/stream?follow_up={one_id}")
    theirs = EventStream(sign_in(world=foreign), f"/console/stream?follow_up={one_id}")
    operator = EventStream(sign_in("operator", None))
    time.sleep(2 * live.EVERY)
    for each in (ours, single, theirs, operator):
        each.events.clear()
    own.sql("UPDATE follow_ups SET updated_at = now() + interval '1 s' WHERE id = :id", id=one_id)
    assert single.wait_for("change")
    assert theirs.events == []
    own.follow_up(due=HOUR)
    assert ours.wait_for("change")
    assert operator.wait_for("change")
    assert theirs.events == []


def test_streams_need_a_session_and_are_bounded(
    sign_in: Callable[..., Person], monkeypatch: pytest.MonkeyPatch, person: Callable[..., Person]
) -> None:
    """Only a client with a session gets streams, and only a limited number of them.

    A session that has opened the maximum number of streams can still use the console.
    """
    monkeypatch.setattr(live, "BY_SESSION", 2)
    assert person().get("/stream").status_code == 401
    one = sign_in()
    opened = [EventStream(one) for _ in range(3)]
    assert sorted(each.status for each in opened) == [200, 200, 429]
    assert one.get("/").status_code == 200


def test_a_stream_ends_with_its_session(
    sign_in: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a person's session ends, the event stream reports the sign-out and closes."""
    monkeypatch.setattr(live, "CHECKED_EVERY", 0.2)
    one = sign_in()
    listening = EventStream(one)
    own.sql("UPDATE console_sessions SET ended_at = now() WHERE workspace_id = :id", id=own.workspace_id)
    assert listening.wait_for("signed-out")
    assert listening.ended.wait(5)


def test_streams_end_within_a_second_when_the_process_ends(console_settings: Settings, own: World) -> None:
    """Open streams end within a second after the process is told to stop."""
    with served(console_settings) as (host, port):
        one = Person(f"http://{host}:{port}", own.engine).signed_in("viewer", own.workspace_id)
        listening = EventStream(one)
        assert listening.wait_for("open")
        one.client.close()
        begun = time.monotonic()
    assert listening.ended.wait(5)
    assert time.monotonic() - begun < 3  # a second, plus a margin for a busy machine


def test_without_viewers_there_are_no_queries(sign_in: Callable[..., Person], monkeypatch: pytest.MonkeyPatch) -> None:
    """All viewers share one database query per second. Without viewers, the database is not queried."""
    looks: list[float] = []
    looked = live.changes.read_values

    def counted(*given: object) -> object:
        looks.append(time.monotonic())
        return looked(*given)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(live.changes, "read_values", counted)
    time.sleep(1.2)
    assert looks == []
    people = [sign_in() for _ in range(3)]
    opened = [EventStream(each) for each in people]
    time.sleep(2.5)
    assert 2 <= len(looks) <= 4
    assert all("open" in each.events for each in opened)
