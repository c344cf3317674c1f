"""Tests of `followups health` for processes that are frozen, stuck, dead or no longer consuming."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import web
from followups.embedded import EmbeddedValkey, Processes, free_port
from followups.settings import load_settings
from followups.worker.open_files import FILES_OF_A_CALL, OTHER_FILES
from stack import CELERY, Stack, kill, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.embedded import Child

COMMAND = str(Path(sys.executable).with_name("followups"))

BOUND = 15.0
"""Seconds until a fault must be reported: ten without a heartbeat, plus time to start the command."""

DEAF = '''
"""Celery's consumer asks for no work any more once the file is there; all the rest of the worker goes on."""
import os
from pathlib import Path
from kombu.transport import redis
start = redis.Channel._brpop_start
redis.Channel._brpop_start = lambda channel: None if Path(os.environ["DEAF"]).exists() else start(channel)
'''


def health(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `followups health` as a supervisor does, with the runtime directory as its only setting."""
    environment = {"PATH": os.environ["PATH"], "FOLLOWUPS_RUNTIME_DIR": stack.options["FOLLOWUPS_RUNTIME_DIR"]}
    command = [COMMAND, "health", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def says(stack: Stack, role: str, code: int, *words: str) -> None:
    """Wait until `followups health` exits with ``code`` and prints one line that contains ``words``."""

    def so() -> bool:
        ran = health(stack, role)
        said, other = (ran.stderr, ran.stdout) if code else (ran.stdout, ran.stderr)
        return ran.returncode == code and said.count("\n") == 1 and not other and all(word in said for word in words)

    wait_until(so, within=BOUND, every=1.0)  # each check starts a process, so the checks are a second apart


def finding(stack: Stack, name: str) -> dict[str, Any]:
    """Return one of doctor's findings."""
    environment = os.environ | stack.environment()
    command = [COMMAND, "doctor", "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    (found,) = [check for check in json.loads(ran.stdout)["checks"] if check["name"] == name]
    answer: dict[str, Any] = found
    return answer


@pytest.fixture
def own_runtime(stack: Stack, tmp_path: Path) -> Stack:
    """Return a system, not yet started, with its own runtime directory."""
    stack.options["FOLLOWUPS_RUNTIME_DIR"] = str(tmp_path / "run")
    return stack


def test_a_stopped_worker(own_runtime: Stack) -> None:
    """An idle worker is healthy, whether selected by name or not. A stopped worker is unhealthy until it resumes."""
    worker = own_runtime.worker("first")
    says(own_runtime, "worker", 0, "1 worker", "first@")
    assert health(own_runtime, "worker", "--name", "first").returncode == 0
    other = health(own_runtime, "worker", "-n", "second")
    assert (other.returncode, other.stdout) == (1, "")
    assert "No worker second has a heartbeat" in other.stderr
    worker.signal(signal.SIGSTOP)
    says(own_runtime, "worker", 1, "first@", str(worker.pid), "no heartbeat")
    worker.signal(signal.SIGCONT)
    says(own_runtime, "worker", 0)


def test_a_killed_workers_heartbeat_is_ignored(own_runtime: Stack) -> None:
    """If a worker is killed, its heartbeat file is ignored, and the next worker removes it."""
    first = own_runtime.worker("first")
    kill(first)
    says(own_runtime, "worker", 1, "No worker has a heartbeat")
    own_runtime.worker("second")
    says(own_runtime, "worker", 0, "1 worker", "second@")
    assert len(list(Path(own_runtime.options["FOLLOWUPS_RUNTIME_DIR"]).iterdir())) == 1


def test_a_worker_that_answers_ping_but_consumes_nothing(own_runtime: Stack, tmp_path: Path) -> None:
    """A worker that no longer reads its queues is unhealthy, although it answers Celery's ping."""
    (tmp_path / "deaf.py").write_text(DEAF)
    trigger = tmp_path / "now"
    environment = own_runtime.environment() | {"PYTHONPATH": str(tmp_path), "DEAF": str(trigger)}
    own_runtime.processes.spawn("worker", [*CELERY, "worker", "-n", "w@%h", "-I", "deaf"], environment=environment)
    wait_until(lambda: "ready." in (own_runtime.processes.logs / "worker.log").read_text(), within=60)
    time.sleep(2)  # by now, the broker has answered the worker's poll
    says(own_runtime, "worker", 0)
    trigger.touch()
    says(own_runtime, "worker", 1, "w@", "has not asked the broker for work")
    workers, processes = (finding(own_runtime, name) for name in ("workers", "processes"))
    assert "w@" in workers["detail"]
    assert "has not asked the broker for work" in workers["detail"]
    assert "has not asked the broker for work" in processes["detail"]
    assert workers["advice"].startswith("Restart it")
    ping = [*CELERY, "inspect", "ping", "--timeout", "3"]
    ran = subprocess.run(ping, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False)
    assert "pong" in ran.stdout
    trigger.unlink()
    says(own_runtime, "worker", 0)


def test_an_idle_worker_is_healthy(own_runtime: Stack) -> None:
    """A worker without tasks, or with only one of the queues, is healthy."""
    environment = own_runtime.environment()
    own_runtime.processes.spawn("idle", [*CELERY, "worker", "-n", "idle@%h", "-Q", "deliver"], environment=environment)
    says(own_runtime, "worker", 0, "1 worker", "idle@")
    time.sleep(11)  # longer than the consumer may stay silent
    says(own_runtime, "worker", 0, "1 worker", "idle@")


def test_a_worker_raises_its_limit_on_open_files(own_runtime: Stack) -> None:
    """A worker that starts with a low limit on open files raises it to what its concurrent calls need."""
    shell = ["sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh"]
    worker = own_runtime.processes.spawn(
        "limited", [*shell, *CELERY, "worker", "-n", "limited@%h"], environment=own_runtime.environment()
    )
    needed = FILES_OF_A_CALL * own_runtime.settings.concurrency + OTHER_FILES
    assert needed > 256
    wait_until(lambda: resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)[0] == needed, within=60)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_broker_outage_causes_no_restart(own_runtime: Stack, *, frozen: bool) -> None:
    """Worker and beat stay healthy during a broker outage, because restarting them would not help."""
    with EmbeddedValkey() as valkey, Processes() as processes:
        settings = own_runtime.settings.model_dump() | {"broker_url": valkey.url()}
        own = replace(own_runtime, settings=load_settings(**settings), processes=processes)
        own.worker()
        own.beat()
        says(own, "worker", 0)
        says(own, "beat", 0)
        server = valkey.child
        server.signal(signal.SIGSTOP if frozen else signal.SIGKILL)
        end = time.monotonic() + 25
        while time.monotonic() < end:
            assert (health(own, "worker").returncode, health(own, "beat").returncode) == (0, 0)
            time.sleep(1)
        if frozen:
            server.signal(signal.SIGCONT)
        else:
            valkey.restart()
        says(own, "worker", 0)


def test_a_stopped_beat(own_runtime: Stack) -> None:
    """Beat is healthy while it ticks, and unhealthy once it is stopped or has ended."""
    says(own_runtime, "beat", 1, "No beat has a heartbeat")
    beat = own_runtime.beat()
    says(own_runtime, "beat", 0, "1 beat")
    beat.signal(signal.SIGSTOP)
    says(own_runtime, "beat", 1, "no heartbeat")
    beat.signal(signal.SIGCONT)
    says(own_runtime, "beat", 0)
    beat.ask()
    wait_until(lambda: beat.exit_code is not None)
    says(own_runtime, "beat", 1, "No beat has a heartbeat")
    assert not list(Path(own_runtime.options["FOLLOWUPS_RUNTIME_DIR"]).iterdir())


def test_a_directory_that_cannot_be_used(stack: Stack) -> None:
    """If a process cannot write its heartbeat, it still sends messages and logs one warning."""
    stack.options["FOLLOWUPS_RUNTIME_DIR"] = "/proc/nowhere"
    stack.start()
    stack.wait_until_done(stack.world.follow_up())
    for name in ("worker", "beat"):
        (line,) = stack.log_events("no_heartbeat", name)
        assert "/proc/nowhere" in line["error"]
        assert "FOLLOWUPS_RUNTIME_DIR" in line["advice"]


@pytest.fixture
def web_process(own_runtime: Stack) -> Iterator[tuple[Child, str]]:
    """Return a running web process and its port."""
    child, url = web.start(own_runtime.processes, own_runtime.environment())
    return child, url.rpartition(":")[2]


def test_web(own_runtime: Stack, web_process: tuple[Child, str]) -> None:
    """`health web` succeeds only while the web process answers; an invalid port is an error."""
    child, port = web_process
    assert health(own_runtime, "web", "--port", port).returncode == 0
    ran = health(own_runtime, "web", "--port", str(free_port()))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Web does not answer at 127.0.0.1:" in ran.stderr
    assert health(own_runtime, "web", "--port", "x").returncode == 2
    child.signal(signal.SIGSTOP)
    assert health(own_runtime, "web", "--port", port).returncode == 1
    child.signal(signal.SIGCONT)
    assert health(own_runtime, "web", "--port", port).returncode == 0


def test_another_server_is_not_web(own_runtime: Stack) -> None:
    """Another server on web's port does not count as a healthy web process."""
    own_runtime.sandbox()
    ran = health(own_runtime, "web", "--port", str(own_runtime.sandbox_port))
    assert ran.returncode == 1
    assert "is not web" in ran.stderr
