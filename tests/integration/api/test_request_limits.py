"""Tests of the limits that keep one workspace from overloading the database.

The number of connections per workspace is limited, and deep pages are cheap.
"""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text

from followups.api import pagination, request_limits
from followups.api.pagination import PageStarts
from followups.store.listing import Start
from stack import wait_until
from web import FOLLOW_UPS, Api, in_days, is_problem, served
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.settings import Settings

CLIENTS = 20
PAGE = 1_490


@pytest.fixture
def two_workspaces(settings: Settings, world: World) -> Iterator[tuple[Api, Api]]:
    """Serve the application and return clients of two workspaces."""
    with served(settings) as address:
        one, other = (Api(f"http://{address[0]}:{address[1]}", each) for each in (world, World(world.engine)))
        with one.client, other.client:
            yield one, other


def test_a_workspace_has_a_share_of_the_connections(two_workspaces: tuple[Api, Api]) -> None:
    """While all requests of one workspace wait for a locked chat, another workspace is served."""
    one, other = two_workspaces
    chat_id = one.chat()
    with ThreadPoolExecutor(12) as pool, one.world.engine.connect() as connection:
        connection.execute(text("SELECT FROM chats WHERE id = :id FOR UPDATE"), {"id": chat_id})
        answers = [pool.submit(one.message, chat_id, "agent") for _ in range(12)]
        wait_until(lambda: one.world.waiting_for_locks() == request_limits.SHARE)
        assert other.get(FOLLOW_UPS).status_code == 200
        assert one.world.waiting_for_locks() == request_limits.SHARE
        connection.rollback()
        assert {answer.result().status_code for answer in answers} == {201}


def test_too_many_requests_of_a_workspace(two_workspaces: tuple[Api, Api], monkeypatch: pytest.MonkeyPatch) -> None:
    """If a workspace has too many waiting requests, only its requests are rejected, with Retry-After."""
    one, other = two_workspaces
    monkeypatch.setattr(request_limits, "WAITING_SHARE", 1)
    chat_id = one.chat()
    with ThreadPoolExecutor(1) as pool, one.world.engine.connect() as connection:
        connection.execute(text("SELECT FROM chats WHERE id = :id FOR UPDATE"), {"id": chat_id})
        answer = pool.submit(one.message, chat_id, "agent")
        wait_until(one.world.waiting_for_locks)
        refused = one.get(FOLLOW_UPS)
        is_problem(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] == "1"
        assert other.get(FOLLOW_UPS).status_code == 200
        connection.rollback()
        assert answer.result().status_code == 201


def test_deep_pages_do_not_delay_another_workspace(two_workspaces: tuple[Api, Api]) -> None:
    """While 20 clients of a workspace request page 1,490 of a list, another workspace is not delayed."""
    one, other = two_workspaces
    chat_id = one.world.chat()
    one.world.sql(
        """
        INSERT INTO follow_ups (workspace_id, chat_id, due_date, message, status, finished_at, trigger_chat_message_id)
        SELECT :workspace_id, :chat_id, now(), 'x', 'sent', now(), gen_random_uuid() FROM generate_series(1, 15000)
        """,
        workspace_id=one.world.workspace_id,
        chat_id=chat_id,
    )
    other.create()
    stopping = threading.Event()

    def walk() -> None:
        while not stopping.is_set():
            assert len(one.get(FOLLOW_UPS, pageNumber=PAGE).json()) == 10

    def measured() -> float:
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            assert len(other.ids()) == 1
            times.append(time.perf_counter() - begun)
        median = statistics.median(times)
        print(f"another's list beside {CLIENTS} clients on page {PAGE:,}: {median * 1000:.0f} ms")  # noqa: T201 - prints the measurement
        return median

    with ThreadPoolExecutor(CLIENTS) as pool:
        walks = [pool.submit(walk) for _ in range(CLIENTS)]
        try:
            # several attempts, since the machine may be busy for a moment
            assert any(measured() < 0.25 for _ in range(5))
        finally:
            stopping.set()
        for each in walks:
            each.result()


def test_deep_pages_keep_their_starting_points(
    two_workspaces: tuple[Api, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deep page of a list keeps its first row for a while, even if follow-ups are added."""
    monkeypatch.setattr(pagination, "DEEP", 4)
    api = two_workspaces[0]
    chat_id = api.chat()
    created = [api.create(chat_id, in_days(1))["id"] for _ in range(11)][::-1]
    pages = [api.ids(pageSize=2, pageNumber=number) for number in range(1, 5)]
    newest = api.create(chat_id, in_days(1))["id"]
    pages += [api.ids(pageSize=2, pageNumber=number) for number in (5, 6)]
    assert [one for page in pages for one in page] == created
    assert api.ids(pageSize=2, pageNumber=4) == pages[3]
    assert api.ids(pageSize=2, pageNumber=1) == [newest, created[0]]
    assert api.ids(pageSize=3, pageNumber=2) == created[2:5]  # the server locates a shallow page by counting rows
    last = api.get(FOLLOW_UPS, pageSize=2, pageNumber=6)
    assert 'rel="next"' not in last.headers["link"]
    assert 'rel="prev"' in last.headers["link"]


def test_starting_points_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page far into the list is read from the nearest stored starting point before it.

    Each stored starting point expires after some time. If there are too many starting points, the oldest are discarded.
    """
    starts, moment = PageStarts(), in_a_list(0).created_at
    for number in range(pagination.MOST_STARTS + 1):
        starts.remember("list", in_a_list(pagination.DEEP + 10 * number))
    assert starts.nearest("list", pagination.DEEP + 25) == Start(pagination.DEEP + 20, moment, ID)
    assert starts.nearest("list", pagination.DEEP + 5) is None
    assert starts.nearest("another", 10**6) is None
    monkeypatch.setattr(time, "monotonic", lambda: 10.0**9)
    assert starts.nearest("list", 10**6) is None


ID = uuid4()


def in_a_list(offset: int) -> Start:
    """Return the position at which the page at ``offset`` starts."""
    return Start(offset, datetime(2030, 1, 1, tzinfo=UTC), ID)
