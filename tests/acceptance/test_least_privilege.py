"""Tests that the database roles and broker users created from deploy/ have enough permissions."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import redis

from databases import OWNER, SERVICE, make_roles
from followups.embedded import EmbeddedPostgres, memory_directory
from followups.schema import migrate

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_roles_need_no_superuser() -> None:
    """roles.sql needs no superuser; in the new database, the administrator owns nothing."""
    with EmbeddedPostgres(parent=memory_directory()) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE administrator LOGIN CREATEROLE CREATEDB")
            connection.execute("GRANT pg_read_all_stats TO administrator WITH ADMIN OPTION")
        make_roles(server.url(role="administrator"))
        migrate(server.url(SERVICE, OWNER))
        with psycopg.connect(server.url(SERVICE, SERVICE)) as connection:
            connection.execute("INSERT INTO workspaces (name) VALUES ('acme')")
        with psycopg.connect(server.url(SERVICE)) as connection:
            found = connection.execute("SELECT pg_has_role('administrator', 'followups_owner', 'USAGE')").fetchone()
            assert found == (False,)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (n int)",
        "DROP TABLE follow_ups",
        "ALTER TABLE follow_ups ADD n int",
        "TRUNCATE chats",
        "CREATE SCHEMA s",
    ],
)
def test_the_role_of_the_service_changes_no_table(database_url: str, statement: str) -> None:
    """The service's role can read and change rows, but cannot create, alter, drop or truncate tables."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM follow_ups").fetchone()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("web", ("LPUSH", "followups:deliver", "x")),
        ("web", ("BRPOP", "followups:deliver", "1")),
        ("beat", ("LPUSH", "followups:deliver", "x")),
        ("beat", ("PUBLISH", "followups:/0.celery.pidbox", "x")),
        ("flower", ("LPUSH", "followups:deliver", "x")),
        ("worker", ("FLUSHALL",)),
        ("worker", ("SET", "others", "x")),
    ],
)
def test_a_broker_user_has_only_the_commands_it_needs(broker_url: str, user: str, command: tuple[str, ...]) -> None:
    """A broker user is denied every command that its process does not need."""
    with redis.Redis.from_url(broker_url) as admin:
        name = f"test-{uuid4().hex}"
        (line,) = [one for one in (DEPLOY / "users.acl").read_text().splitlines() if one.startswith(f"user {user} ")]
        admin.execute_command("ACL", "SETUSER", name, *line.split()[2:])
        assert admin.execute_command("ACL", "DRYRUN", name, "GET", "followups:dispatch") == b"OK"
        said = admin.execute_command("ACL", "DRYRUN", name, *command)
        assert b"permissions" in said
        admin.execute_command("ACL", "DELUSER", name)
