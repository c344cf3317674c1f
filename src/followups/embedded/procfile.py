"""The command line of each process, as in the Procfile; a test compares the two."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

COMMANDS = {
    "web": "python -m followups.api",  # web comes first, so that it gets a Procfile runner's base port
    # Under honcho each worker needs a distinct name. Elsewhere, a host usually runs only one worker.
    "worker": (
        "celery -A followups.worker --quiet worker --loglevel=warning --hostname=${HONCHO_PROCESS_NAME:-worker}@%h"
        " --without-mingle --without-gossip"
    ),
    "beat": "celery -A followups.worker --quiet beat --loglevel=warning",
    # Flower shows and stops tasks, so on any address except the loopback address it requires a password
    # (`followups.worker.flower`).
    "flower": ("celery -A followups.worker flower --loglevel=warning --address=${FLOWER_ADDRESS:-127.0.0.1}"),
    "release": "followups migrate",
}
"""Shell commands by process type, in a form that every Procfile runner accepts."""


def argv(process: str, *more: str) -> list[str]:
    """Return the arguments that start a process as the Procfile does, followed by ``more``.

    The caller must run these arguments with the PATH of `search_path`.
    """
    return ["/bin/sh", "-c", f'exec {COMMANDS[process]} "$@"', process, *more]


def search_path() -> str:
    """Return a PATH in which this installation's commands precede all others."""
    own = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    return os.pathsep.join([*dict.fromkeys(own), os.environ.get("PATH", os.defpath)])
