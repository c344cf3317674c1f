-- The fair claim: which rows are due, those of the workspaces with the fewest in flight first. lease.sql follows in the same
-- statement and leases them. It is used behind a backlog, where the order of due dates is not fair: a workspace with a
-- hundred thousand overdue follow-ups would go first with all of them.
--
-- All reads follow the index (workspace_id, due, id) WHERE status = 'pending'. There are three looks. The first reads :few
-- rows of each workspace, which is all that most workspaces have. Where there are more and they are wanted, the second
-- reads an equal share of the window. The third gives the places that others left to those that have yet more. So many
-- workspaces cost a few rows each, and one with a backlog beside a thousand small ones still fills the window.
--
-- Leased rows behind more free rows than are read are not counted: the free ones came in with an earlier due date, or
-- their leases ran out. They are taken first, so such a claim exceeds the window once, by its own size at most, and the
-- next one counts all.
--
-- Set enable_sort = off for it: if the planner takes the table for almost empty, it sorts everything pending instead.
--
-- :stride  rows of one step of the walk over the workspaces; the other parameters are those of claim.sql
WITH RECURSIVE walk AS (
    -- The workspaces in which a follow-up is due: each step starts after the last workspace of the step before.
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
    -- The first look. A row for each workspace: how many rows read are leased, the places of the free ones, their due
    -- times, the last row read, and whether there may be more.
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
    -- how many more rows of each workspace the second look reads
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
    -- The second look; where no more rows are wanted, the workspace stays as it was.
    SELECT seen.id, seen.first, seen.leased + passed.leased AS leased, seen.places || found.places AS places,
           seen.dues || found.dues AS dues, COALESCE(found.due, seen.due) AS due,
           COALESCE(found.last_id, seen.last_id) AS last_id, seen.more AND found.number = seen.rows AS more
      FROM wanted seen
     CROSS JOIN LATERAL (
         -- the next free rows behind the last one read
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
         -- the leased rows among them, which are only counted
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
    -- how many more rows of each workspace the third look reads
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
    -- The third look.
    SELECT seen.id, seen.first, seen.leased + passed.leased AS leased, seen.places || found.places AS places,
           seen.dues || found.dues AS dues, COALESCE(found.due, seen.due) AS due,
           COALESCE(found.last_id, seen.last_id) AS last_id, seen.more AND found.number = seen.rows AS more
      FROM still_wanted seen
     CROSS JOIN LATERAL (
         -- the next free rows behind the last one read
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
         -- the leased rows among them, which are only counted
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
    -- A row's rank is how many of its workspace would be in flight with it; the lowest ranks are taken first, and among
    -- these the earliest due.
    SELECT one.place, true AS free
      FROM second_look CROSS JOIN LATERAL unnest(places, dues) WITH ORDINALITY AS one(place, due, number)
     ORDER BY leased + number, one.due, one.place
), looked AS MATERIALIZED (
    SELECT COALESCE(sum(leased), 0) AS leased, min(first) AS first, COALESCE(bool_or(more), false) AS unseen
      FROM second_look
)
