"""The broker's queues by name, separate from the Celery app, which takes a second to import."""

from __future__ import annotations

DISPATCH = "dispatch"
"""Ticks."""
DELIVER = "deliver"
"""Hints: batches of leases."""

CLUSTER = (
    "The broker runs in cluster mode, in which a worker cannot read its two queues at once: "
    "point FOLLOWUPS_BROKER_URL at a Redis or Valkey without cluster mode (cluster-enabled no)."
)
"""The error for a broker in cluster mode, which can never work."""
