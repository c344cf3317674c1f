"""Tests with unusual server defaults: every guarantee holds, or the server is refused."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

import web
from databases import drop_database
from faults.rig import Load, running
from foreign import HOSTILE, create_database_of_encoding, set_defaults
from stack import wait_until

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from faults.figures import Figures
    from faults.rig import Rig
    from followups.settings import Settings
    from pgbouncer import PgBouncer

CLIENTS = 8
WORDS = "Noch da? \N{WAVING HAND SIGN}"
"""A message with a character that no single-byte encoding contains."""

ENVIRONMENT = {"PGTZ": "Asia/Kolkata", "PGDATESTYLE": "German", "PGCLIENTENCODING": "LATIN1"}


def send_replies_and_creates(rig: Rig, api: web.Api, pairs: int) -> Counter[tuple[str, int]]:
    """Send each of ``pairs`` chats a reply and a create request at the same time; count the responses."""
    chats = [api.chat() for _ in range(pairs)]

    def act(one: tuple[str, str]) -> tuple[str, int]:
        kind, chat_id = one
        if kind == "reply":
            return kind, api.message(chat_id, "user").status_code
        body = {"chatId": chat_id, "dueDate": datetime.now(UTC).isoformat(), "message": WORDS}
        answer = api.post(web.FOLLOW_UPS, body)
        assert answer.status_code == 409 or answer.json()["createdAt"].endswith("Z")
        return kind, answer.status_code

    order = [(kind, chat_id) for chat_id in chats for kind in rig.rng.sample(["reply", "create"], 2)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        return Counter(clients.map(act, order))


def on_foreign_defaults(rig: Rig, figures: Figures, pairs: int, rate: float, seconds: float) -> None:
    """On a database with unusual defaults, run concurrent replies and create requests, then a load."""
    direct = rig.world.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    set_defaults(direct, HOSTILE)
    rig.options |= ENVIRONMENT
    api = rig.web()
    with closing(api.client):
        answers = send_replies_and_creates(rig, api, pairs)
        outcomes = Counter(f"{row.status} {rig.world.row(row.id).reason}" for row in rig.world.rows())
        assert answers["reply", 201] == pairs
        assert answers["create", 201] + answers["create", 409] == pairs
        assert outcomes == Counter({"cancelled user_replied": answers["create", 201]})
        rig.start(workers=3, beats=2)
        with Load(rig, rate, seconds) as load:
            spoken = {api.create(due=datetime.now(UTC).isoformat(), text=WORDS)["id"] for _ in range(pairs)}
            load.wait()
    took = rig.settle_down(within=60)
    verdict = rig.verdict()
    assert load.refused == 0
    assert {one["messageLength"] for one in rig.received() if one["followUpId"] in spoken} == {len(WORDS)}
    assert verdict.ended == Counter({"sent": len(load.ids) + pairs, "cancelled": answers["create", 201]})
    assert (rig.events("step_failed"), rig.events("database_unreachable")) == ([], [])
    figures.keep(21, verdict, all_sent_after_the_last_s=round(took, 2), cancelled=answers["create", 201])


def test_foreign_defaults(rig: Rig, figures: Figures) -> None:
    """Unusual server defaults (a stricter isolation level, other formats, another encoding) change no outcome.

    The unusual defaults are set on the server, for the role and in the environment.
    """
    on_foreign_defaults(rig, figures, pairs=40, rate=100, seconds=2)


@pytest.fixture
def pooled(pgbouncer: PgBouncer, settings: Settings, engine: Engine, dice: random.Random) -> Iterator[Rig]:
    """Return a system that reaches its database through PgBouncer."""
    by_way = settings.model_copy(update={"database_url": type(settings.database_url)(pgbouncer.url())})
    with running(by_way, engine, dice) as rig:
        yield rig


def test_foreign_defaults_behind_a_pooler(pooled: Rig, figures: Figures) -> None:
    """Unusual PostgreSQL defaults change no outcome, even if PgBouncer reuses sessions."""
    on_foreign_defaults(pooled, figures, pairs=20, rate=100, seconds=2)


@pytest.mark.faults_long
def test_foreign_defaults_for_minutes(pooled: Rig, figures: Figures) -> None:
    """Unusual database defaults change no outcome, even under load for minutes."""
    on_foreign_defaults(pooled, figures, pairs=400, rate=200, seconds=180)


def test_read_only_default(rig: Rig, figures: Figures) -> None:
    """Nothing is sent while new sessions are read-only by default; all follow-ups are sent afterwards."""
    url = rig.settings.database_url.get_secret_value()
    ids = rig.bulk(50)
    set_defaults(url, {"default_transaction_read_only": "on"})
    rig.start(workers=2)
    wait_until(lambda: rig.events("database_unreachable"))
    assert rig.received() == []
    set_defaults(url, {"default_transaction_read_only": "off"})
    rig.world.scalar("""
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
    """)
    took = rig.settle_down()
    verdict = rig.verdict()
    assert verdict.ended == Counter({"sent": len(ids)})
    figures.keep(21, verdict, read_only_sent_after_s=round(took, 2))


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_foreign_encoding(rig: Rig, figures: Figures, postgres_url: str, encoding: str) -> None:
    """Every process refuses a database whose encoding is not UTF8, and reports the fix."""
    name = f"test_{uuid4().hex}"
    rig.options["FOLLOWUPS_DATABASE_URL"] = create_database_of_encoding(postgres_url, name, encoding)
    try:
        release = rig.process("release", "release")
        rig.beat()
        rig.worker()
        api = rig.web()
        wait_until(lambda: release.exit_code is not None)
        refused = f"its encoding is {encoding}, which cannot store every text: create a database with ENCODING 'UTF8'"
        assert release.exit_code == 1
        assert refused in release.tail()
        (reason,) = {each["reason"] for each in wait_until(lambda: rig.events("database_refused"))}
        assert refused in reason
        with closing(api.client):
            ready = api.get("/readyz")
        assert ready.status_code == 503
        assert refused in ready.json()["checks"]["database"]["detail"]
        figures.keep(21, refused=encoding)
    finally:
        rig.processes.stop()
        drop_database(postgres_url, name)
