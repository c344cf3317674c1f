"""The broker's queues, by name; apart from the Celery app, which takes a second to load."""

from __future__ import annotations

DISPATCH = "dispatch"
"""Ticks."""
DELIVER = "deliver"
"""Hints: batches of leases."""
