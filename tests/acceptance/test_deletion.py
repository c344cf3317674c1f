"""Tests that delete a workspace and a chat during deliveries, and rerun a killed deletion."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

from stack import wait_until

if TYPE_CHECKING:
    from stack import Stack

SECOND = timedelta(seconds=1)


def start(stack: Stack, *arguments: str) -> subprocess.Popen[str]:
    """Start a command on the stack."""
    argv = [sys.executable, "-m", "followups.cli", *arguments]
    return subprocess.Popen(argv, env=stack.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(command: subprocess.Popen[str]) -> str:
    """Wait until a command succeeds; return its output."""
    printed, remarks = command.communicate(timeout=60)
    assert command.returncode == 0, remarks
    return printed


def test_nothing_is_sent_after_a_deletion(stack: Stack) -> None:
    """A deletion waits for attempts in flight, prevents further messages, and affects no other data.

    A deletion that was killed continues when it is run again.
    """
    world = stack.world
    stack.start()
    stack.behave(delay=0.3)
    chats = [world.chat() for _ in range(20)]
    others = type(world)(world.engine)
    of_others = others.burst([SECOND * n / 20 for n in range(40)])
    # For five minutes, four follow-ups fall due per second. Some follow-ups are therefore in flight during each
    # deletion.
    mine = world.follow_ups_at_once(
        [(chat, SECOND * (5 * n + m / 4)) for n in range(60) for m, chat in enumerate(chats)]
    )
    of_one_chat = set(map(str, mine[::20]))
    name = str(world.workspace_id)
    wait_until(lambda: len(stack.received()) > 5)

    finish(start(stack, "chat", "delete", str(chats[0]), "--workspace", name, "--yes"))
    of_the_chat = received(stack, of_one_chat)
    killed = start(stack, "workspace", "delete", name, "--yes")
    begun = "SELECT count(*) FROM audit_events WHERE action = 'workspace.deleted'"
    wait_until(lambda: world.scalar(begun) or killed.poll() is not None, within=60)
    killed.kill()
    killed.communicate()
    if world.scalar("SELECT count(*) FROM workspaces") == 2:
        finish(start(stack, "workspace", "delete", name, "--yes"))
    of_the_workspace = received(stack, set(map(str, mine)))
    time.sleep(1.5)

    assert received(stack, of_one_chat) == of_the_chat
    assert received(stack, set(map(str, mine))) == of_the_workspace
    assert not [one for one, number in of_the_workspace.items() if number > 1]
    assert world.rows(*mine) == []
    assert world.scalar("SELECT count(*) FROM workspaces") == 1
    stack.wait_until_done(*of_others)
    assert {str(one) for one in of_others} == set(received(stack, {str(one) for one in of_others}))


def received(stack: Stack, ids: set[str]) -> Counter[str]:
    """Return how many times the chat server received each follow-up."""
    return Counter(each["followUpId"] for each in stack.received() if each["followUpId"] in ids)
