"""Tests that stop `followups demo` as a supervisor does. The tests of the wheel let the demo finish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from process_tree import assert_gone, descendants, needs_proc

DEMO = [str(Path(sys.executable).with_name("followups")), "demo"]


def bare_environment() -> dict[str, str]:
    """Return an environment without settings, in which PATH lacks this installation."""
    return {"PATH": os.defpath, "HOME": str(Path.home()), "TMPDIR": tempfile.gettempdir(), "LANG": "C.UTF-8"}


@pytest.mark.faults_long
@needs_proc
def test_a_stopped_demo_leaves_no_process() -> None:
    """SIGTERM stops all processes of an unfinished demo, which exits with code 1."""
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bare_environment()) as demo:
        assert demo.stdout
        assert demo.stdout.readline().startswith(b"The sandbox page is at http://127.0.0.1:")
        started = descendants(demo.pid)
        assert len(started) >= 6  # PostgreSQL, Valkey, sandbox, web, worker, beat
        demo.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert b"Traceback" not in said
    assert time.monotonic() - began < 30
    assert_gone(started)
