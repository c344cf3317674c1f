-- Grant the role followups its rights on the tables of followups_owner, including the tables of later migrations. In an
-- existing database, create the two roles first, as roles.sql does, and change the tables' owner:
-- REASSIGN OWNED BY (the old owner) TO followups_owner.
DO $$
BEGIN
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO followups', current_database());
END
$$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO followups_owner;
GRANT USAGE ON SCHEMA public TO followups;

ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO followups;
ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public
  GRANT USAGE, SELECT ON SEQUENCES TO followups;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO followups;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO followups;

-- Workers refresh the statistics of a table that has filled within seconds. Before PostgreSQL 17, only the table's
-- owner may do so; autovacuum then refreshes them about a minute later.
DO $$
BEGIN
  IF current_setting('server_version_num')::int >= 170000 THEN
    ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public GRANT MAINTAIN ON TABLES TO followups;
    GRANT MAINTAIN ON ALL TABLES IN SCHEMA public TO followups;
  END IF;
END
$$;

-- Lets followups doctor, and followups migrate, see transactions of other roles.
GRANT pg_read_all_stats TO followups, followups_owner;
