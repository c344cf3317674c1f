-- Begin the follow-ups that no check of begin_checks.sql prevents; both files form one statement. After this update, a
-- cancel is too late.
--
-- :lease   how long the attempt may be in flight before another worker considers it lost
UPDATE follow_ups f
   SET begun_at = now(), attempts = f.attempts + 1, lease_until = now() + CAST(:lease AS interval)
  FROM checked
 WHERE f.ctid = checked.place
   AND NOT (chat_removed OR silence_broken OR taken_over OR window_closed OR too_late OR early OR behind_another
            OR paused OR outside_hours)
RETURNING checked.number, f.begun_at, f.lease_token,
          -- limited to years that Python supports: one other year, set by hand, would make the whole result unreadable
          LEAST(GREATEST(COALESCE(f.next_attempt_at, f.due_date), timestamptz '0002-01-01'),
                timestamptz '9998-12-31') AS due,
          f.snoozes, f.traceparent,
          -- these columns are in the order of the fields of Delivery
          f.id, f.workspace_id, f.chat_id, checked.channel, checked.external_id, f.trigger_chat_message_id, f.message,
          f.due_date, f.attempts
