"""Tests that the systemd units' commands deliver a follow-up and stop on SIGTERM."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import web
from databases import OWNER, url_as
from deploy.manifests import PREFIX, unit
from followups.embedded import answers, free_port
from followups.schema import downgrade
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from followups.embedded import Child
    from stack import Stack

LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Python code that applies MemoryDenyWriteExecute= and then runs the command.

The code uses PR_SET_MDWE, which is available since Linux 6.3.
"""


def start(stack: Stack, name: str, **variables: str) -> Child:
    """Start a unit's command, with variables and specifiers replaced as systemd does."""
    (line,) = unit(name)["ExecStart"]
    for variable, value in variables.items():
        line = line.replace(f"${{{variable}}}", value)
    words = [word.replace("%%", "%").replace("%i", "1") for word in shlex.split(line)]
    command = words[0].replace(PREFIX, f"{Path(sys.executable).parent}{os.sep}")
    argv = [sys.executable, "-c", LAUNCH, command, *words[1:]]
    return stack.processes.spawn(name.partition(".")[0], argv, environment=stack.environment() | variables)


def test_the_units_deliver(stack: Stack) -> None:
    """A follow-up is scheduled through `web`, sent after a tick of beat, and shown in Flower.

    Each process exits within its unit's `TimeoutStopSec` when it is stopped.
    """
    owner = url_as(stack.settings.database_url.get_secret_value(), OWNER)
    downgrade(owner, "base")
    migrating = start(stack, "followups-migrate.service", FOLLOWUPS_DATABASE_URL=owner)
    wait_until(lambda: not migrating.running, within=60)
    assert migrating.exit_code == 0, migrating.tail()
    port, flower_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    lasting = {
        "followups-web.service": start(stack, "followups-web.service", PORT=str(port)),
        "followups-worker@.service": start(stack, "followups-worker@.service"),
        "followups-beat.service": start(stack, "followups-beat.service"),
        "followups-flower.service": start(stack, "followups-flower.service", FLOWER_PORT=str(flower_port)),
    }
    stack.sandbox()
    wait_until(answers(f"{url}/readyz"), within=90)
    api = web.Api(url, World(stack.world.engine))  # the workspace was dropped together with the schema
    created = api.create(due=web.in_days(0))
    wait_until(lambda: stack.accepted(created["id"]), within=60)
    api.client.close()
    wait_until(lambda: shows(f"http://127.0.0.1:{flower_port}/workers", "worker.1@"), within=60)

    for name, child in lasting.items():
        assert child.running, child.tail()
        ended_within(child, float(unit(name)["TimeoutStopSec"][-1]))


def shows(url: str, words: str) -> bool:
    """Return whether the web page responds and contains these words."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:  # noqa: S310 - our own loopback URL
            return words in page.read().decode()
    except OSError:
        return False


def ended_within(child: Child, seconds: float) -> None:
    """Stop a process, and check that it exits successfully within ``seconds``."""
    asked = time.monotonic()
    child.ask()
    wait_until(lambda: not child.running, within=seconds)
    assert time.monotonic() - asked < seconds
    assert child.exit_code in {0, -signal.SIGTERM}, child.tail()
