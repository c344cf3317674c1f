"""Finds the descendants of a process in /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from followups.embedded.watchdog import is_alive

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


def descendants(pid: int) -> dict[int, str]:
    """Return the current descendants of a process, with their command lines."""
    parents, commands = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            commands[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ").strip()
            parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has just ended
            continue
    found, new = dict[int, str](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= {child: commands[child] for child in new}
    return found


def assert_gone(processes: dict[int, str]) -> None:
    """Assert that none of the processes exists any more."""
    assert not {pid: command for pid, command in processes.items() if is_alive(pid)}
