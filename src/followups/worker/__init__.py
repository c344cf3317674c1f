"""The worker process: ``celery -A followups.worker worker``, and likewise ``beat`` and ``flower``."""

from __future__ import annotations

from importlib import import_module


def __getattr__(name: str) -> object:
    """Import the Celery app only when needed, because reading a heartbeat does not need Celery."""
    if name != "app":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return import_module("followups.worker.celery_app").app
