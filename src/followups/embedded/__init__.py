"""PostgreSQL, Valkey and our own processes, run on this machine without any installed service.

For `followups up`, `followups demo` and the tests. Everything started here is a child of this process, in a
session of its own (so that Ctrl-C reaches only the owner, which then stops the others in order), and is
stopped by the owner's ``with`` block. Should the owner end without that, killed or not, a small `watchdog`
stops what is left and removes the temporary directories.
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
