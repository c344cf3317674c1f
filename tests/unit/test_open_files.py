"""The limit on a worker's open files."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

RAISED = """
import json, resource, sys
from followups.telemetry.logs import configure_logging
from followups.worker.open_files import raise_limit
configure_logging("json", "info")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
raise_limit(int(sys.argv[3]))
print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))
"""


def raised(soft: int, hard: int, concurrency: int) -> tuple[list[int], str]:
    """Call `raise_limit` in a process with these limits; return its limits afterwards, and its log."""
    argv = [sys.executable, "-c", RAISED, str(soft), str(hard), str(concurrency)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("soft", "concurrency", "after"),
    [(256, 100, 500), (256, 400, 1100), (1000, 100, 1000)],
)
def test_the_limit_is_raised_as_far_as_needed(soft: int, concurrency: int, after: int) -> None:
    """A worker raises its own limit for its concurrent calls; a higher limit stays as it is."""
    hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert raised(soft, hard, concurrency) == ([after, hard], "")


def test_a_limit_that_is_too_low_is_logged() -> None:
    """A process that may not raise its limit far enough raises it as far as allowed, and logs a warning."""
    limits, log = raised(256, 512, 400)
    assert limits == [512, 512]
    (line,) = map(json.loads, log.splitlines())
    assert (line["event"], line["level"], line["limit"], line["needed"]) == ("too_few_open_files", "warning", 512, 1100)
