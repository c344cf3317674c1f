"""Prometheus for tests: the rules from deploy/, with shorter times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import httpx

MINUTE = 2
"""In these tests, a minute lasts this many seconds."""
SHORTER = (
    ("max(followups_last_tick_timestamp_seconds) > 30", "max(followups_last_tick_timestamp_seconds) > 3"),
    ("max(followups_oldest_overdue_seconds) > 600", "max(followups_oldest_overdue_seconds) > 8"),
    ("max(followups_oldest_overdue_seconds) > 60", "max(followups_oldest_overdue_seconds) > 4"),
    ("followups:lag_seconds:bucket[10s]))) > 10", "followups:lag_seconds:bucket[10s]))) > 4"),
)
"""Thresholds of the lateness alerts in seconds, each with a shorter value for tests."""


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, query: str) -> list[Any]:
        """Return the current result of a Prometheus query."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", answer
        series: list[Any] = answer["data"]["result"]
        return series

    def firing(self) -> set[str]:
        """Return the names of the firing alerts."""
        return {one["metric"]["alertname"] for one in self.ask('ALERTS{alertstate="firing"}')}

    def fired(self, within: int) -> set[str]:
        """Return the names of the alerts that fired in the last ``within`` seconds."""
        return {one["metric"]["alertname"] for one in self.ask(f'ALERTS{{alertstate="firing"}}[{within}s]')}


def shortened(rules: str) -> str:
    """Return the rules with shortened times: two seconds for each minute, and a `for` of one second."""
    rules = re.sub(r"\[(\d+)m\]", lambda found: f"[{int(found[1]) * MINUTE}s]", rules)
    rules = re.sub(r"offset (\d+)m", lambda found: f"offset {int(found[1]) * MINUTE}s", rules)
    rules = re.sub(r"for: \w+", "for: 1s", rules)
    for long, short in SHORTER:
        assert long in rules
        rules = rules.replace(long, short)
    return rules
