"""Runs PostgreSQL, Valkey and our own processes on this machine, without any installed service.

The embedded processes are used by `followups up`, `followups demo` and the tests. Every process started here is a child
of the owner process, in a separate session. Ctrl-C therefore reaches only the owner process, which then stops its
children in order. Each child is stopped at the end of the owner's ``with`` block. If the owner is killed, a small
`watchdog` process stops the children and removes temporary directories.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from followups.embedded.child import Child, Command, EmbeddedError
from followups.embedded.directories import memory_directory
from followups.embedded.processes import Processes, answers, free_port

if TYPE_CHECKING:
    from followups.embedded.postgres import EmbeddedPostgres
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

SERVERS = {"EmbeddedPostgres": "followups.embedded.postgres", "EmbeddedValkey": "followups.embedded.valkey"}
"""Names in this package that cannot be used without the extra `embedded`."""


def __getattr__(name: str) -> object:
    """Import a server's class lazily, when it is first used."""
    if name not in SERVERS:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(SERVERS[name]), name)
