-- The fair claim: select due rows, those of the workspaces with the fewest rows in flight first. lease.sql follows in
-- the same statement and leases them. The fair claim is used while there is a backlog, because the order of due dates
-- is not fair then: a workspace with a hundred thousand overdue follow-ups would delay all others.
--
-- All reads use the index (workspace_id, due, id) WHERE status = 'pending', in three passes. The first pass reads :few
-- rows of each workspace; most workspaces have no more. The second pass reads an equal share of the window from each
-- workspace that has more, if the window is not full. The third pass gives unused shares to workspaces that have still
-- more. So each of many workspaces costs only a few rows, and one workspace with a backlog among a thousand small ones
-- still fills the window.
--
-- Leased rows are not counted if they come after more free rows than are read. Such free rows were inserted with an
-- earlier due date, or their leases expired. They are leased first, so this claim may exceed the window by its own size
-- at most, and the next claim counts all leased rows.
--
-- Run this statement with enable_sort = off: if the planner assumes that the table is almost empty, it otherwise sorts
-- all pending rows.
--
-- :stride  rows read in one step of the recursion over the workspaces; the other parameters are those of claim.sql
WITH RECURSIVE walk AS (
    -- Find the workspaces with due follow-ups: each step starts after the last workspace of the previous step.
    SELECT '00000000-0000-0000-0000-000000000000'::uuid AS last, '{}'::uuid[] AS due_in
     UNION ALL
    SELECT step.*
      FROM walk
     CROSS JOIN LATERAL (
         SELECT (array_agg(f.workspace_id))[count(*)] AS last,
                array_agg(f.workspace_id) FILTER (WHERE f.due <= now() + CAST(:ahead AS interval)) AS due_in
           FROM (
               SELECT f.workspace_id, COALESCE(f.next_attempt_at, f.due_date) AS due FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND f.workspace_id > walk.last
                  AND COALESCE(f.next_attempt_at, f.due_date) >= COALESCE(CAST(:since AS timestamptz), '-infinity')
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT :stride
           ) f
     ) step
     WHERE step.last IS NOT NULL
), workspace AS MATERIALIZED (
    -- The first pass returns one row for each workspace: the number of leased rows read, the locations and due times of
    -- the free rows, the last row read, and whether there may be more rows.
    SELECT w.id, f.*
      FROM (SELECT DISTINCT unnest(due_in) AS id FROM walk) w
     CROSS JOIN LATERAL (
         SELECT min(f.due) AS first, count(*) FILTER (WHERE NOT f.free) AS leased,
                COALESCE(array_agg(f.place) FILTER (WHERE f.free), '{}') AS places,
                COALESCE(array_agg(f.due) FILTER (WHERE f.free), '{}') AS dues,
                max(f.due) AS due, (array_agg(f.id))[count(*)] AS last_id, count(*) = :few AS more
           FROM (
               SELECT f.ctid AS place, f.id, COALESCE(f.next_attempt_at, f.due_date) AS due,
                      f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean))
                          AS free
                 FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date)) >= (w.id, COALESCE(CAST(:since AS timestamptz), '-infinity'))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date)) <= (w.id, now() + CAST(:ahead AS interval))
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT :few
           ) f
     ) f
     WHERE f.first IS NOT NULL
), wanted AS MATERIALIZED (
    -- the number of rows that the second pass reads for each workspace
    SELECT workspace.*, CASE WHEN NOT workspace.more OR share.places <= 0 THEN 0
                WHEN share.missing > 0 THEN LEAST(:most, GREATEST(:few, :window / share.many + 1))
                WHEN 2 * cardinality(workspace.places) < :few THEN :few
                ELSE 0 END AS rows
      FROM workspace
     CROSS JOIN (
         SELECT places, (places - found)::bigint AS missing, many
           FROM (SELECT LEAST(:most, :window - sum(leased)) AS places, sum(cardinality(places)) AS found,
                        count(*) FILTER (WHERE more) AS many
                   FROM workspace) counted
     ) share
), first_look AS MATERIALIZED (
    -- The second pass. Workspaces of which no more rows are needed are copied unchanged.
    SELECT seen.id, seen.first, seen.leased + passed.leased AS leased, seen.places || found.places AS places,
           seen.dues || found.dues AS dues, COALESCE(found.due, seen.due) AS due,
           COALESCE(found.last_id, seen.last_id) AS last_id, seen.more AND found.number = seen.rows AS more
      FROM wanted seen
     CROSS JOIN LATERAL (
         -- the next free rows after the last row read
         SELECT count(*) AS number, array_agg(f.place) AS places, array_agg(f.due) AS dues,
                max(f.due) AS due, (array_agg(f.id))[count(*)] AS last_id
           FROM (
               SELECT f.ctid AS place, f.id, COALESCE(f.next_attempt_at, f.due_date) AS due FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND (f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean)))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id) > (seen.id, seen.due, seen.last_id)
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date)) <= (seen.id, now() + CAST(:ahead AS interval))
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT seen.rows
           ) f
     ) found
     CROSS JOIN LATERAL (
         -- the leased rows in the same range, which are only counted
         SELECT count(*) AS leased
           FROM (
               SELECT FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND NOT (f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean)))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id) > (seen.id, seen.due, seen.last_id)
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id)
                      <= (seen.id,
                          CASE WHEN found.number = seen.rows THEN found.due ELSE now() + CAST(:ahead AS interval) END,
                          CASE WHEN found.number = seen.rows THEN found.last_id
                               ELSE 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid END)
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT :window
           ) f
     ) passed
     WHERE seen.rows > 0
     UNION ALL
    SELECT seen.id, seen.first, seen.leased, seen.places, seen.dues, seen.due, seen.last_id, seen.more
      FROM wanted seen WHERE seen.rows = 0
), still_wanted AS MATERIALIZED (
    -- the number of rows that the third pass reads for each workspace
    SELECT first_look.*, CASE WHEN first_look.more AND rest.missing > 0
                THEN ceil(rest.missing::numeric / rest.many)::bigint ELSE 0 END AS rows
      FROM first_look
     CROSS JOIN (
         SELECT places, (places - found)::bigint AS missing, many
           FROM (SELECT LEAST(:most, :window - sum(leased)) AS places, sum(cardinality(places)) AS found,
                        count(*) FILTER (WHERE more) AS many
                   FROM first_look) counted
     ) rest
), second_look AS MATERIALIZED (
    -- The third pass works like the second.
    SELECT seen.id, seen.first, seen.leased + passed.leased AS leased, seen.places || found.places AS places,
           seen.dues || found.dues AS dues, COALESCE(found.due, seen.due) AS due,
           COALESCE(found.last_id, seen.last_id) AS last_id, seen.more AND found.number = seen.rows AS more
      FROM still_wanted seen
     CROSS JOIN LATERAL (
         -- the next free rows after the last row read
         SELECT count(*) AS number, array_agg(f.place) AS places, array_agg(f.due) AS dues,
                max(f.due) AS due, (array_agg(f.id))[count(*)] AS last_id
           FROM (
               SELECT f.ctid AS place, f.id, COALESCE(f.next_attempt_at, f.due_date) AS due FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND (f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean)))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id) > (seen.id, seen.due, seen.last_id)
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date)) <= (seen.id, now() + CAST(:ahead AS interval))
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT seen.rows
           ) f
     ) found
     CROSS JOIN LATERAL (
         -- the leased rows in the same range, which are only counted
         SELECT count(*) AS leased
           FROM (
               SELECT FROM follow_ups f
                WHERE f.status = 'pending' AND f.waits_for IS NULL AND f.id <> ALL(CAST(:without AS uuid[]))
                  AND NOT (f.lease_until IS NULL OR f.lease_until <= now() AND (f.begun_at IS NULL OR NOT CAST(:in_grace AS boolean)))
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id) > (seen.id, seen.due, seen.last_id)
                  AND (f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id)
                      <= (seen.id,
                          CASE WHEN found.number = seen.rows THEN found.due ELSE now() + CAST(:ahead AS interval) END,
                          CASE WHEN found.number = seen.rows THEN found.last_id
                               ELSE 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid END)
                ORDER BY f.workspace_id, COALESCE(f.next_attempt_at, f.due_date), f.id
                LIMIT :window
           ) f
     ) passed
     WHERE seen.rows > 0
     UNION ALL
    SELECT seen.id, seen.first, seen.leased, seen.places, seen.dues, seen.due, seen.last_id, seen.more
      FROM still_wanted seen WHERE seen.rows = 0
), head AS MATERIALIZED (
    -- A row's rank is the number of rows of its workspace that would be in flight with it. Rows with the lowest rank
    -- are leased first; among equal ranks, the earliest due row.
    SELECT one.place, true AS free
      FROM second_look CROSS JOIN LATERAL unnest(places, dues) WITH ORDINALITY AS one(place, due, number)
     ORDER BY leased + number, one.due, one.place
), looked AS MATERIALIZED (
    SELECT COALESCE(sum(leased), 0) AS leased, min(first) AS first, COALESCE(bool_or(more), false) AS unseen
      FROM second_look
)
