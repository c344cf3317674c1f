-- Lease the candidates; behind claim.sql or fair_claim.sql, in one statement with it.
--
-- head has the candidates in the order in which they are to be taken, looked is one row about them.
--
-- :lease   duration of a lease; it starts at the due moment
-- :margin  how far below the earliest due time the next claim starts, for transactions that commit a little later
, taken AS MATERIALIZED (
    -- A row that was updated since head was read has another place, and is skipped like a locked one.
    SELECT f.place, f.begun_at IS NOT NULL AS lost
      FROM head
     CROSS JOIN LATERAL (
         SELECT f.ctid AS place, f.begun_at FROM follow_ups f
          WHERE f.ctid = head.place AND f.status = 'pending' AND f.waits_for IS NULL
            AND f.id <> ALL(CAST(:without AS uuid[]))
            AND COALESCE(f.next_attempt_at, f.due_date) <= now() + CAST(:ahead AS interval)
            AND (f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean)))
            FOR NO KEY UPDATE SKIP LOCKED
     ) f
     WHERE head.free
     LIMIT LEAST(:most, GREATEST(0, :window - (SELECT leased FROM looked)))
), claimed AS (
    UPDATE follow_ups f
       SET -- It grows, and none is issued twice, also after a failover or a restore that has lost a lease: microseconds.
           lease_token = GREATEST(f.lease_token + 1, CAST(date_part('epoch', now()) * 1000000 AS bigint)),
           lease_until = GREATEST(now(), COALESCE(f.next_attempt_at, f.due_date)) + CAST(:lease AS interval),
           begun_at = NULL,
           -- A lost attempt is counted as a lost lease, not as an attempt.
           attempts = GREATEST(f.attempts - taken.lost::int, 0),
           losses = f.losses + taken.lost::int
      FROM taken
     WHERE f.ctid = taken.place
    RETURNING f.id, f.lease_token,
              LEAST(GREATEST(COALESCE(f.next_attempt_at, f.due_date), timestamptz '0002-01-01'),
                    timestamptz '9998-12-31') AS due,
              f.losses, f.workspace_id, f.traceparent, taken.lost, f.attempts, f.cancel_requested
)
-- The first row is about the candidates, the others are the leases.
SELECT NULL AS id, NULL AS lease_token, NULL AS due, NULL AS losses, NULL AS workspace_id, NULL AS traceparent,
       NULL AS lost, NULL AS attempts, NULL AS cancel_requested,
       looked.leased, looked.unseen,
       GREATEST(LEAST(looked.first, now()), timestamptz '0002-01-01') - CAST(:margin AS interval) AS low_water,
       (SELECT count(*) FROM taken) AS taken
  FROM looked
 UNION ALL
SELECT claimed.*, NULL, NULL, NULL, NULL FROM claimed
 ORDER BY due NULLS FIRST, id
