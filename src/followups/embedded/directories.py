"""Temporary directories that are removed even if this process is killed.

Other users can be allowed to enter these directories without listing them.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

from followups.embedded.watchdog import WATCHDOG

LONGEST_PARENT = 60
"""Longest path of the parent directory, in characters. A Unix socket's path is limited to 103 bytes on macOS and 107 on
Linux.
"""

MEMORY_WANTED = 4 * 1024**3
"""An in-memory file system is used only if it has this much free space, in bytes. PostgreSQL's write-ahead log alone
may need one gigabyte.
"""


def make_temporary_directory(parent: Path | None = None) -> Path:
    """Create a private directory in ``parent``, or in a temporary directory if ``parent`` is None.

    The default temporary directory is used if the paths of sockets in it are short enough; otherwise, ``/tmp`` is used.
    """
    usual = tempfile.gettempdir()
    where = parent or (usual if len(usual) <= LONGEST_PARENT else "/tmp")  # noqa: S108 - mkdtemp makes it private
    path = Path(tempfile.mkdtemp(prefix="followups-", dir=where))
    WATCHDOG.guard_directory(path)
    return path


def memory_directory() -> Path | None:
    """Return an in-memory file system with room for a few databases, or None.

    By default, a container's in-memory file system has only 64 MB.
    """
    memory = Path("/dev/shm")  # noqa: S108 - make_temporary_directory makes a private one in it
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= MEMORY_WANTED else None


def remove_directory(path: Path) -> None:
    """Remove a directory that `make_temporary_directory` has created."""
    shutil.rmtree(path)
    WATCHDOG.release(path)


def let_through(directory: Path) -> None:
    """Allow all users to enter a directory of `make_temporary_directory`, but not to list it."""
    directory.chmod(0o711)


def closed_above(path: Path, user: int) -> Path | None:
    """Return the topmost parent directory that the user may not enter, or None."""
    for directory in reversed(path.resolve().parents):
        found = directory.stat()
        if not found.st_mode & (stat.S_IXUSR if found.st_uid == user else stat.S_IXOTH):
            return directory
    return None
