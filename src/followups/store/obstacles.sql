-- Select why leases were not begun, with the details of each obstacle. This file follows begin_checks.sql in one
-- statement, but without locks.
--
-- Due times are limited to years that Python supports: one other year, set by hand, would make the whole result
-- unreadable.
SELECT checked.id, checked.lease_token, chat_removed, silence_broken, taken_over, window_closed, too_late,
       earlier.id AS earlier, now() AS now,
       LEAST(GREATEST(checked.send_time, first), last) AS send_time,
       LEAST(GREATEST(checked.due_date, first), last) AS due_date,
       LEAST(GREATEST(checked.due_date, checked.scheduled_at, first), last) AS wanted_from,
       CASE WHEN checked.sendable_from IS NOT NULL
            THEN LEAST(GREATEST(checked.sendable_from, first), last) END AS sendable_from,
       -- The end of the window matters only for held follow-ups, and is NULL if it is not known.
       CASE WHEN checked.channel = ANY(CAST(:windowed AS text[])) AND (p.id IS NOT NULL OR h.workspace_id IS NOT NULL)
            THEN checked.last_user_message_at + CAST(:window AS interval) END AS window_ends,
       p.id AS pause_id,
       h.workspace_id, h.time_zone, h.opening, h.closing, h.days, h.open_from, h.open_until
  FROM checked
 CROSS JOIN (VALUES (timestamptz '0002-01-01', timestamptz '9998-12-31')) years(first, last)
  LEFT JOIN LATERAL (
      SELECT e.id FROM follow_ups e
       WHERE e.workspace_id = checked.workspace_id AND e.chat_id = checked.chat_id AND e.status = 'pending'
         AND (e.due_date, e.id) < (checked.due_date, checked.id)
       ORDER BY e.due_date DESC, e.id DESC
       LIMIT 1
  ) earlier ON true
  LEFT JOIN LATERAL (
      SELECT p.id FROM pauses p
       WHERE p.ended_at IS NULL AND (p.workspace_id = checked.workspace_id OR p.workspace_id IS NULL)
         AND (p.channel = checked.channel OR p.channel IS NULL)
       ORDER BY p.created_at
       LIMIT 1
  ) p ON true
  LEFT JOIN sending_hours h ON h.workspace_id = checked.workspace_id
