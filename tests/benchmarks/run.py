"""Measure this service and comparable systems alternately, on the same servers and in one session.

    uv run --group benchmarks python tests/benchmarks/run.py throughput --count 50000 --rounds 3
    uv run --group benchmarks python tests/benchmarks/run.py throughput --only ours,loop --delay 0.05
    uv run --group benchmarks python tests/benchmarks/run.py answers --count 50000
    uv run --group benchmarks python tests/benchmarks/run.py lag --rate 100 --seconds 60 --others 1000000
    uv run --group benchmarks python tests/benchmarks/run.py tick --others 10000,1000000,10000000
    uv run --group benchmarks python tests/benchmarks/run.py cost startup workers --json figures.json --plot plot.svg

The program asserts nothing: only the ratios within one run are meaningful. All servers use the loopback interface, and
the program ends by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measures
from arena import Arena
from contestants import EVERYBODY, LIMIT, Contestant, Ours
from plot import bars

if TYPE_CHECKING:
    from collections.abc import Callable

Results = dict[str, dict[str, dict[str, dict[str, float]]]]
"""The median, minimum and maximum of each figure, by measurement and contestant."""


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("measure", nargs="+", choices=[*MEASURES, "all"])
    made.add_argument("--only", default="", help=f"contestants, of {','.join(EVERYBODY)} (default: all)")
    made.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    made.add_argument("--count", type=int, default=10_000, help="follow-ups of a backlog (default: 10000)")
    made.add_argument("--delay", type=float, default=0.0, help="seconds until the chat answers (default: 0)")
    made.add_argument("--slow", type=float, default=0.0, help="share of answers after 5 s (default: 0)")
    made.add_argument("--concurrency", type=int, default=100, help="calls at once in a process, for answers")
    made.add_argument("--rate", default="100", help="follow-ups a second that fall due, e.g. 100,500")
    made.add_argument("--seconds", type=float, default=60.0, help="for how long (default: 60)")
    made.add_argument("--others", default="0", help="others that are pending, e.g. 10000,1000000")
    made.add_argument("--json", type=Path, help="write the figures there")
    made.add_argument("--plot", type=Path, help="draw the throughput there, as SVG")
    return made


def main() -> int:
    """Run the requested measurements and print their results."""
    options = parser().parse_args()
    results: Results = {}
    with Arena() as arena:
        for name in MEASURES if "all" in options.measure else options.measure:
            for title, found in MEASURES[name](arena, options).items():
                results[title] = found
                show(title, found)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot and (drawn := next((v for k, v in results.items() if k.startswith("throughput")), None)):
        options.plot.write_text(bars({name: figures["per_s"]["median"] for name, figures in drawn.items()}))
    return 0


def contestants(options: argparse.Namespace, default: tuple[str, ...]) -> list[str]:
    """Return the names of the systems to measure."""
    return options.only.split(",") if options.only else list(default)


def in_turns(
    arena: Arena, names: list[str], rounds: int, turn: Callable[[Contestant], measures.Figures]
) -> dict[str, dict[str, dict[str, float]]]:
    """Give each contestant one turn in each round."""
    everybody = [EVERYBODY[name](arena) for name in names]
    return taken({one.name: lambda one=one: turn(one) for one in everybody}, rounds)


def taken(turns: dict[str, Callable[[], measures.Figures]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Run every turn once in each round; print progress on stderr."""
    found: dict[str, list[measures.Figures]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in measures.shuffled(list(turns), number):
            figures = turns[name]()
            found[name].append(figures)
            said = ", ".join(f"{key} {value:,.1f}" for key, value in figures.items())
            sys.stderr.write(f"round {number + 1} of {rounds}: {name}: {said}\n")
    return {name: measures.spread(each) for name, each in found.items()}


def throughput(arena: Arena, options: argparse.Namespace) -> Results:
    """Return the rate, in follow-ups per second, at which a backlog is sent."""
    names = contestants(options, ("ours", "tuned", "one", "loop", "client", "celery", "dramatiq", "procrastinate"))
    control = f"delay={options.delay}&slow={options.slow}"
    kind = f"answers after {options.delay:g} s" if options.delay else "answers at once"
    kind += f", {options.slow:.0%} after 5 s" if options.slow else ""
    found = in_turns(arena, names, options.rounds, lambda one: measures.throughput(one, options.count, control))
    return {f"throughput: {options.count:,} due, {kind}": found}


def answers(arena: Arena, options: argparse.Namespace) -> Results:
    """Return the throughput with immediate, delayed and partly slow responses."""
    kinds = {"at once": "", "after 50 ms": "delay=0.05", "1 % after 5 s": "slow=0.01"}
    found = taken(
        {
            kind: lambda control=control: measures.throughput(  # type: ignore[misc]
                Ours(arena, concurrency=options.concurrency), options.count, control
            )
            for kind, control in kinds.items()
        },
        options.rounds,
    )
    return {f"answers: {options.count:,} due, {options.concurrency} calls at once in each process": found}


def lag(arena: Arena, options: argparse.Namespace) -> Results:
    """Return the lag of follow-ups."""
    results: Results = {}
    for others in map(int, options.others.split(",")):
        measures.others_pending(arena, others)
        for rate in map(float, options.rate.split(",")):
            names = contestants(options, ("ours", "eta"))
            found = in_turns(
                arena, names, options.rounds, lambda one, rate=rate: measures.lag(one, rate, options.seconds)
            )
            results[f"lag: {rate:g}/s for {options.seconds:g} s, {others:,} others pending"] = found
    return results


def snapshot(arena: Arena, options: argparse.Namespace) -> Results:
    """Return the lag while a snapshot is kept open."""
    rate = float(options.rate.split(",")[0])
    found = in_turns(
        arena, ["ours"], options.rounds, lambda one: measures.lag(one, rate, options.seconds, snapshot=True)
    )
    return {f"lag under a held snapshot: {rate:g}/s for {options.seconds:g} s": found}


def tick(arena: Arena, options: argparse.Namespace) -> Results:
    """Return how long a claim takes while the given number of other rows are pending."""
    results: Results = {}
    for others in sorted(map(int, options.others.split(","))):
        measures.others_pending(arena, others)
        rounds = [measures.tick(arena) for _ in range(options.rounds)]
        results[f"tick: {others:,} pending"] = {Ours.name: measures.spread(rounds)}
    return results


def cost(arena: Arena, options: argparse.Namespace) -> Results:
    """Return a backlog's cost: memory, WAL and dead tuples."""
    rounds = [measures.cost(Ours(arena), options.count) for _ in range(options.rounds)]
    return {f"cost: a backlog of {options.count:,}": {Ours.name: measures.spread(rounds)}}


def workers(arena: Arena, options: argparse.Namespace) -> Results:
    """Return the throughput of one, two and four worker processes."""
    found = taken(
        {
            f"{number} worker processes": lambda number=number: measures.throughput(  # type: ignore[misc]
                Ours(arena, workers=number), options.count
            )
            for number in (1, 2, 4)
        },
        options.rounds,
    )
    return {f"workers: {options.count:,} due": found}


def startup(arena: Arena, options: argparse.Namespace) -> Results:
    """Return how long the command line and a worker take to start."""
    rounds = [measures.startup(arena) for _ in range(options.rounds)]
    return {"start-up": {Ours.name: measures.spread(rounds)}}


MEASURES: dict[str, Callable[[Arena, argparse.Namespace], Results]] = {
    "throughput": throughput,
    "answers": answers,
    "lag": lag,
    "snapshot": snapshot,
    "tick": tick,
    "cost": cost,
    "workers": workers,
    "startup": startup,
}


def show(title: str, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print medians and spreads. If the upper limit was measured, also print the ratios to it."""
    print(f"\n{title}")  # noqa: T201 - the result
    limit: Any = found.get(LIMIT, {}).get("per_s", {}).get("median")
    for name, figures in sorted(found.items(), key=lambda one: -one[1].get("per_s", {"median": 0})["median"]):
        said = [
            f"{key.replace('_', ' ')} {v['median']:,.2f} ({v['least']:,.2f}..{v['greatest']:,.2f})"
            for key, v in figures.items()
        ]
        ratio = f"; {figures['per_s']['median'] / limit:.2f} of the limit" if limit and "per_s" in figures else ""
        print(f"  {name:32} {'; '.join(said)}{ratio}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
