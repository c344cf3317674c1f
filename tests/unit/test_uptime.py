"""The clock by which leases are judged."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from followups.uptime import uptime

KERNELS = Path("/proc/uptime")


def test_never_back() -> None:
    """It goes on, and never back."""
    first = uptime()
    time.sleep(0.001)
    assert uptime() > first


@pytest.mark.skipif(not KERNELS.exists(), reason="only Linux tells its uptime in a file")
def test_counts_sleep() -> None:
    """It is the kernel's uptime, in which the time counts for which the machine was suspended."""
    before = uptime()
    told = float(KERNELS.read_text().split()[0])
    assert before - 0.01 <= told <= uptime()
