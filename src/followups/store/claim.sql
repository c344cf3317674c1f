-- The claim: select the due rows, the earliest first. lease.sql follows in the same statement and leases them.
--
-- Rows in flight come first in the index (due, id) WHERE status = 'pending', except for rows that were inserted later
-- with an earlier due date. So the claim reads only the rows in flight and the rows that it leases, however many others
-- are pending. Reading at most :seen_most rows limits the cost of a tick. If there are more rows, some of them may have
-- been leased by a fair claim, so this claim leases nothing, and a fair claim follows.
--
-- :ahead      how far ahead to look: also select rows that fall due until the next tick or two
-- :since      where to start: the low-water mark of the previous claim; NULL means at the beginning
-- :seen_most  most rows read; :window  most that may be in flight; :most  most that are leased
-- :without    rows to skip, because they cannot be written
-- :in_grace   whether leases that ended with an attempt in flight are left to their workers for now
WITH head AS MATERIALIZED (
    -- the candidates as row locations (ctid), in the order in which they are to be leased
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
    -- one row: the number of leased candidates, the earliest due time, and whether there are more rows
    SELECT CASE WHEN count(*) < :seen_most THEN count(*) FILTER (WHERE NOT free) ELSE :window END AS leased,
           min(due) AS first, count(*) >= :seen_most AS unseen
      FROM head
)
