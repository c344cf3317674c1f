-- Two roles and a database, made by a superuser, once:
--
--   OWNER_PASSWORD=... SERVICE_PASSWORD=... psql --dbname postgres --file deploy/roles.sql
--
-- followups_owner owns the tables: followups migrate runs as it, and nothing else does. followups runs the service: it
-- reads and changes rows, and cannot change, drop or create a table. psql 15 or newer reads the passwords.
\set ON_ERROR_STOP on
\if :{?database}
\else
  \set database followups
\endif
\getenv owner_password OWNER_PASSWORD
\getenv password SERVICE_PASSWORD

CREATE ROLE followups_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE followups LOGIN PASSWORD :'password';
CREATE DATABASE :"database" OWNER followups_owner ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"database" TO followups;

\connect :"database"
\ir grants.sql
