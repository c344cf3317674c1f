"""Celery's remote control commands that a worker accepts.

Any client that can write to the broker can send such commands.
"""

from __future__ import annotations

from celery.worker.control import Panel

ASKING = frozenset(
    {
        *("ping", "stats", "active", "reserved", "scheduled", "registered", "active_queues", "query_task", "clock"),
        *("revoked", "conf", "report", "signs_of_life"),
        *("dump_active", "dump_reserved", "dump_schedule", "dump_revoked", "dump_tasks"),
        *("enable_events", "heartbeat"),  # Flower needs these commands to show a worker
    }
)
"""Read-only commands, whose results `celery inspect` and Flower's pages show.

Any other command stops a worker, changes it, or writes files on its host.
"""

REFUSAL = "this worker takes no such commands: FOLLOWUPS_REMOTE_CONTROL=true allows them"


def restrict() -> None:
    """Reject with an error every remote control command that is not read-only."""
    for name in Panel.data.keys() - ASKING:
        Panel.data[name] = _refuse


def _refuse(*_: object, **__: object) -> dict[str, str]:
    return {"error": REFUSAL}
