"""Audit events in words, for the command line and the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.store.audit import Way

if TYPE_CHECKING:
    from collections.abc import Mapping

    from followups.models import AuditEvent

WAYS = {
    Way.API: "API key",
    Way.COMMAND: "command by",
    Way.CONSOLE: "console,",
    Way.PYTHON: "Python as",
    Way.SERVICE: "service",
}


def actor_of(event: AuditEvent) -> str:
    """Return who did it, and by which means: "API key website", "command by root"."""
    return f"{WAYS[Way(event.way)]} {event.actor or event.actor_id}"


def details_of(details: Mapping[str, object]) -> str:
    """Return the details of an event in one line.

    >>> details_of({"channel": None, "fields": ["dueDate", "message"], "rate": 5})
    'fields dueDate message, rate 5'
    """
    return ", ".join(f"{name} {_shown(value)}" for name, value in details.items() if value is not None)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
