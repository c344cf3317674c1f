"""Each message reaches only its own workspace's chat, although several workspaces may use the same ids.

Under the transport ``matrix``, nothing is sent into a room that chats of several workspaces share. While another
transport is selected, several workspaces may register the same room.
"""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from cursors import intercepted
from followups.database import make_async_engine
from followups.delivery.claim import claim
from followups.delivery.pipeline import Pipeline
from followups.session_settings import ONCE_PLANNED
from followups.transports.http import HttpTransport
from followups.transports.matrix import MatrixTransport
from stack import wait_until
from unit.transports.doubles import TOKEN, answer, scripted
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.settings import Settings
    from followups.transports.port import Transport
    from steps import Steps
    from unit.transports.doubles import Request

OTHERS = """
    INSERT INTO chats (workspace_id, id, external_id)
    SELECT :workspace_id, gen_random_uuid(), '!' || n || '.example.org' FROM generate_series(1, :count) AS n
"""


@pytest.fixture
def matrix(settings: Settings) -> Settings:
    """Return the settings after a change of the transport to ``matrix``."""
    return settings.model_copy(update={"transport": "matrix", "transport_secret": SecretStr(TOKEN)})


@pytest.fixture
def other(engine: Engine) -> World:
    """Return another workspace."""
    return World(engine)


@pytest.fixture
def room() -> str:
    """Return the id of a Matrix room."""
    return f"!{uuid4()}:example.org"


def marked(steps: Steps, settings: Settings) -> dict[UUID, bool]:
    """Claim and begin due follow-ups; return for each whether its room is marked as shared."""
    begun = steps.begin(steps.claim(settings).leases, settings).begun
    return {one.lease.id: one.delivery.external_chat_id_is_shared for one in begun}


async def delivered(
    world: World, settings: Settings, make: Callable[[Settings], Transport], database_url: str, reply: bytes
) -> list[Request]:
    """Deliver the due follow-ups to a server that responds with ``reply``; return the requests."""
    async with scripted(reply) as server:
        settings = settings.model_copy(update={"transport_url": server.url})
        pipeline = Pipeline(settings, make_async_engine(database_url, options=ONCE_PLANNED), make(settings))
        pipeline.start()
        pipeline.submit(claim(world.engine, settings).leases)
        await asyncio.to_thread(wait_until, lambda: not any(row.status == "pending" for row in world.rows()))
        assert await asyncio.to_thread(pipeline.drain, timedelta(seconds=10)) == 0
        return server.requests


async def test_nothing_is_sent_into_a_shared_room(
    world: World, other: World, matrix: Settings, database_url: str, room: str
) -> None:
    """After the change to ``matrix``, follow-ups for a room are rejected if workspaces share it.

    Follow-ups of other chats are sent.
    """
    shared = [each.follow_up(each.chat(external_id=room)) for each in (world, other)]
    own = world.follow_up(world.chat(external_id="!own:example.org"))
    (request,) = await delivered(world, matrix, MatrixTransport, database_url, answer(200, b'{"event_id": "$1"}'))
    assert request.target.endswith(str(own))
    assert world.row(own).status == "sent"
    for follow_up in shared:
        row = world.row(follow_up)
        said = "rejected: another workspace has a chat with the same Matrix room"
        assert (row.status, row.reason) == ("failed", said)


async def test_the_same_chat_id_in_two_workspaces(
    world: World, other: World, settings: Settings, database_url: str
) -> None:
    """The body of each request has the workspace, the channel and the external id of the follow-up's own chat."""
    chat_id = uuid4()
    expected = set()
    for each, channel, external_id in ((world, "whatsapp", "+1"), (other, "instagram", "@2")):
        each.chat(id=chat_id, channel=channel, external_id=external_id, last_user_message_at=text("now()"))
        follow_up = each.follow_up(chat_id)
        expected.add((str(follow_up), str(each.workspace_id), channel, str(chat_id), external_id))
    requests = await delivered(world, settings, HttpTransport, database_url, answer(200))
    bodies = [json.loads(request.body) for request in requests]
    names = ("followUpId", "workspaceId", "channel", "chatId", "externalChatId")
    assert sorted(tuple(body[name] for name in names) for body in bodies) == sorted(expected)


def test_a_room_of_one_workspace(world: World, other: World, matrix: Settings, steps: Steps, room: str) -> None:
    """Several chats of one workspace may have the same room, and chats without a room share nothing."""
    ids = [world.follow_up(world.chat(external_id=room)) for _ in range(2)]
    ids += [each.follow_up(each.chat()) for each in (world, other)]
    assert marked(steps, matrix) == dict.fromkeys(ids, False)


def test_a_removed_chat_shares_no_room(world: World, other: World, matrix: Settings, steps: Steps, room: str) -> None:
    """Once the other workspace's chat is removed, follow-ups are sent into the room."""
    follow_up = world.follow_up(world.chat(external_id=room))
    other.chat(external_id=room, removed_at=text("now()"))
    assert marked(steps, matrix) == {follow_up: False}


def test_other_transports(world: World, other: World, settings: Settings, steps: Steps, room: str) -> None:
    """Under another transport, whose requests name the workspace, several workspaces may use the same external id."""
    ids = [each.follow_up(each.chat(external_id=room)) for each in (world, other)]
    assert marked(steps, settings) == dict.fromkeys(ids, False)


def test_a_chat_that_moves_into_a_room(world: World, other: World, matrix: Settings, steps: Steps, room: str) -> None:
    """If a chat gets another workspace's room after its follow-up was claimed, the follow-up is still rejected."""
    other.chat(external_id=room)
    chat = world.chat(external_id="!own:example.org")
    follow_up = world.follow_up(chat)
    leases = steps.claim(matrix).leases
    world.sql("UPDATE chats SET external_id = :room WHERE id = :id", room=room, id=chat)
    (begun,) = steps.begin(leases, matrix).begun
    assert (begun.lease.id, begun.delivery.external_chat_id_is_shared) == (follow_up, True)


@pytest.mark.parametrize("others", [0, 20_000])
def test_the_check_looks_up_each_room(
    world: World, other: World, matrix: Settings, steps: Steps, room: str, others: int
) -> None:
    """The check looks up each room in the index, even if its plan was made while there were few chats."""
    for each in (world, other):
        each.sql(OTHERS, workspace_id=each.workspace_id, count=others)
        each.follow_up(each.chat(external_id=room))
    with steps.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) chats"))
    seen: list[str] = []

    def record(statement: str, _: object) -> str:
        if "own.external_id" in statement:
            seen.append(statement)
        return statement

    with intercepted(steps.engine, record):
        assert set(marked(steps, matrix).values()) == {True}
    (statement,) = seen
    numbered = statement.replace("%(workspace_ids)s", "$1").replace("%(external_ids)s", "$2")
    with steps.engine.connect() as connection:
        lines = connection.exec_driver_sql(f"EXPLAIN (GENERIC_PLAN, COSTS OFF) {numbered}").scalars().all()
    assert [line.strip() for line in lines][-3:-1] == [
        "->  Index Scan using ix_chats_external_id on chats c",
        "Index Cond: (external_id = own.external_id)",
    ]
