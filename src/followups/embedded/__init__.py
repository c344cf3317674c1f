"""PostgreSQL, Valkey and our own processes, run on this machine without any installed service.

They serve `followups up`, `followups demo` and the tests. Everything started here is a child of this process, in a
session of its own, so that Ctrl-C reaches only the owner, which then stops the others in order. The owner's ``with``
block stops each of them. If the owner ends without that, killed or not, a small `watchdog` stops the remaining
processes and removes the temporary directories.
"""

from __future__ import annotations

from followups.embedded.child import Child, Command, EmbeddedError
from followups.embedded.directories import memory_directory
from followups.embedded.postgres import EmbeddedPostgres
from followups.embedded.processes import Processes, answers, free_port
from followups.embedded.valkey import EmbeddedValkey

__all__ = [
    "Child",
    "Command",
    "EmbeddedError",
    "EmbeddedPostgres",
    "EmbeddedValkey",
    "Processes",
    "answers",
    "free_port",
    "memory_directory",
]
