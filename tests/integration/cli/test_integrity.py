"""Doctor's integrity checks of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.operations.doctor.database_checks import of_tables

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from world import World


def test_no_findings(world: World, engine: Engine) -> None:
    """Doctor has no findings if every constraint is valid and no sequence is behind its ids."""
    assert world
    assert list(of_tables(engine)) == []


def test_unreadable_rows(world: World, engine: Engine) -> None:
    """Doctor reports an unreadable row; after it is corrected, the advised SQL restores the constraint."""
    bad = world.follow_up()
    world.alter("ALTER TABLE follow_ups DROP CONSTRAINT ck_follow_ups_times_are_readable")
    world.sql("UPDATE follow_ups SET next_attempt_at = 'infinity'")
    (finding,) = of_tables(engine)
    assert (
        finding.detail
        == f"follow_ups has no valid constraint ck_follow_ups_times_are_readable; rows that break it: {bad}"
    )
    assert finding.advice.startswith(
        "Correct these rows, which may never be sent. Then run as the tables' owner: ALTER TABLE follow_ups "
    )
    world.sql("UPDATE follow_ups SET next_attempt_at = NULL")
    (finding,) = of_tables(engine)
    world.alter(finding.advice.removeprefix("Run as the tables' owner: "))
    assert list(of_tables(engine)) == []


def test_a_constraint_that_was_never_validated(world: World, engine: Engine) -> None:
    """Doctor reports an unvalidated constraint as missing."""
    name = "ck_follow_ups_due_date_is_readable"
    world.alter(
        f"ALTER TABLE follow_ups DROP CONSTRAINT {name}, ADD CONSTRAINT {name} CHECK (due_date > 'epoch') NOT VALID"
    )
    assert [finding.name for finding in of_tables(engine)] == ["rows"]


def test_ids_already_in_use(world: World, engine: Engine) -> None:
    """If a sequence is behind its table, doctor reports this and shows SQL that corrects it."""
    follow_up = world.follow_up()
    record = "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, 'retry', '')"
    for _ in range(3):
        world.sql(record, id=follow_up)
    assert list(of_tables(engine)) == []
    world.alter("ALTER SEQUENCE failed_attempts_id_seq RESTART")
    (finding,) = of_tables(engine)
    assert finding.name == "ids"
    world.alter(finding.advice.partition("Run as the tables' owner: ")[2])
    assert list(of_tables(engine)) == []
    world.sql(record, id=follow_up)
