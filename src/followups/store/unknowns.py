"""What a reason must say: that an attempt, whose outcome nobody knows, may have been accepted after all.

A follow-up with such an attempt is tried again under the same key, and mostly ends as sent. Where it ends
otherwise (a reply, a refusal, the last attempt), its reason would lie without this.
"""

from __future__ import annotations

from followups.states import MAX_REASON_LENGTH, ReasonCode

SAID = "the outcome of an attempt is unknown"


def honest(reason: str, row: str) -> str:
    """Return SQL for the reason (SQL too) of a row of ``follow_ups`` that ends, with `SAID` where it is owed."""
    return f"""
        CASE WHEN {reason} IS NOT NULL AND {reason} NOT LIKE '{ReasonCode.OUTCOME_UNKNOWN}%'
              AND {reason} NOT LIKE '%the outcome of % is unknown%'
              AND EXISTS (SELECT FROM failed_attempts a
                           WHERE a.follow_up_id = {row}.id AND a.outcome IN ('unknown', 'lost'))
             THEN left({reason} || CASE WHEN strpos({reason}, ':') = 0 THEN ': ' ELSE '; ' END || '{SAID}',
                       {MAX_REASON_LENGTH})
             ELSE {reason} END
    """
