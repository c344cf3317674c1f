"""SQL that several statements share: about a follow-up ``f``, its chat ``c``, and a batch ``b`` of leases.

Each is looked up by its key, LATERAL, whatever the planner believes about the table: right after a burst of inserts its
statistics are wrong, and it would rather read every pending row than look up a hundred keys.
"""

from __future__ import annotations

import re
from importlib.resources import files

from followups.channels import WINDOWED_CHANNELS
from followups.states import MAX_REASON_LENGTH, ReasonCode


def read_sql(name: str) -> str:
    """Return the text of a ``.sql`` file of this package, without its comments, which are for its readers."""
    return re.sub(r"\s*--.*", "", files("followups.store").joinpath(f"{name}.sql").read_text(encoding="utf-8"))


DUE = "COALESCE(f.next_attempt_at, f.due_date)"
"""When it falls due: the time of its retry, or its due date."""

DUE_READ = f"LEAST(GREATEST({DUE}, timestamptz '0002-01-01'), timestamptz '9998-12-31')"
"""The due time within Python's range. A time beyond that range, written by hand, would make the whole result
unreadable.
"""

LATENESS_FROM = "COALESCE(f.sendable_from, GREATEST(f.due_date, f.scheduled_at, f.held_until))"
"""When lateness starts to count. A follow-up that sending hours never held has no ``sendable_from``; one held by a
process of an older version has only ``held_until``.
"""

WINDOWED = ", ".join(f"'{channel.value}'" for channel in sorted(WINDOWED_CHANNELS))
"""The channels with a messaging window, as a list."""

OPEN = "f.finished_at IS NULL"
"""Whether it is pending (a CHECK constraint makes the two equivalent), for look-ups by id. In this form the planner
does not use the partial indexes of pending rows. They hold the id last, and one that was vacuumed while nothing was
pending counts as empty and seems cheaper than the primary key; it is then read to its end for each row. Measured after
50,000 inserts: begin and settle of forty took up to 720 ms each, and now 4.
"""

NEXT_TOKEN = "GREATEST(f.lease_token + 1, CAST(date_part('epoch', now()) * 1000000 AS bigint))"  # noqa: S105 - a fencing token
"""The next fencing token: it grows, and none is issued twice. A failover or a restore may lose a lease, and the next
lease must not get the same token. So the token is the database's time in microseconds; until the year 2255 it is below
2^53, which JSON readers keep exactly.
"""

LOOKED_UP = f"""
        SELECT f.* FROM follow_ups f
         WHERE f.id = b.id AND f.lease_token = b.token
           AND {OPEN} AND f.begun_at IS NULL AND f.lease_until > now()
"""  # noqa: S608 - no input, only the constant above
"""A follow-up whose lease is valid and that has not begun."""

LEASED = f"CROSS JOIN LATERAL ({LOOKED_UP} FOR NO KEY UPDATE SKIP LOCKED) f"
"""The same, locked; rows that another transaction has locked are skipped."""

# OFFSET 0: a plan made while chats counted as empty scanned all of them and locked the batch again for each; with 1,650
# chats a hundred took more than 8 s to begin.
CHAT = """CROSS JOIN LATERAL (
             SELECT c.* FROM chats c WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id OFFSET 0
         ) c"""
"""Its chat."""

OUTCOME_UNKNOWN = "the outcome of an attempt is unknown"
"""Added to a reason. A follow-up with such an attempt is tried again under the same key, and mostly ends as sent. If it
ends otherwise (a reply, a refusal, the last attempt), its reason would be wrong without this.
"""


def honest(reason: str, row: str) -> str:
    """Return SQL for the reason (SQL too) of an ending row, with `OUTCOME_UNKNOWN` added if it applies."""
    return f"""
        CASE WHEN {reason} IS NOT NULL AND {reason} NOT LIKE '{ReasonCode.OUTCOME_UNKNOWN}%'
              AND {reason} NOT LIKE '%the outcome of % is unknown%'
              AND EXISTS (SELECT FROM failed_attempts a
                           WHERE a.follow_up_id = {row}.id AND a.outcome IN ('unknown', 'lost'))
             THEN left({reason} || CASE WHEN strpos({reason}, ':') = 0 THEN ': ' ELSE '; ' END || '{OUTCOME_UNKNOWN}',
                       {MAX_REASON_LENGTH})
             ELSE {reason} END
    """
