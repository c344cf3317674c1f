"""Tests that upgrade the schema, then the code, under load and without downtime."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from databases import OWNER, url_as
from deploy.manifests import ROOT
from faults.rig import Load, running
from followups.schema import alembic_config, downgrade, migrate
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from faults.rig import Rig
    from followups.embedded import Child
    from followups.settings import Settings

RATE = 60.0
"""Follow-ups per second during the upgrade."""

SCRIPTS = ScriptDirectory.from_config(alembic_config())
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
"""The schema revisions, from the first to the newest."""
NEWEST = SCRIPTS.get_revision(REVISIONS[-1])
PREVIOUS = REVISIONS[-2]


@pytest.fixture
def previous(settings: Settings, engine: Engine) -> Iterator[Rig]:
    """Return a system whose database has the second-newest schema."""
    downgrade(url_as(settings.database_url.get_secret_value(), OWNER), PREVIOUS)
    with running(settings, engine, random.Random(0)) as rig:  # noqa: S311 - not for secrets
        # This test kills no process. Therefore, only the upgrade could cause a second attempt.
        rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "10", "FOLLOWUPS_LEASE": "30"}
        yield rig


@pytest.fixture
def old_code(tmp_path: Path) -> str:
    """Return a directory with the repository's code from before the newest migration."""
    if not (git := shutil.which("git")) or not (ROOT / ".git").exists():
        pytest.skip("there is no history to take the old code from")

    def output(*arguments: str) -> bytes:
        return subprocess.run([git, "-C", str(ROOT), *arguments], capture_output=True, check=False).stdout

    path = str(Path(NEWEST.path).relative_to(ROOT))
    commits = output("rev-list", "--first-parent", "HEAD").decode().split()
    before = next((commit for commit in commits if not output("ls-tree", commit, "--", path)), None)
    if not before:
        pytest.skip("the history does not reach back to the code before the newest migration")
    archive = output("archive", "--format=zip", before, "src")
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(tmp_path)
    assert not list((tmp_path / "src/followups/migrations/versions").glob(f"*{NEWEST.revision}*"))
    return str(tmp_path / "src")


def migrated(rig: Rig) -> float:
    """Run `followups migrate` as an operator does, and return its duration in seconds."""
    began = time.monotonic()
    command = [str(Path(sys.executable).with_name("followups")), "migrate"]
    owner = {"FOLLOWUPS_DATABASE_URL": url_as(rig.settings.database_url.get_secret_value(), OWNER)}
    child = rig.processes.spawn("migrate", command, environment=rig.environment() | owner)
    wait_until(lambda: not child.running, within=60)
    assert child.exit_code == 0, child.tail()
    return time.monotonic() - began


def ended(child: Child) -> None:
    """Stop a process, and check that it drains."""
    child.ask()
    wait_until(lambda: not child.running, within=60)
    assert child.exit_code in {0, -signal.SIGTERM}, child.tail()


def settled(rig: Rig, load: Load) -> None:
    """Check that every follow-up arrived exactly once, on the first attempt."""
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert not verdict.broken()
    assert verdict.ended == {"sent": len(load.ids)}
    assert (load.refused, verdict.repeated) == (0, 0)
    assert rig.world.scalar("SELECT count(*) FROM failed_attempts") == 0


def sent(rig: Rig) -> int:
    """Count the sent follow-ups."""
    return int(rig.world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'sent'"))


def more_is_sent(rig: Rig, more: int = 60) -> None:
    """Wait until ``more`` further follow-ups have been sent, which shows that the system works."""
    wanted = sent(rig) + more
    wait_until(lambda: sent(rig) >= wanted, within=60)


def test_the_schema_then_the_code(previous: Rig, old_code: str) -> None:
    """Old and new code can run at the same time on the new schema.

    No message is lost or sent twice, and no attempt is wasted.
    """
    beats = [previous.beat(PYTHONPATH=old_code)]
    previous.sandbox()
    workers = [previous.worker(PYTHONPATH=old_code), previous.worker(PYTHONPATH=old_code)]
    with Load(previous, RATE, seconds=3600) as load:
        more_is_sent(previous)
        migrated(previous)
        more_is_sent(previous)
        beats.append(previous.beat())
        for old in workers:
            previous.worker()
            ended(old)
            more_is_sent(previous)
        ended(beats[0])
        more_is_sent(previous)
    settled(previous, load)
    assert len(load.ids) > 300


def test_the_code_before_the_schema(previous: Rig) -> None:
    """If new code is deployed before its schema, no message is lost or duplicated."""
    previous.start()
    with Load(previous, RATE, seconds=3600) as load:
        wait_until(lambda: len(load.ids) >= RATE, within=30)
        migrated(previous)
        more_is_sent(previous)
    settled(previous, load)


def test_columns_are_added_under_load(previous: Rig) -> None:
    """Prepared statements keep working while a migration adds columns to the busiest tables."""
    migrated(previous)
    previous.start()
    with Load(previous, RATE, seconds=3600) as load:
        more_is_sent(previous)
        for table in ("follow_ups", "chats"):
            previous.world.alter(f"ALTER TABLE {table} ADD COLUMN a_column_more text")
        more_is_sent(previous)
    settled(previous, load)


_COLUMNS = text("""
    SELECT table_name || '.' || column_name AS name, data_type, is_nullable = 'YES' OR column_default IS NOT NULL
           OR is_identity = 'YES' AS may_be_left_out
      FROM information_schema.columns WHERE table_schema = 'public'
""")
# SQL that lists the constraints with their columns.
_CONSTRAINTS = text("""
    SELECT c.conname AS name, c.conrelid::regclass::text AS table_name,
           ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey))
           AS columns
      FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid AND t.relnamespace = 'public'::regnamespace
     WHERE c.contype IN ('c', 'u', 'f', 'p', 'x')
""")


UNBREAKABLE = {"0009": {f"ck_{table}_times_are_readable" for table in ("chats", "follow_ups", "sending_hours")}}
"""New constraints on existing columns, by migration; old code never violates these constraints."""


@pytest.mark.parametrize(("before", "after"), list(itertools.pairwise(REVISIONS)))
def test_a_migration_removes_nothing(engine: Engine, database_url: str, before: str, after: str) -> None:
    """A migration keeps all tables and columns, and lets the previous version insert rows."""
    owner = url_as(database_url, OWNER)
    downgrade(owner, before)
    with engine.connect() as connection:
        columns = {row.name: row.data_type for row in connection.execute(_COLUMNS)}
        constraints = {row.name for row in connection.execute(_CONSTRAINTS)}
    migrate(owner, after)
    with engine.connect() as connection:
        found = {row.name: row for row in connection.execute(_COLUMNS)}
        new = [row for row in connection.execute(_CONSTRAINTS) if row.name not in constraints]
    assert columns.items() <= {name: row.data_type for name, row in found.items()}.items()
    tables = {name.partition(".")[0] for name in columns}
    for name in found.keys() - columns.keys():
        assert name.partition(".")[0] not in tables or found[name].may_be_left_out
    asked = {row.name for row in new if any(f"{row.table_name}.{column}" in columns for column in row.columns)}
    assert asked == UNBREAKABLE.get(after, set())


def test_old_code_is_older(old_code: str) -> None:
    """The upgrade test starts with the old code, not with the installed code."""
    code = "import followups; print(followups.__file__)"
    environment = os.environ | {"PYTHONPATH": old_code}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(old_code)
