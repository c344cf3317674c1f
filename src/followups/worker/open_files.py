"""The limit on a worker's open files.

Without a free file descriptor, a worker cannot open connections, and the calls that need one are snoozed. Many systems
allow 1,024 open files by default, but let a process raise its own limit.
"""

from __future__ import annotations

import resource
from contextlib import suppress

from followups.telemetry.logs import get_logger

FILES_OF_A_CALL = 2
"""A call's connection, and an old connection that may still be closing."""
OTHER_FILES = 300
"""Ample for the connections to the database and the broker, and all other files. A worker without calls has about 35
open files.
"""

log = get_logger(__name__)


def raise_limit(concurrency: int) -> None:
    """Raise this process's limit on open files to what ``concurrency`` simultaneous calls need.

    Log a warning if the system does not allow this.
    """
    needed = FILES_OF_A_CALL * concurrency + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _reaches(soft, needed):
        return
    limit = needed if _reaches(hard, needed) else hard
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    if soft < needed:
        advice = "raise the hard limit (LimitNOFILE, ulimit -Hn), or lower CONCURRENCY"
        log.warning("too_few_open_files", limit=soft, needed=needed, advice=advice)


def _reaches(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
