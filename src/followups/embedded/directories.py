"""Temporary directories that go even when this process is killed, and paths that another user may pass."""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

from followups.embedded.watchdog import WATCHDOG

LONGEST_PARENT = 60
"""Characters. A Unix socket's path may have 103 bytes on macOS and 107 on Linux, and some come after this."""

MEMORY_WANTED = 4 * 1024**3
"""Bytes. PostgreSQL's log alone may take one gigabyte before it is written over."""


def make_temporary_directory(parent: Path | None = None) -> Path:
    """Make a private directory in ``parent``, or where temporary files go if a socket's path fits there."""
    usual = tempfile.gettempdir()
    where = parent or (usual if len(usual) <= LONGEST_PARENT else "/tmp")  # noqa: S108 - mkdtemp makes it private
    path = Path(tempfile.mkdtemp(prefix="followups-", dir=where))
    WATCHDOG.guard_directory(path)
    return path


def memory_directory() -> Path | None:
    """Return a file system in memory with room for a few databases, if there is one (a container's has 64 MB)."""
    memory = Path("/dev/shm")  # noqa: S108 - make_temporary_directory makes a private one in it
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= MEMORY_WANTED else None


def remove_directory(path: Path) -> None:
    """Remove what `make_temporary_directory` made."""
    shutil.rmtree(path)
    WATCHDOG.release(path)


def let_through(path: Path) -> None:
    """Let every user pass (not list) the directories above the path, where they don't already."""
    for directory in path.resolve().parents:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if not mode & stat.S_IXOTH:
            directory.chmod(mode | stat.S_IXOTH)
