"""Tests of processes on a read-only root file system without a temporary directory.

The directory of the heartbeat files is read-only as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from stack import CELERY

if TYPE_CHECKING:
    from stack import Stack

UNSHARE = (shutil.which("unshare") or "unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
READ_ONLY = """
for directory in / /tmp /var/tmp /dev/shm; do
    { [ $directory = / ] || mount --bind $directory $directory; } && mount -o remount,bind,ro $directory || exit 77
    if [ -w $directory ]; then exit 77; fi
done
cd / && exec "$@"
"""
"""Shell script for a mount namespace: it makes these directories read-only and runs a command."""


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    """Skip the test if this machine does not allow mount namespaces."""
    ran = subprocess.run([*UNSHARE, "sh", "-c", READ_ONLY, "sh", "true"], capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"a mount namespace cannot be made: {ran.stderr.strip()}")


def test_worker_and_beat_write_no_file(stack: Stack) -> None:
    """Without a writable disk, worker and beat send follow-ups and log that no heartbeat is written."""
    environment = stack.environment() | {"FOLLOWUPS_RUNTIME_DIR": "/run/followups", "HOME": "/", "TMPDIR": ""}
    for name in ("beat", "worker"):
        command = [*UNSHARE, "sh", "-c", READ_ONLY, "sh", *CELERY, name, "--loglevel=info"]
        stack.processes.spawn(name, command, environment=environment)
    stack.sandbox()
    stack.wait_until_done(stack.world.follow_up(), within=60)
    assert [stack.log_events("no_heartbeat", name) != [] for name in ("beat", "worker")] == [True, True]
