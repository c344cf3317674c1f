"""Which commands of Celery's remote control a worker obeys: a client that can write to the broker can send any."""

from __future__ import annotations

from celery.worker.control import Panel

ASKING = frozenset(
    {
        *("ping", "stats", "active", "reserved", "scheduled", "registered", "active_queues", "query_task", "clock"),
        *("revoked", "conf", "report", "signs_of_life"),
        *("dump_active", "dump_reserved", "dump_schedule", "dump_revoked", "dump_tasks"),
        *("enable_events", "heartbeat"),  # which let Flower see a worker
    }
)
"""Commands that only ask: what `celery inspect` and Flower's pages show.

All other commands stop a worker, change it, or write files on its host.
"""

REFUSAL = "this worker takes no such commands: FOLLOWUPS_REMOTE_CONTROL=true allows them"


def restrict() -> None:
    """Refuse all other commands, each with an answer that says so."""
    for name in Panel.data.keys() - ASKING:
        Panel.data[name] = _refuse


def _refuse(*_: object, **__: object) -> dict[str, str]:
    return {"error": REFUSAL}
