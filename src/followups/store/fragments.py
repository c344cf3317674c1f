"""SQL fragments that several statements share.

``f`` stands for a follow-up, ``c`` for its chat, and ``b`` for a batch of leases. A LATERAL join looks up each
follow-up by its key. After a burst of inserts, the planner's statistics are wrong. Without LATERAL, the planner might
read every pending row instead of a hundred.
"""

from __future__ import annotations

import re
from importlib.resources import files

from followups.channels import WINDOWED_CHANNELS
from followups.states import MAX_REASON_LENGTH, ReasonCode


def read_sql(name: str) -> str:
    """Return the text of a ``.sql`` file of this package without its comments."""
    return re.sub(r"\s*--.*", "", files("followups.store").joinpath(f"{name}.sql").read_text(encoding="utf-8"))


DUE = "COALESCE(f.next_attempt_at, f.due_date)"
"""The time at which a follow-up falls due: the time of its next retry, or its due date."""

DUE_READ = f"LEAST(GREATEST({DUE}, timestamptz '0002-01-01'), timestamptz '9998-12-31')"
"""The due time, limited to the range of Python's dates. Some dates that PostgreSQL allows are outside this range."""

LATENESS_FROM = "COALESCE(f.sendable_from, GREATEST(f.due_date, f.scheduled_at, f.held_until))"
"""The time from which the lateness of a follow-up is measured. A follow-up that was never held by sending hours has no
``sendable_from``. Older versions set only ``held_until`` when they hold a follow-up.
"""

WINDOWED = ", ".join(f"'{channel.value}'" for channel in sorted(WINDOWED_CHANNELS))
"""An SQL list of the channels that have a messaging window."""

ENDS_AT = f"""
    LEAST(CASE WHEN CAST(:max_lateness AS interval) > interval '0'
               THEN {LATENESS_FROM} + CAST(:max_lateness AS interval) END,
          CASE WHEN c.channel IN ({WINDOWED})
               THEN COALESCE(c.last_user_message_at + CAST(:window AS interval), now()) END)
"""
"""When follow-up ``f`` of chat ``c`` can no longer be sent: the end of the allowed lateness or of the messaging window,
or NULL if there is neither.
"""

OPEN = "f.finished_at IS NULL"
"""SQL condition for pending follow-ups, for queries that search by id. A CHECK constraint makes this condition
equivalent to a check of the status. This form of the condition keeps the planner from using the partial indexes of
pending rows. In the partial indexes, the id is only the last column. After a vacuum that finds no pending row, the
planner believes that the partial indexes of pending rows are empty. The planner then chooses the index that seems
empty, instead of the primary key. A look-up by id in a partial index scans the whole index. After 50,000 inserts, begin
or settle of forty follow-ups took up to 720 ms without this condition. With the condition, begin or settle took 4 ms.
"""

NEXT_TOKEN = "GREATEST(f.lease_token + 1, CAST(date_part('epoch', now()) * 1000000 AS bigint))"  # noqa: S105 - a fencing token
"""SQL for the next fencing token, which is higher than all earlier ones. A token is never issued again, even if a
failover or restore loses the lease. The value of a token is therefore the database's time in microseconds. Until the
year 2255, a token is below 2^53, so JSON readers represent it exactly.
"""

LOOKED_UP = f"""
        SELECT f.* FROM follow_ups f
         WHERE f.id = b.id AND f.lease_token = b.token
           AND {OPEN} AND f.begun_at IS NULL AND f.lease_until > now()
"""  # noqa: S608 - no input, only the constant above
"""SQL that looks up the follow-up of each valid lease for which no attempt has begun."""

LEASED = f"CROSS JOIN LATERAL ({LOOKED_UP} FOR NO KEY UPDATE SKIP LOCKED) f"
"""SQL that locks the rows found by `LOOKED_UP`, but skips rows that other transactions have locked."""

# OFFSET 0 makes the planner look up the chat for each row. With a plan made for an empty table of chats, the query
# locked the whole batch once per chat. With 1,650 chats and without OFFSET 0, beginning a hundred follow-ups took more
# than 8 s.
CHAT = """CROSS JOIN LATERAL (
             SELECT c.* FROM chats c WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id OFFSET 0
         ) c"""
"""SQL that looks up the chat of each follow-up."""

OUTCOME_UNKNOWN = "the outcome of an attempt is unknown"
"""The text added to a reason if the outcome of an attempt was unknown. If an outcome is unknown, the follow-up is
retried under the same key and usually ends as sent. Without this text, the reason would hide that the message may have
been accepted.
"""


def honest(reason: str, row: str) -> str:
    """Return SQL for the reason of a follow-up that ends, with `OUTCOME_UNKNOWN` added if it applies.

    ``reason`` must be an SQL expression.
    """
    return f"""
        CASE WHEN {reason} IS NOT NULL AND {reason} NOT LIKE '{ReasonCode.OUTCOME_UNKNOWN}%'
              AND {reason} NOT LIKE '%the outcome of % is unknown%'
              AND EXISTS (SELECT FROM failed_attempts a
                           WHERE a.follow_up_id = {row}.id AND a.outcome IN ('unknown', 'lost'))
             THEN left({reason} || CASE WHEN strpos({reason}, ':') = 0 THEN ': ' ELSE '; ' END || '{OUTCOME_UNKNOWN}',
                       {MAX_REASON_LENGTH})
             ELSE {reason} END
    """
