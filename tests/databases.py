"""The databases on the tests' server, and the two roles of deploy/roles.sql.

All code under test connects as the role `SERVICE`. A test that needs the rights of the owner or a superuser connects as
that role.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import URL

ROLES = Path(__file__).parents[1] / "deploy" / "roles.sql"

SUPERUSER, OWNER, SERVICE = "postgres", "followups_owner", "followups"

PASSWORDS = {"OWNER_PASSWORD": "owner's", "SERVICE_PASSWORD": "app's"}


def url_of(server_url: str, database: str, role: str = SERVICE) -> str:
    """Return the URL of a database of the server, as a role."""
    return make_url(server_url).set(database=database, username=role).render_as_string(hide_password=False)


def url_as(database_url: str | URL, role: str) -> str:
    """Return the database's URL for connections as another role."""
    return make_url(database_url).set(username=role).render_as_string(hide_password=False)


def make_roles(server_url: str, database: str = SERVICE, passwords: Mapping[str, str] = PASSWORDS) -> None:
    """Create the two roles, and a database for them, as an operator does."""
    from followups.embedded.postgres import BINARIES  # noqa: PLC0415 - not for unit tests

    command = [BINARIES / "psql", "--quiet", "--dbname", server_url, "--file", ROLES, f"--set=database={database}"]
    ran = subprocess.run(command, env={**os.environ, **passwords}, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def create_database(server_url: str, name: str, template: str = "template1") -> None:
    """Create a database of the owner role, empty or copied from ``template``, which must have no sessions."""
    # Copying a database's files takes half as long as copying it through the write-ahead log.
    statement = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {} STRATEGY file_copy")
    _execute(server_url, statement.format(*map(sql.Identifier, (name, OWNER, template))))


def drop_database(server_url: str, name: str) -> None:
    """Drop a database and end its sessions. If the database does not exist, nothing happens."""
    _execute(server_url, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _execute(server_url: str, statement: sql.Composed) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(statement)
