-- What the role followups may do with the tables of followups_owner, those of later migrations included. For a database
-- that is already there, run this as a superuser in it, after: REASSIGN OWNED BY (the old owner) TO followups_owner.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO followups_owner;
GRANT USAGE ON SCHEMA public TO followups;

ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO followups;
ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public
  GRANT USAGE, SELECT ON SEQUENCES TO followups;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO followups;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO followups;

-- Workers refresh the statistics of a table that has filled within seconds. Before PostgreSQL 17 only its owner may;
-- there autovacuum does it, some minute later.
DO $$
BEGIN
  IF current_setting('server_version_num')::int >= 170000 THEN
    ALTER DEFAULT PRIVILEGES FOR ROLE followups_owner IN SCHEMA public GRANT MAINTAIN ON TABLES TO followups;
    GRANT MAINTAIN ON ALL TABLES IN SCHEMA public TO followups;
  END IF;
END
$$;

-- So that followups doctor sees the long transactions of others.
GRANT pg_read_all_stats TO followups;
