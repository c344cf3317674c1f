"""Doctor's checks of the database server's settings and of a connection pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from databases import drop_database
from followups.database import make_engine
from followups.operations.doctor import database_checks
from followups.operations.doctor.database_checks import durability, of_server
from foreign import HOSTILE, create_database_of_encoding, set_defaults
from pgbouncer import MISSING, PROGRAM, PgBouncer

if TYPE_CHECKING:
    from followups.operations.doctor import Finding
    from followups.settings import Settings


def found(url: str) -> dict[str, Finding]:
    """Return doctor's findings about the database at a URL, keyed by name."""
    engine = make_engine(url, pool_size=1)
    findings = {finding.name: finding for finding in of_server(engine)}
    engine.dispose()
    return findings


def test_usual_settings(database_url: str) -> None:
    """Doctor has no findings about a server that uses PostgreSQL's default settings."""
    assert found(database_url) == {}


def test_defaults_of_others(database_url: str) -> None:
    """Doctor accepts a stricter default isolation level, but reports asynchronous commits and gives advice."""
    set_defaults(database_url, {**HOSTILE, "synchronous_commit": "off"})
    findings = found(database_url)
    assert findings.keys() == {"isolation", "durability"}
    assert findings["isolation"].ok
    assert findings["isolation"].detail.startswith("default_transaction_isolation is repeatable read; ")
    assert findings["durability"].detail.startswith("synchronous_commit is off: a crash may lose")
    assert findings["durability"].advice.startswith("Set synchronous_commit to on for this database")


@pytest.mark.parametrize(
    ("commit", "standbys", "forgets"),
    [
        ("off", "", True),
        ("off", "*", True),
        ("local", "", False),
        ("local", "*", True),
        ("remote_write", "*", False),
        ("on", "*", False),
        ("remote_apply", "*", False),
    ],
)
def test_durability(commit: str, standbys: str, *, forgets: bool) -> None:
    """Doctor's durability check fails if a machine crash could lose commits.

    If there are no synchronous standbys, `local` is as safe as `on`.
    """
    assert [not finding.ok for finding in durability(commit, standbys)] == [True] * forgets


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
@pytest.mark.parametrize(("mode", "ok"), [("session", True), ("transaction", False)])
def test_poolers(settings: Settings, database_url: str, mode: str, *, ok: bool) -> None:
    """If a pooler may change the session between transactions, doctor's check fails.

    A pooler that keeps the session between transactions passes doctor's check.
    """
    with PgBouncer(database_url, pool_mode=mode) as pooler:
        assert found(pooler.url()) == {}
        engine = make_engine(pooler.url(), pool_size=1)
        first, *_ = database_checks.databases(settings, engine)
        engine.dispose()
    assert (first.name, first.ok) == ("database", ok)
    assert ok or first.advice.startswith("Use session pooling (pool_mode = session in PgBouncer), or a port without")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_another_encoding(settings: Settings, postgres_url: str, encoding: str) -> None:
    """If the database cannot store every text, doctor's check fails with advice.

    Doctor skips the other checks if the database's encoding is unsupported.
    """
    url = create_database_of_encoding(postgres_url, name := f"test_{uuid4().hex}", encoding)
    engine = make_engine(url, pool_size=1)
    (finding,) = database_checks.databases(settings, engine)
    assert finding.detail.endswith(f": its encoding is {encoding}, which cannot store every text")
    assert finding.advice.startswith("Create a database with ENCODING 'UTF8' (from template0), move the data,")
    assert found(url) == {}
    engine.dispose()
    drop_database(postgres_url, name)
