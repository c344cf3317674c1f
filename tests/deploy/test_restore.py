"""Tests of a restore: messages sent after the backup are sent again, with the same keys.

Messages sent before the backup are not sent again.
"""

from __future__ import annotations

import subprocess
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from conftest import brisk_settings
from databases import OWNER, SUPERUSER, create_database, drop_database, url_as, url_of
from deploy.manifests import DEPLOY
from followups.database import make_engine
from followups.embedded.postgres import BINARIES
from followups.session_settings import BY_KEY
from stack import Stack, wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Engine


@pytest.fixture
def restored(postgres_url: str) -> Iterator[tuple[str, Engine]]:
    """Return the URL and an engine of an empty database, into which a test restores."""
    name = f"test_restored_{uuid4().hex}"
    create_database(postgres_url, name)
    run("psql", "--quiet", "--file", str(DEPLOY / "grants.sql"), url_of(postgres_url, name, SUPERUSER))
    engine = make_engine(url_of(postgres_url, name), options=BY_KEY)
    yield url_of(postgres_url, name), engine
    engine.dispose()
    drop_database(postgres_url, name)


def test_messages_sent_again_after_a_restore_are_recognised(
    stack: Stack, restored: tuple[str, Engine], tmp_path: Path
) -> None:
    """The chat server recognises messages that are sent again after a restore.

    Cancellations made since the backup was taken are lost.
    """
    url, engine = restored
    dump = str(tmp_path / "followups.dump")
    before = stack.world.follow_up()
    stack.start()
    stack.wait_until_done(before)
    stop_sending(stack)
    after, cancelled = stack.world.follow_up(), stack.world.follow_up(due=timedelta(days=1))
    run("pg_dump", "--format=custom", "--file", dump, stack.settings.database_url.get_secret_value())
    late = stack.world.follow_up(due=timedelta(days=1))
    stack.world.sql(
        "UPDATE follow_ups SET status = 'cancelled', reason = 'user_replied', finished_at = now() WHERE id = :id",
        id=cancelled,
    )
    start_sending(stack)
    stack.wait_until_done(after)
    stop_sending(stack)

    run("pg_restore", "--no-owner", "--no-acl", "--exit-on-error", "--dbname", url_as(url, OWNER), dump)
    settings = brisk_settings(url, stack.settings.broker_url.get_secret_value())
    again = Stack(settings, World(engine), stack.processes, stack.sandbox_port)
    start_sending(again)
    again.wait_until_done(after)
    requests = {id_: [one for one in again.received() if one["followUpId"] == str(id_)] for id_ in (before, after)}
    assert len(requests[before]) == 1
    assert [one["duplicate"] for one in requests[after]] == [False, True]
    assert {one["idempotencyKey"] for one in requests[after]} == {str(after)}
    assert {row.id: row.status for row in again.world.rows()} == {before: "sent", after: "sent", cancelled: "pending"}
    assert late not in {row.id for row in again.world.rows()}


def start_sending(stack: Stack) -> None:
    """Start a beat and a worker with unique names."""
    stack.beat(f"beat-{uuid4().hex}")
    stack.worker(f"worker-{uuid4().hex}")


def stop_sending(stack: Stack) -> None:
    """Stop all beats and workers but keep the chat server running."""
    for child in [child for child in stack.processes.children if child.command.name != "sandbox"]:
        child.ask()
        wait_until(lambda child=child: not child.running)


def run(program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's own programs."""
    subprocess.run([BINARIES / program, *arguments], check=True, capture_output=True)
