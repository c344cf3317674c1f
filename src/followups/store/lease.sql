-- Lease the candidates. This file follows claim.sql or fair_claim.sql in one statement.
--
-- head contains the candidates in the order in which they are to be leased; looked is one row with totals.
--
-- :lease   duration of a lease; it starts at the due moment
-- :margin  how far before the earliest due time the next claim starts, to include transactions that commit a little later
, taken AS MATERIALIZED (
    -- A row that was updated since head was read has another location (ctid), and is skipped like a locked row.
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
       SET -- The token is a time in microseconds, so it grows and is never issued twice, even after a failover or a
           -- restore that lost a lease.
           lease_token = GREATEST(f.lease_token + 1, CAST(date_part('epoch', now()) * 1000000 AS bigint)),
           lease_until = GREATEST(now(), COALESCE(f.next_attempt_at, f.due_date)) + CAST(:lease AS interval),
           begun_at = NULL,
           -- An attempt whose lease was lost counts as a lost lease, not as an attempt.
           attempts = GREATEST(f.attempts - taken.lost::int, 0),
           losses = f.losses + taken.lost::int
      FROM taken
     WHERE f.ctid = taken.place
    RETURNING f.id, f.lease_token,
              LEAST(GREATEST(COALESCE(f.next_attempt_at, f.due_date), timestamptz '0002-01-01'),
                    timestamptz '9998-12-31') AS due,
              f.losses, f.workspace_id, f.traceparent, taken.lost, f.attempts, f.cancel_requested
)
-- The first row has the totals of the candidates; the other rows are the leases.
SELECT NULL AS id, NULL AS lease_token, NULL AS due, NULL AS losses, NULL AS workspace_id, NULL AS traceparent,
       NULL AS lost, NULL AS attempts, NULL AS cancel_requested,
       looked.leased, looked.unseen,
       GREATEST(LEAST(looked.first, now()), timestamptz '0002-01-01') - CAST(:margin AS interval) AS low_water,
       (SELECT count(*) FROM taken) AS taken
  FROM looked
 UNION ALL
SELECT claimed.*, NULL, NULL, NULL, NULL FROM claimed
 ORDER BY due NULLS FIRST, id
