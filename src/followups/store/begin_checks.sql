-- The checks that may keep a leased follow-up from beginning, one column each. begin.sql begins the follow-ups for
-- which every column is false; for the others, obstacles.sql adds the details. What a check means is decided by
-- delivery/hold.py (paused, outside_hours, and too_late first), then by verdict in delivery/begin.py; behind_another
-- parks the follow-up, and early tries it again.
--
-- Two checks are made before this statement, because they do not depend on a row: the due queue checks the due moment,
-- the free slots and the breaker, and Redis checks the rate limits.
--
-- :ids, :tokens   the batch of leases
-- :window         length of a messaging window
-- :windowed       the channels that have one
-- :max_lateness   allowed lateness; 0 means any
-- :early          how long before its due moment a follow-up may begin; the sender waits until that moment
--
-- LATERAL and OFFSET 0 force a lookup of each row by its key, because the planner's statistics are wrong right after a
-- burst of inserts. A plan made while chats seemed empty scanned the whole table and locked the batch again for each
-- chat; with 1,650 chats, a hundred follow-ups took more than 8 s to begin.
WITH checked AS MATERIALIZED (
    SELECT b.number, f.place, f.id, f.lease_token, f.workspace_id, f.chat_id, f.due_date, f.scheduled_at, f.sendable_from,
           c.channel, c.external_id, c.last_user_message_at,
           c.removed_at IS NOT NULL AS chat_removed,
           COALESCE(c.last_message_role = 'user', false) AS silence_broken,
           -- A follow-up may be scheduled after an operator's message, which is then its trigger. If a change gave the
           -- follow-up another trigger, or moved it into the chat, it was still scheduled later than the message.
           COALESCE(c.last_message_role = 'operator' AND f.trigger_chat_message_id <> c.last_message_id
                    AND f.scheduled_at < c.last_message_at, false) AS taken_over,
           (c.channel = ANY(CAST(:windowed AS text[]))
            AND now() >= COALESCE(c.last_user_message_at, '-infinity') + CAST(:window AS interval)) AS window_closed,
           -- A follow-up that sending hours never held has no sendable_from; one held by a process of an older version
           -- has only held_until.
           (CAST(:max_lateness AS interval) > interval '0'
            AND now() >= COALESCE(f.sendable_from, GREATEST(f.due_date, f.scheduled_at, f.held_until))
                         + CAST(:max_lateness AS interval)) AS too_late,
           COALESCE(f.next_attempt_at, f.due_date) > now() + CAST(:early AS interval) AS early,
           -- Without OFFSET 0, the planner may use a join that reads every pending row of the batch's chats.
           EXISTS (SELECT FROM follow_ups e
                    WHERE e.workspace_id = f.workspace_id AND e.chat_id = f.chat_id AND e.status = 'pending'
                      AND (e.due_date, e.id) < (f.due_date, f.id) OFFSET 0) AS behind_another,
           -- Whether any pauses or sending hours exist is checked once per statement. Usually none exist, and the check
           -- of each follow-up costs nothing.
           ((SELECT EXISTS (SELECT FROM pauses WHERE ended_at IS NULL))
            AND EXISTS (SELECT FROM pauses p
                         WHERE p.ended_at IS NULL AND (p.workspace_id = f.workspace_id OR p.workspace_id IS NULL)
                           AND (p.channel = c.channel OR p.channel IS NULL))) AS paused,
           -- The check uses the due moment, because the message is sent then, a little later than begin. Once the
           -- stored period of sending hours is over, this column is true until a worker has computed the next period.
           ((SELECT EXISTS (SELECT FROM sending_hours))
            AND EXISTS (SELECT FROM sending_hours h
                         WHERE h.workspace_id = f.workspace_id
                           AND NOT (GREATEST(now(), COALESCE(f.next_attempt_at, f.due_date)) >= h.open_from
                                    AND GREATEST(now(), COALESCE(f.next_attempt_at, f.due_date)) < h.open_until)))
               AS outside_hours,
           GREATEST(now(), COALESCE(f.next_attempt_at, f.due_date)) AS send_time
      FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) WITH ORDINALITY AS b(id, token, number)
     -- The lease must still be valid. A row locked by a caller's open transaction is skipped, reported, and tried
     -- again, because one slow transaction must not delay other messages. A row that was updated since the statement's
     -- snapshot has another location (ctid), and is also tried again. The reason for checking finished_at instead of status is given
     -- at OPEN in fragments.py.
     CROSS JOIN LATERAL (
         SELECT f.*, f.ctid AS place FROM follow_ups f
          WHERE f.id = b.id AND f.lease_token = b.token
            AND f.finished_at IS NULL AND f.begun_at IS NULL AND f.lease_until > now()
            FOR NO KEY UPDATE SKIP LOCKED
     ) f
     CROSS JOIN LATERAL (
         SELECT c.* FROM chats c WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id OFFSET 0
     ) c
)
