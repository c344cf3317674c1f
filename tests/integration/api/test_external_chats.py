"""Tests of external chat ids: each ``matrix`` room belongs to only one workspace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from followups.embedded import Processes
from web import CHATS, Api, is_problem, start
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from followups.settings import Settings


@pytest.fixture(scope="module")
def matrix_url(web_settings: Settings) -> Iterator[str]:
    """Start a web process with the transport ``matrix`` and return the URL of the process."""
    with Processes() as processes:
        yield start(processes, web_settings.environment() | {"FOLLOWUPS_TRANSPORT": "matrix"})[1]


@pytest.fixture
def two_workspaces(matrix_url: str, web_engine: Engine) -> Iterator[tuple[Api, Api]]:
    """Return API clients of two workspaces."""
    one, other = (Api(matrix_url, World(web_engine)) for _ in range(2))
    with one.client, other.client:
        yield one, other


def put(api: Api, room: str | None, chat: object = None) -> int:
    """Assign a chat to a Matrix room and return the response's status."""
    answer = api.client.put(f"{CHATS}/{chat or uuid4()}", json={"channel": "matrix", "externalId": room})
    if answer.status_code == 409:
        is_problem(answer, 409, "external-chat-taken")
    return answer.status_code


def test_a_room_belongs_to_one_workspace(two_workspaces: tuple[Api, Api]) -> None:
    """If one workspace uses a Matrix room, chats of other workspaces cannot use it.

    The workspace that used the room first keeps using it.
    """
    one, other = two_workspaces
    room, elsewhere, chat, theirs = f"!{uuid4()}:host", f"!{uuid4()}:host", uuid4(), uuid4()
    assert put(one, room, chat) == 201
    assert put(other, room, chat) == 409
    assert put(other, elsewhere, theirs) == 201
    assert put(other, room, theirs) == 409
    assert put(one, elsewhere, chat) == 409
    assert put(one, room, chat) == 200
    assert put(one, room) == 201  # another chat of the same workspace


def test_a_removed_chat_has_no_room(two_workspaces: tuple[Api, Api]) -> None:
    """Once a chat is removed, its Matrix room can be used by another workspace.

    After another workspace has taken the room, the first workspace cannot use it again.
    """
    one, other = two_workspaces
    room, chat = f"!{uuid4()}:host", uuid4()
    assert put(one, room, chat) == 201
    assert one.client.delete(f"{CHATS}/{chat}").status_code == 204
    assert put(other, room) == 201
    assert put(one, room, chat) == 409


def test_chats_without_a_room_never_conflict(two_workspaces: tuple[Api, Api]) -> None:
    """Chats without an external id never conflict, even between workspaces."""
    assert [put(each, None) for each in two_workspaces] == [201, 201]


def test_two_concurrent_requests(two_workspaces: tuple[Api, Api]) -> None:
    """If two workspaces request a Matrix room concurrently, exactly one of them receives it."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(25):
            room = f"!{uuid4()}:host"
            assert sorted(pool.map(lambda api, room=room: put(api, room), two_workspaces)) == [201, 409]


def test_other_transports_external_ids_are_separate_for_each_workspace(api: Api, other: Api) -> None:
    """Two workspaces may use the same external id if the transport's requests name the workspace."""
    room = f"!{uuid4()}:host"
    assert [put(each, room) for each in (api, other)] == [201, 201]
