"""The command line of each process: the Procfile holds the same lines (a test compares them)."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

COMMANDS = {
    "web": "python -m followups.api",  # the first, so that it gets a runner's base port
    # Started by honcho, each has a name of its own; elsewhere one worker a host is the rule.
    "worker": (
        "celery -A followups.worker --quiet worker --loglevel=warning --hostname=${HONCHO_PROCESS_NAME:-worker}@%h"
        " --without-mingle --without-gossip"
    ),
    "beat": "celery -A followups.worker --quiet beat --loglevel=warning",
    # Flower shows and stops tasks: on any other address it asks for a password (`followups.flower_guard`).
    "flower": (
        "celery -A followups.worker flower --loglevel=warning"
        " --address=${FLOWER_ADDRESS:-127.0.0.1} --port=${FLOWER_PORT:-5555}"
    ),
    "release": "followups migrate",
}
"""By process type. Shell syntax, as every Procfile runner takes it."""


def argv(process: str, *more: str) -> list[str]:
    """Return what starts a process as the Procfile does, with ``more`` arguments; run it with `search_path`."""
    return ["/bin/sh", "-c", f'exec {COMMANDS[process]} "$@"', process, *more]


def search_path() -> str:
    """Return a PATH on which the commands of this very installation come first."""
    own = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    return os.pathsep.join([*dict.fromkeys(own), os.environ.get("PATH", os.defpath)])
