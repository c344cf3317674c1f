"""Flower started with the compose file's command, variables and health check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.manifests import compose
from followups.embedded import free_port
from stack import wait_until

if TYPE_CHECKING:
    from stack import Stack

FLOWER = compose()["services"]["flower"]


def test_flower_starts_and_is_healthy(stack: Stack) -> None:
    """With a password set, Flower listens on all addresses of its container, and its health check passes."""
    port = str(free_port())
    binaries = Path(sys.executable).parent
    words = FLOWER["command"]
    assert FLOWER["environment"]["FLOWER_BASIC_AUTH"].startswith("${FLOWER_BASIC_AUTH:?")
    own = stack.environment() | {"FLOWER_BASIC_AUTH": "me:pa55w0rd", "FLOWER_PORT": port}
    child = stack.processes.spawn("flower", [str(binaries / words[0]), *words[1:]], environment=own)
    check = [str(binaries / "python"), *(word.replace("5555", port) for word in FLOWER["healthcheck"]["test"][2:])]

    def well() -> bool:
        assert child.running, child.tail()
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    wait_until(well, within=60, every=0.5)
