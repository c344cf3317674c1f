"""Deletion of a workspace and a chat beside running deliveries, killed in the middle and run again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from uuid import UUID

    from stack import Stack

SECOND = timedelta(seconds=1)


def start(stack: Stack, *arguments: str) -> subprocess.Popen[str]:
    """Start a command on the stack."""
    argv = [sys.executable, "-m", "followups.cli", *arguments]
    return subprocess.Popen(argv, env=stack.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(command: subprocess.Popen[str]) -> str:
    """Wait for a command's success; return what it printed."""
    printed, remarks = command.communicate(timeout=60)
    assert command.returncode == 0, remarks
    return printed


@pytest.mark.parametrize("what", ["workspace", "chat"])
def test_nothing_is_sent_after_a_deletion(stack: Stack, what: str) -> None:
    """What is in flight ends first; once the command returns nothing more of it is sent; others are not affected."""
    world = stack.world
    stack.start()
    stack.behave(delay=0.3)
    chats = [world.chat() for _ in range(20)]
    others = type(world)(world.engine)
    of_others = others.burst([SECOND * n / 20 for n in range(40)])
    mine = world.follow_ups_at_once([(chat, SECOND * n / 5) for n in range(20) for chat in chats])
    name = str(world.workspace_id)
    command = (
        ["workspace", "delete", name] if what == "workspace" else ["chat", "delete", str(chats[0]), "--workspace", name]
    )
    wait_until(lambda: len(stack.received()) > 20)

    begun = "SELECT count(*) FROM audit_events WHERE action LIKE '%.deleted'"
    killed = start(stack, *command, "--yes")
    wait_until(lambda: world.scalar(begun) or killed.poll() is not None, within=60)
    killed.kill()
    killed.communicate()
    again = start(stack, *command, "--yes")
    if what == "workspace" and not left(stack, what, chats[0]):
        again.communicate(timeout=60)  # the first one was done before it was killed
    else:
        finish(again)
    gone = left(stack, what, chats[0])
    received = Counter(each["followUpId"] for each in stack.received())
    time.sleep(1.5)
    after = Counter(each["followUpId"] for each in stack.received())
    kept = {str(one.id) for one in world.rows(*mine)}

    assert gone == 0
    deleted = {str(one) for one in mine} - kept
    assert {one: after[one] for one in deleted} == {one: received[one] for one in deleted}
    assert not [one for one, number in after.items() if number > 1]
    assert len(deleted) == (len(mine) if what == "workspace" else 20)
    stack.wait_until_done()
    assert {str(one) for one in of_others} <= set(stack.accepted())
    assert {row.status for row in world.rows(*mine)} <= {"sent"}


def left(stack: Stack, what: str, chat: UUID) -> int:
    """Return whether the workspace or chat is still there."""
    number: int = (
        stack.world.scalar(f"SELECT count(*) FROM workspaces WHERE id = '{stack.world.workspace_id}'")  # noqa: S608
        if what == "workspace"
        else stack.world.scalar(f"SELECT count(*) FROM chats WHERE id = '{chat}'")  # noqa: S608
    )
    return number
