"""Tests of the results page, which keeps the earlier results of tests that were not rerun."""

from __future__ import annotations

from typing import Any

from faults.run import report


def run(test: str, form: str, *, at: str = "2026-01-31 09:00", **broken: int) -> list[dict[str, Any]]:
    """Return the lines that a run of one test records."""
    figures = {"fault": 6, "form": form, "test": test, "seed": 7, "figures": {"recovery_s": 1.5}, "at": at}
    whole = {"fault": 0, "form": form, "test": "", "seed": 7, "figures": {}, "passed": not broken}
    return [figures | {"broken": broken}, whole]


def test_a_broken_promise_stays_until_the_next_run() -> None:
    """If a long test finds a broken promise, the report says so until the test is run again."""
    first = report([*run("one", "long", lost=2), *run("two", "long")], "")
    second = report(run("two", "long"), first)
    assert "Broken promises in all runs: {'in earlier runs': 2}" in second
    assert "`one` | 1 | 2 | recovery s 1.5 |" in second
    assert "Broken promises in all runs: none" in report(run("one", "long"), second)


def test_each_row_has_the_date_of_its_run() -> None:
    """Each row of the report shows the date on which it was measured."""
    first = report(run("one", "long"), "")
    assert "| recovery s 1.5 | 2026-01-31 09:00 |" in first
    second = report([*run("two", "long", at="2026-02-01 10:00"), *run("three", "short")], first)
    assert [row.split("|")[7].strip() for row in second.splitlines() if "recovery" in row] == [
        "2026-01-31 09:00",
        "2026-01-31 09:00",
        "2026-02-01 10:00",
    ]
    assert second.count("PostgreSQL restarted under load") == 2


def test_long_forms_do_not_change_the_short_ones() -> None:
    """Running only the long tests changes neither the results table nor the short tests' seeds."""
    first = report([*run("one", "short", lost=1), *run("two", "long")], "")
    second = report(run("two", "long"), first)
    assert "- Short forms: seeds 7; whole runs by this program: 1, passed: 0" in second
    assert "`one` | 1 | 1 | recovery s 1.5 | 2026-01-31 09:00 |" in second
    assert "{'in earlier runs': 1}" in second
