-- Creates the database and its two roles. Run this file once, as a superuser, or on a managed server as its
-- administrator (a role with CREATEROLE, CREATEDB and the right to grant pg_read_all_stats):
--
--   OWNER_PASSWORD=... SERVICE_PASSWORD=... psql --dbname postgres --file deploy/roles.sql
--
-- followups_owner owns the tables; only followups migrate uses this role. The role followups runs the service: it can
-- read and change rows, but cannot change, drop or create tables. Reading the passwords needs psql 15 or newer.
\set ON_ERROR_STOP on
\if :{?database}
\else
  \set database followups
\endif
\getenv owner_password OWNER_PASSWORD
\getenv password SERVICE_PASSWORD

CREATE ROLE followups_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE followups LOGIN PASSWORD :'password';
-- A managed server's administrator, who is no superuser, must be a member to give the database to this role.
GRANT followups_owner TO CURRENT_USER;
CREATE DATABASE :"database" OWNER followups_owner ENCODING 'UTF8' TEMPLATE template0;

\connect :"database"
\ir grants.sql
REVOKE followups_owner FROM CURRENT_USER;
