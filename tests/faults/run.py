"""Run the fault tests with many seeds, and write the results to RESULTS.md.

    uv run python tests/faults/run.py --seeds 20          # the short forms, about two minutes a seed
    uv run python tests/faults/run.py --long              # each long form once, some hours
    uv run python tests/faults/run.py --figures FILE      # only write the table, from figures kept before

FOLLOWUPS_TEST_SERVERS selects other servers: ``replicated``, ``pooled`` or both. With ``replicated``, PostgreSQL has a
synchronous standby, which takes over whenever a test restarts PostgreSQL. With ``pooled``, workers, beat and web reach
PostgreSQL through a real PgBouncer in session mode. Run the long tests of faults 1 to 8 with these servers:

    FOLLOWUPS_TEST_SERVERS=replicated,pooled uv run pytest -m faults_long tests/faults/test_kills.py ...

Figures are appended to ``--figures FILE`` (one JSON object per line). The fault tests can therefore be run in parts,
stopped and continued. The results table is always computed from all figures in FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
UNSEEDED = ("test_guards.py", "test_model.py", "test_known_bugs.py", "test_report.py")
"""Tests that run only once, because they do not depend on the seed."""

FAULTS = {
    1: "Worker killed with SIGKILL at each step",
    2: "Worker frozen past its lease, then resumed",
    3: "A commit succeeds, but the worker sees an error",
    4: "The receiver accepts a message, but its answer is lost",
    5: "Rolling restart of every process with SIGTERM under load",
    6: "PostgreSQL restarted under load, or its sessions terminated",
    7: "Broker killed and restarted several times within seconds",
    8: "Broker emptied with FLUSHALL during a burst",
    9: "Half-open TCP connections to broker and database",
    10: "Two or three concurrent beats, one of which is killed",
    11: "Every broker message duplicated and shuffled",
    12: "A host's clock is 10 minutes off",
    13: "Receiver failing, 429 storm, outage and recovery",
    14: "1 % of the answers are late",
    15: "A poison message that kills its worker",
    16: "Races of cancel and deliver, and of reply and create",
    17: "Thousands of follow-ups behind two stuck chats",
    18: "An open database snapshot under load",
    19: "A workspace with 100 times the load",
    20: "Load for a long time",
    21: "Foreign server defaults: isolation, read-only mode, date style, encoding",
    22: "Failover to a streaming replica, through a proxy",
    23: "Database and broker both unreachable for longer than a lease",
    24: "Redis answers reads and writes with errors",
    25: "Breaker open with a backlog above MAX_IN_FLIGHT",
    26: "Migration during a transaction that never releases its locks",
    27: "Cancel and schedule in one transaction while replies arrive",
    28: "Random combinations of these faults",
}


Key = tuple[int, str]
"""A fault's number and a test's displayed name."""


def main() -> int:
    """Run the requested tests; return 1 if a test failed or a promise was broken."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.figures or Path(temporary, "figures.jsonl")
        failures = 0
        for number in range(options.seeds):
            seed = options.first_seed + number
            skipped = UNSEEDED if number else ()
            failures += _run(seed, kept, "not faults_long", 4, f"seed {number + 1} of {options.seeds}", skipped)
        if options.long:
            failures += _run(options.first_seed, kept, "faults_long", 1, "the long forms", ())
        lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if not lines:
        sys.stderr.write("There are no figures: give --seeds N or --long.\n")
        return 2
    earlier = options.results.read_text() if options.results.exists() else ""
    options.results.write_text(report(lines, earlier))
    broken = sum(bool(line.get("broken")) for line in lines if line["fault"])
    sys.stdout.write(f"Wrote {options.results}; runs that failed: {failures}, tests that broke a promise: {broken}.\n")
    return int(bool(failures or broken))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, help="how often to run the short forms")
    parser.add_argument("--long", action="store_true", help="run the long forms, once")
    first = random.SystemRandom().randrange(1_000_000)
    parser.add_argument("--first-seed", type=int, default=first, help="the others count on from it (default: any)")
    parser.add_argument("--figures", type=Path, help="a file to which figures are added")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    return parser


def _run(seed: int, kept: Path, marker: str, processes: int, title: str, skipped: Sequence[str]) -> int:
    """Run the tests once, and record the result under fault 0; return 1 on failure."""
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-m", marker, "-n", str(processes), "--no-header"]
    command += [f"--ignore={HERE / name}" for name in skipped]
    environment = os.environ | {"FOLLOWUPS_TEST_SEED": str(seed), "FOLLOWUPS_TEST_FIGURES": str(kept.resolve())}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    summary = done.stdout.strip().rpartition("\n")[2]
    sys.stdout.write(f"{title} ({seed}): {summary}\n")
    sys.stdout.flush()
    if done.returncode:
        sys.stdout.write(done.stdout)
    line = {
        "fault": 0,
        "form": "long" if marker == "faults_long" else "short",
        "seed": seed,
        "passed": not done.returncode,
    }
    with kept.open("a") as file:
        file.write(json.dumps(line | {"summary": summary, "test": "", "figures": {}}) + "\n")
    return int(bool(done.returncode))


def report(lines: list[dict[str, Any]], earlier: str) -> str:
    """Return the results as Markdown; results of tests that were not run come from ``earlier``.

    Most fault tests have a short and a long form. If the long form of a test was not run, its earlier result is copied.
    Earlier results of short forms are copied only if no short form was run.
    """
    short, long = _rows(lines, "short"), _rows(lines, "long")
    kept = {key: row for key, row in _earlier_rows(earlier, "Long forms").items() if key not in long}
    long |= kept
    told = re.search(r"^- Short forms: (.+)$", earlier, re.MULTILINE)
    if not short and told:
        short = _earlier_rows(earlier, "Short forms")
        kept |= short
        seeds = told[1]
    else:
        seeds = _seeds(lines)
    parts = [_head(lines, seeds, len(long), sum(_broken(row) for row in kept.values()))]
    parts += [
        f"## {title}\n\n{_table(rows)}\n" for title, rows in (("Short forms", short), ("Long forms", long)) if rows
    ]
    return "\n".join(parts)


def _earlier_rows(results: str, title: str) -> dict[Key, str]:
    """Return the rows below a heading of a results page, each with its date."""
    date = re.search(r"^- Date: (.+?) UTC$", results, re.MULTILINE)
    rows = {}
    for row in results.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) >= 6 and cells[0].isdigit():
            dated = len(cells) > 6
            shown = [cells[0], "", *cells[2:6], cells[6] if dated else date[1] if date else ""]
            rows[int(cells[0]), cells[2]] = f"| {' | '.join(shown)} |".replace("|  |", "| |")
    return rows


def _broken(row: str) -> int:
    return int(row.split("|")[5])


def _seeds(lines: list[dict[str, Any]]) -> str:
    seeds = sorted({line["seed"] for line in lines if line["form"] == "short"})
    runs = [line for line in lines if line["form"] == "short" and not line["fault"]]
    passed = sum(line["passed"] for line in runs)
    return f"seeds {', '.join(map(str, seeds)) or 'none'}; whole runs by this program: {len(runs)}, passed: {passed}"


def _head(lines: list[dict[str, Any]], seeds: str, long: int, broken_before: int) -> str:
    broken: Counter[str] = Counter({"in earlier runs": broken_before} if broken_before else {})
    for line in lines:
        broken.update(line.get("broken") or {})
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "sqlalchemy", "psycopg"))
    return f"""# Fault tests: results

This page is generated by `uv run python tests/faults/run.py`; do not edit it by hand.

- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC
- Machine: {_machine()}
- Python {platform.python_version()}, {packages}; PostgreSQL 18 and Valkey 9, embedded, on the same machine
- Short forms: {seeds}
- Long forms: {long} tests, each with the date of its last run
- Broken promises in all runs: {dict(broken) or "none (lost 0, doubled 0, after cancel 0, contradictions 0)"}

In the short forms, a lease is 3 s and ticks are 0.1 s apart, unless a test needs other values. "Broken" counts
broken promises in all runs: messages lost, doubled, begun after a cancel, silently late, out of order or misdirected,
contradictory records, and changed final states. Figures are medians over the runs, with the largest value in brackets.
"""


def _machine() -> str:
    model = platform.processor() or platform.machine()
    with_model = Path("/proc/cpuinfo")
    if with_model.exists():
        named = [line for line in with_model.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores ({model}), {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _rows(lines: list[dict[str, Any]], form: str) -> dict[Key, str]:
    grouped: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["form"] == form and line["fault"]:
            grouped[line["fault"], f"`{line['test'].removeprefix('test_')}`"].append(line)
    rows = {}
    for (fault, test), runs in grouped.items():
        broken = sum(sum((run.get("broken") or {}).values()) for run in runs)
        last = max(run.get("at", "") for run in runs) or f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        rows[fault, test] = f"| {fault} | | {test} | {len(runs)} | {broken} | {_figures(runs)} | {last} |"
    return rows


def _table(rows: dict[Key, str]) -> str:
    table = ["| # | fault | test | runs | broken | figures | run |", "| --- | --- | --- | --- | --- | --- | --- |"]
    seen = set()
    for (fault, _), row in sorted(rows.items()):
        table.append(row if fault in seen else row.replace("| |", f"| {FAULTS[fault]} |", 1))
        seen.add(fault)
    return "\n".join(table)


def _figures(runs: list[dict[str, Any]]) -> str:
    values: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        for name, value in run["figures"].items():
            values[name].append(value)
        if run.get("repeated"):
            values["absorbed_by_key"].append(run["repeated"])
        if run.get("unknown"):
            values["named_unknown"].append(run["unknown"])
    return "; ".join(f"{name.replace('_', ' ')} {_summary(each)}" for name, each in values.items())


def _summary(values: list[Any]) -> str:
    if all(isinstance(value, int | float) for value in values):
        middle, worst = statistics.median(values), max(values)
        return f"{middle:g}" if middle == worst else f"{middle:g} ({worst:g})"
    if all(isinstance(value, dict) for value in values):
        total: Counter[str] = Counter()
        for value in values:
            if all(isinstance(count, int) for count in value.values()):
                total.update(value)
        if total:
            return ", ".join(f"{key}: {count}" for key, count in sorted(total.items()))
    last = values[-1]
    return (json.dumps(last) if isinstance(last, dict | list) else str(last)).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
