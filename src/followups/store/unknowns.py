"""The addition that a reason needs: that an attempt with an unknown outcome may have been accepted after all.

A follow-up with such an attempt is tried again under the same key, and mostly ends as sent. If it ends otherwise (a
reply, a refusal, the last attempt), its reason would be wrong without this.
"""

from __future__ import annotations

from followups.states import MAX_REASON_LENGTH, ReasonCode

SAID = "the outcome of an attempt is unknown"


def honest(reason: str, row: str) -> str:
    """Return SQL for the reason (SQL too) of an ending row of ``follow_ups``, with `SAID` added where needed."""
    return f"""
        CASE WHEN {reason} IS NOT NULL AND {reason} NOT LIKE '{ReasonCode.OUTCOME_UNKNOWN}%'
              AND {reason} NOT LIKE '%the outcome of % is unknown%'
              AND EXISTS (SELECT FROM failed_attempts a
                           WHERE a.follow_up_id = {row}.id AND a.outcome IN ('unknown', 'lost'))
             THEN left({reason} || CASE WHEN strpos({reason}, ':') = 0 THEN ': ' ELSE '; ' END || '{SAID}',
                       {MAX_REASON_LENGTH})
             ELSE {reason} END
    """
