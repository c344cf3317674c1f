"""Runs the checks in the order in which their findings are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.operations.doctor import Finding, broker_checks, connection_checks, database_checks, process_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from followups.operations.doctor.process_checks import Replies
    from followups.settings import Settings


def run(
    settings: Settings, engine: Engine, ask_workers: Callable[[], Replies] | None, *, connects: bool
) -> Iterator[Finding]:
    """Yield the findings of all checks.

    The workers are checked only if ``ask_workers`` is given, because their replies may take seconds. ``connects`` adds
    the checks of this process's own connections to the database, the broker and the endpoint. The web process
    skips them: its connections prove nothing about those of the workers, and a silent endpoint would block one of its
    threads.
    """
    yield connection_checks.timeouts(settings)
    yield from database_checks.databases(settings, engine)
    yield from database_checks.of_server(engine)
    if connects:
        yield from connection_checks.of_database(engine)
    yield from database_checks.of_database(settings, engine)
    yield from database_checks.of_tables(engine)
    yield from database_checks.of_rooms(settings, engine)
    reachable = True
    for finding in broker_checks.broker(settings):
        reachable = reachable and (finding.ok or finding.name != "broker")
        yield finding
    if reachable:
        if connects:
            yield from connection_checks.of_broker(settings)
        yield from broker_checks.of_broker(settings)
    if connects:
        yield connection_checks.transport(settings)
    if ask_workers and reachable:
        yield process_checks.workers(ask_workers)
    elif ask_workers:
        yield Finding("workers", "not asked", "Repair the broker first.")
    yield process_checks.of_this_machine(settings)
