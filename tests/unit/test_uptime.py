"""The uptime clock, which measures leases."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from followups.uptime import uptime

KERNELS = Path("/proc/uptime")


def test_the_clock_never_goes_back() -> None:
    """The uptime clock only moves forward."""
    first = uptime()
    time.sleep(0.001)
    assert uptime() > first


@pytest.mark.skipif(not KERNELS.exists(), reason="only Linux tells its uptime in a file")
def test_the_clock_counts_suspension() -> None:
    """The uptime comes from the kernel and includes the time during which the machine was suspended."""
    before = uptime()
    told = float(KERNELS.read_text().split()[0])
    assert before - 0.01 <= told <= uptime()
