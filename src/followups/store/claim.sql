-- The claim: which rows are due, the earliest first. lease.sql follows in the same statement and leases them.
--
-- Rows in flight come first in the index (due, id) WHERE status = 'pending', apart from rows that came in with an earlier
-- due date. So this reads what is in flight and as much again as is leased, whatever else is pending. Reading :seen_most
-- rows at most bounds the cost of a tick. If there are more, leased ones left by a fair claim may be behind them, so
-- nothing is taken then, and a fair claim comes next.
--
-- :ahead      how far ahead to look: what falls due until the next tick or two
-- :since      where to start, the low-water mark of the claim before; NULL means at the beginning
-- :seen_most  most rows read; :window  most that may be in flight; :most  most that are leased
-- :without    rows to pass over, since they cannot be written
-- :in_grace   whether leases that ended with an attempt in flight are left to their workers for now
WITH head AS MATERIALIZED (
    -- the candidates, in the order in which they are to be taken, by their place in the table
    SELECT f.ctid AS place, COALESCE(f.next_attempt_at, f.due_date) AS due,
           f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean))
               AS free
      FROM follow_ups f
     WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
       AND COALESCE(f.next_attempt_at, f.due_date) <= now() + CAST(:ahead AS interval)
       AND COALESCE(f.next_attempt_at, f.due_date) >= COALESCE(CAST(:since AS timestamptz), '-infinity')
     ORDER BY COALESCE(f.next_attempt_at, f.due_date), f.id
     LIMIT :seen_most
), looked AS MATERIALIZED (
    -- one row: how many of the candidates are leased, when the first falls due, and whether there are more
    SELECT CASE WHEN count(*) < :seen_most THEN count(*) FILTER (WHERE NOT free) ELSE :window END AS leased,
           min(due) AS first, count(*) >= :seen_most AS unseen
      FROM head
)
