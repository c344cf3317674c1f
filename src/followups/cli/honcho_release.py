"""The Procfile's ``release`` under ``honcho start``: a process that must not end.

Honcho stops every process as soon as one ends, so a finished release would take web, worker and beat with it. Started
together with them, it stays until they are stopped. Started alone (``honcho start release``, ``honcho run followups
migrate``, a platform's release phase) it ends normally.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from followups.cli.signals import StopSignals

LOOK = 0.2
"""Seconds between two checks for a stop signal."""

ANCESTORS = 4
"""Between this process and honcho are a shell and honcho's own child."""


def is_started_with_others() -> bool:
    """Return whether honcho started this as `release` in a plain ``honcho start``, which starts every process."""
    is_release = os.environ.get("HONCHO_PROCESS_NAME", "").startswith("release.")
    return is_release and "release" not in _words_of_ancestors()


def stay() -> None:
    """Wait for a stop signal."""
    with StopSignals() as signals, suppress(KeyboardInterrupt):
        while True:
            signals.check()
            time.sleep(LOOK)


def _words_of_ancestors() -> set[str]:
    words, pid = set[str](), os.getppid()
    # Without /proc this cannot be known, and most people start everything.
    with suppress(OSError, IndexError):
        for _ in range(ANCESTORS):
            words.update(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"))
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return words
