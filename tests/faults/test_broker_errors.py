"""Tests with Redis errors from a failover, a full disk, an endless script or an ACL."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

import web
from faults.rig import Load
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faults.figures import Figures
    from faults.rig import Rig

BACK_WITHIN = 10.0
"""Seconds within which workers must resume consuming; doubled for a busy machine."""


@contextmanager
def readonly(server: redis.Redis) -> Iterator[None]:
    """Make the Redis server a replica: blocked reads fail with UNBLOCKED, and every write with READONLY."""
    server.execute_command("REPLICAOF", "127.0.0.1", "1")
    yield
    server.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def misconf(server: redis.Redis) -> Iterator[None]:
    """Make snapshots fail as if the disk were full, so that Redis answers every write with MISCONF."""
    # a snapshot file cannot replace a directory
    Path(server.config_get("dir")["dir"], "dump.rdb").mkdir(exist_ok=True)
    server.config_set("save", "3600 1")
    with suppress(redis.ResponseError):  # another snapshot is already running
        server.bgsave()
    wait_until(lambda: server.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    server.config_set("save", "")


@contextmanager
def busy(server: redis.Redis) -> Iterator[None]:
    """Run an endless script on the server, so that it answers every command with BUSY."""
    server.config_set("busy-reply-threshold", 1)
    endless = threading.Thread(target=run_endless_script, args=(server,), daemon=True)
    endless.start()
    wait_until(lambda: answers_busy(server))
    yield
    server.script_kill()
    endless.join()


def run_endless_script(server: redis.Redis) -> None:
    """Run an endless script until it is killed."""
    with suppress(redis.RedisError):
        server.eval("while true do end", 0)


def answers_busy(server: redis.Redis) -> bool:
    """Return whether the server is busy with a script."""
    try:
        server.ping()
    except redis.ResponseError:
        return True
    return False


@contextmanager
def noperm(server: redis.Redis) -> Iterator[None]:
    """Revoke the client's permission to read the queues."""
    server.execute_command("ACL", "SETUSER", "default", "-brpop")
    yield
    server.execute_command("ACL", "SETUSER", "default", "+brpop")


@contextmanager
def oom(server: redis.Redis) -> Iterator[None]:
    """Make the server exceed its memory limit, so that writes fail with OOM."""
    server.config_set("maxmemory", 1)
    yield
    server.config_set("maxmemory", 0)


ERRORS: dict[str, Callable[[redis.Redis], Any]] = {
    "READONLY": readonly,
    "MISCONF": misconf,
    "BUSY": busy,
    "NOPERM": noperm,
    "OOM": oom,
}


def answering_errors(rig: Rig, figures: Figures, names: list[str], seconds: Callable[[], float]) -> None:
    """Make the broker return one error after another, each for a while.

    While the broker returns errors, no process may exit; afterwards, all processes must work again.
    """
    assert rig.valkey
    workers = rig.start(workers=2)
    api = rig.web()
    back_after: dict[str, float] = {}
    client = redis.Redis.from_url(rig.valkey.url(), socket_timeout=5)
    with Load(rig, 30, seconds=3600) as load, client as server, api.client:
        for name in names:
            with ERRORS[name](server):
                time.sleep(seconds())
                create(api)
            returned = time.monotonic()
            (probe,) = rig.bulk(1)
            wait_until(lambda probe=probe: rig.accepted(probe), within=60)
            back_after[name] = max(back_after.get(name, 0), time.monotonic() - returned)
    rig.settle_down(within=60)
    rig.ask_each(workers)
    assert all(child.running for child in rig.processes.children)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids) + 2 * len(names) + 2}
    rounded = {f"{name.lower()}_goes_on_after_s": round(took, 2) for name, took in back_after.items()}
    figures.keep(24, verdict, errors=len(names), **rounded)
    assert max(back_after.values()) < 2 * BACK_WITHIN


def create(api: web.Api) -> None:
    """Create a follow-up that is due immediately, through the API."""
    chat = api.world.chat()
    body = {"chatId": str(chat), "message": "Hello?", "dueDate": web.in_days(0)}
    assert api.client.post(web.FOLLOW_UPS, json=body).status_code == 201


def test_errors_to_reads_and_writes(breakable: Rig, figures: Figures) -> None:
    """If Redis answers with errors, no process ends, no follow-up is lost, and consumption soon resumes."""
    names = breakable.rng.sample(list(ERRORS), len(ERRORS))
    answering_errors(breakable, figures, names, lambda: 1 + breakable.rng.random())


@pytest.mark.faults_long
def test_errors_for_long(breakable: Rig, figures: Figures) -> None:
    """Processes survive many Redis errors that last up to twenty seconds each."""
    names = [breakable.rng.choice(list(ERRORS)) for _ in range(25)]
    answering_errors(breakable, figures, names, lambda: 20 * breakable.rng.random())


def test_stopped_in_the_middle(breakable: Rig) -> None:
    """If a worker is stopped while the broker rejects reads, the worker drains and exits cleanly."""
    assert breakable.valkey
    (worker,) = breakable.start()
    with redis.Redis.from_url(breakable.valkey.url(), socket_timeout=5) as server, noperm(server):
        wait_until(lambda: breakable.log_events("broker_unreachable", worker.command.name))
        worker.ask()
        wait_until(lambda: not worker.running, within=30)
    assert worker.exit_code == 0, worker.tail()
