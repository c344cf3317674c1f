"""The commands `pause` and `resume`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from followups.cli import connection, pause
from followups.database import make_engine
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.store import leases
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

    RunCommand = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent the command from requesting a tick."""
    monkeypatch.setattr(connection, "ask_for_tick", lambda: None)


def test_paused_listed_and_resumed(run: RunCommand, world: World, engine: Engine, settings: Settings) -> None:
    """A pause is listed with the number of follow-ups held by it.

    `resume` prints how many follow-ups are released and which pauses remain.
    """
    name = str(world.workspace_id)
    assert run("pause", "--workspace", name).stdout == f"Workspace {name} is paused.\n"
    assert run("pause", "--workspace", name).stdout == f"Workspace {name} is paused already.\n"
    assert run("pause", "--channel", "waha").stdout == "Channel waha, of every workspace, is paused.\n"
    follow_up = world.follow_up()
    begin(engine, settings, claim(engine, settings).leases)
    listed = run("pause", "--list", "--json").document
    assert [(each["workspace"], each["channel"], each["held"]) for each in listed] == [
        (None, "waha", 0),
        (name, None, 1),
    ]
    heading, first, second = run("pause", "--list").stdout.splitlines()
    assert heading.split() == ["WORKSPACE", "CHANNEL", "SINCE", "HELD"]
    assert (first.split()[:2], second.split()[:2]) == (["all", "waha"], [name, "all"])
    ran = run("resume", "--workspace", name)
    assert ran.stdout == f"Workspace {name} is resumed; held follow-ups that continue: 1.\n"
    assert "Still paused: Channel waha, of every workspace," in ran.stderr
    assert world.row(follow_up).next_attempt_at is None
    assert run("resume", "--workspace", name).stdout == f"Workspace {name} was not paused.\n"
    assert run("resume", "--channel", "waha", "--json").document == {"resumed": True, "freed": 0, "paused": []}
    assert run("pause", "--list").stderr == "Nothing is paused.\n"


def test_an_interrupted_resume_continues(run: RunCommand, world: World, engine: Engine, settings: Settings) -> None:
    """If `resume` is interrupted after the pause has ended, the next `resume` releases the remaining follow-ups."""
    name = str(world.workspace_id)
    run("pause", "--workspace", name)
    world.follow_up()
    begin(engine, settings, claim(engine, settings).leases)
    world.sql("UPDATE pauses SET ended_at = now()")
    assert run("resume", "--workspace", name, "--json").document == {"resumed": False, "freed": 1, "paused": []}


def test_pause_waits_for_beginning_attempts(
    run: RunCommand, world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pause` waits for the end of every worker transaction that may be older than the pause.

    If such a transaction stays open, `pause` reports it.
    """
    monkeypatch.setattr(pause, "UNDER_WAY", 0.3)
    url = settings.database_url.get_secret_value()
    worker = make_engine(url, application_name="followups-worker")
    with worker.connect() as connection:
        connection.execute(text("SELECT 1"))
        started = time.monotonic()
        ran = run("pause", "--workspace", world.workspace_id)
        assert time.monotonic() - started >= 0.3
        assert "attempts that it has begun continue" in ran.stderr
    worker.dispose()
    assert run("pause", "--workspace", world.workspace_id).stderr == ""


@pytest.fixture
def worker(settings: Settings) -> Iterator[Engine]:
    """Return an engine configured like a worker's."""
    engine = make_engine(settings.database_url.get_secret_value(), application_name="followups-worker")
    yield engine
    engine.dispose()


def test_pause_waits_with_any_database_role(
    run: RunCommand,
    world: World,
    worker: Engine,
    settings: Settings,
    unprivileged_url: str,
    environment: pytest.MonkeyPatch,
) -> None:
    """If `pause` cannot see other sessions, it still waits for attempts that are beginning."""
    environment.setenv("FOLLOWUPS_DATABASE_URL", unprivileged_url)
    environment.setattr(pause, "UNDER_WAY", 60.0)
    world.follow_up()
    (lease,) = claim(worker, settings).leases
    rules = leases.Rules(settings.lease, settings.max_lateness, early=timedelta(seconds=1))
    with ThreadPoolExecutor(1) as pool, worker.connect() as beginning:
        assert leases.begin_if_leased(beginning, [lease], rules)
        pausing_now = pool.submit(run, "pause", "--workspace", world.workspace_id)
        wait_until(lambda: world.scalar("SELECT count(*) FROM pauses"))
        with pytest.raises(TimeoutError):
            pausing_now.result(0.3)
        beginning.commit()
        ran = pausing_now.result(10)
    assert (ran.code, ran.stderr) == (0, "")
    assert world.row(lease.id).begun_at is not None


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize("options", [(), ("--workspace", "nobody"), ("--channel", "telegraph")])
def test_wrong_choices(run: RunCommand, command: str, options: tuple[str, ...]) -> None:
    """If the selection is empty or unknown, `pause` exits with a one-sentence usage error."""
    ran = run(command, *options)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("followups: ")
    assert ran.stderr.count("\n") == 1
