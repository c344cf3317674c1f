"""Tests of the commands `workspace delete` and `chat delete`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from followups.cli import batches

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    RunCommand = Callable[..., Any]

HOUR = timedelta(hours=1)


def test_a_deleted_workspace_leaves_an_audit_event(run: RunCommand, world: World) -> None:
    """If a workspace is deleted, an audit event keeps the actor and the counts."""
    name = str(world.workspace_id)
    world.follow_up(due=HOUR)
    run("api-key", "create", "--workspace", name)
    assert run("workspace", "delete", name, "--dry-run", "--json").document["matched"] == 1
    ran = run("workspace", "delete", name, "--yes")
    assert (ran.code, ran.stdout.split(";")[0]) == (0, "1 of 1 follow-up deleted")
    assert run("workspace", "list", "--json").document == []
    [event] = run("audit", "--workspace", name, "--json").document
    assert (event["action"], event["workspace"], event["number"]) == ("workspace.deleted", name, 1)
    assert run("workspace", "delete", name, "--yes").code == 2


def test_deleting_a_chat_keeps_other_chats(run: RunCommand, world: World) -> None:
    """Deleting a chat keeps the workspace's other chats; deleting an unknown chat or workspace fails."""
    name, chat = str(world.workspace_id), world.chat()
    gone, kept = world.follow_up(chat, HOUR), world.follow_up(due=HOUR)
    document = run("chat", "delete", chat, "--workspace", name, "--yes", "--json").document
    assert (document["matched"], document["deleted"], document["interrupted"]) == (1, 1, False)
    assert [row.id for row in world.rows()] == [kept]
    assert gone != kept
    assert run("chat", "delete", chat, "--workspace", name, "--yes").code == 2
    assert run("chat", "delete", uuid4(), "--workspace", "nowhere", "--yes").code == 2


def test_an_attempt_that_does_not_end_is_reported(
    run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an attempt stays in flight, the delete command fails and explains how to continue."""
    monkeypatch.setattr(batches, "PATIENCE", timedelta(seconds=-3))
    world.put_in_flight(world.follow_up())
    ran = run("workspace", "delete", world.workspace_id, "--yes")
    assert ran.code == 1
    assert "the delivery of 1 follow-up has not ended" in ran.stderr
    listed = run("workspace", "list").stdout
    assert "being deleted since" in listed
    assert run("pause", "--workspace", world.workspace_id).code == 2
    assert "is being deleted" in run("workspace", "create", world.workspace_id).stderr


def test_without_a_terminal_yes_is_required(run: RunCommand, world: World) -> None:
    """Without a terminal for the confirmation, a delete command deletes nothing."""
    ran = run("workspace", "delete", world.workspace_id)
    assert ran.code == 2
    assert "--yes" in ran.stderr
    assert run("workspace", "list", "--json").document


@pytest.mark.parametrize(("typed", "code"), [("{name}", 0), ("y", 1), ("", 1)])
def test_the_name_must_be_typed(run: RunCommand, world: World, typed: str, code: int) -> None:
    """On a terminal, the workspace's name must be typed to confirm its deletion.

    If anything other than the workspace's name is typed, nothing is deleted.
    """
    name = str(world.workspace_id)
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "followups.cli", "workspace", "delete", name]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asked:
        os.write(main, f"{typed.format(name=name)}\n".encode())
        _, remarks = asked.communicate(timeout=60)
    os.close(terminal)
    os.close(main)
    assert f"Type {name} to delete it" in remarks
    assert asked.returncode == code
    assert len(run("workspace", "list", "--json").document) == code
