"""Explores each reachable state once, and finds the shortest path to a broken promise."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from faults.model.steps import steps
from faults.model.world import Broken, ModelRow, ModelWorld, Protocol, break_promise
from followups.states import Status

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Exploration:
    """The result of an exploration; ``trace`` is the shortest path to a broken guarantee, or empty."""

    worlds: int
    endings: int
    """The number of explored states in which both follow-ups have ended."""
    broken: str = ""
    trace: tuple[str, ...] = ()


def explore(protocol: Protocol) -> Exploration:
    """Explore every reachable state in breadth-first order."""
    start = ModelWorld((ModelRow(), ModelRow(exists=not protocol.creates_late)))
    came_by: dict[ModelWorld, tuple[ModelWorld | None, str]] = {start: (None, "")}
    onward: dict[ModelWorld, list[ModelWorld]] = {}
    waiting = deque([start])
    while waiting:
        world = waiting.popleft()
        onward[world] = []
        for name, _, make in steps(world, protocol):
            try:
                new = make()
                _check(new)
                new = new if protocol.without else new.without_dead_jobs()
            except Broken as broken:
                return Exploration(len(came_by), 0, str(broken), (*_way(came_by, world), name))
            onward[world].append(new)
            if new not in came_by:
                came_by[new] = (world, name)
                waiting.append(new)
    endings = {world for world in onward if not any(row.pending for row in world.rows)}
    stuck = _unable_to_reach(endings | _at_the_horizon(onward, protocol), onward)
    if stuck:
        return Exploration(len(came_by), len(endings), "nothing lost", _way(came_by, stuck[0]))
    return Exploration(len(came_by), len(endings))


def _check(world: ModelWorld) -> None:
    """Raise `Broken` if the state is forbidden."""
    for row, accepted in zip(world.rows, world.accepted, strict=True):
        if row.status is Status.SENT and not accepted:
            break_promise("no lie: sent, and never accepted")
        if accepted and row.status in {Status.FAILED, Status.CANCELLED} and "unknown" not in row.reason:
            break_promise(f"no lie: accepted, and ended as {row.status} ({row.reason})")
        if world.replied and row.pending and not row.begun and not row.cancel_requested:
            break_promise("a reply stops what is not in flight")


def _at_the_horizon(onward: dict[ModelWorld, list[ModelWorld]], protocol: Protocol) -> set[ModelWorld]:
    """Return the states in which a pending follow-up has reached the maximum number of claims."""
    return {world for world in onward if any(row.pending and row.token >= protocol.most_claims for row in world.rows)}


def _unable_to_reach(goals: set[ModelWorld], onward: dict[ModelWorld, list[ModelWorld]]) -> list[ModelWorld]:
    backward: dict[ModelWorld, list[ModelWorld]] = {world: [] for world in onward}
    for world, next_worlds in onward.items():
        for each in next_worlds:
            backward[each].append(world)
    able, waiting = set(goals), deque(goals)
    while waiting:
        for world in backward[waiting.popleft()]:
            if world not in able:
                able.add(world)
                waiting.append(world)
    return [world for world in onward if world not in able]


def _way(came_by: dict[ModelWorld, tuple[ModelWorld | None, str]], world: ModelWorld) -> tuple[str, ...]:
    names: list[str] = []
    at: ModelWorld | None = world
    while at is not None:
        before, name = came_by[at]
        names += [name] if name else []
        at = before
    return tuple(reversed(names))


def shown(exploration: Exploration, protocol: Protocol, write: Callable[[str], object]) -> None:
    """Return the result as readable text."""
    write(f"{protocol}: {exploration.worlds} worlds, {exploration.endings} endings\n")
    if exploration.broken:
        write(f"BROKEN: {exploration.broken}\n" + "".join(f"  {n}. {s}\n" for n, s in enumerate(exploration.trace, 1)))
