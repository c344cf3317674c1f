"""The command `prune`."""

from __future__ import annotations

import gzip
import json
import stat
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from followups.cli import prune
from followups.store import pruning
from world import FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from uuid import UUID

    from world import World

    RunCommand = Callable[..., Any]

DAY = timedelta(days=1)


def ended(world: World, days: int) -> UUID:
    """Insert a follow-up that failed the given number of days ago, after one attempt."""
    one = world.follow_up(
        status="failed", reason="rejected: no", finished_at=datetime.now(UTC) - days * DAY, message="Hällo"
    )
    world.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, 'rejected', 'no')", id=one
    )
    return one


def archived(path: Path) -> list[dict[str, Any]]:
    """Return the contents of an archive."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_deleted(run: RunCommand, world: World) -> None:
    """Finished follow-ups older than the given age are deleted and counted.

    Pruning keeps younger follow-ups and pending ones.
    """
    ended(world, 91)
    kept = {ended(world, 89), world.follow_up(due=-300 * DAY)}
    ran = run("prune", "--older-than", "90d", "--yes")
    assert (ran.code, ran.stdout) == (0, "1 of 1 finished follow-up deleted\n")
    assert {row.id for row in world.rows()} == kept
    assert run("prune", "--older-than", "90d", "--yes", "--json").document["deleted"] == 0


def test_a_dry_run_changes_nothing(run: RunCommand, world: World, tmp_path: Path) -> None:
    """A dry run of `prune` prints the count and a sample, and creates no archive."""
    old = ended(world, 91)
    ran = run("prune", "--older-than", "90d", "--dry-run", "--archive", tmp_path / "a.gz")
    assert ran.stdout.splitlines() == ["1 finished follow-up to delete:", f"  {old}"]
    assert len(world.rows()) == 1
    assert not (tmp_path / "a.gz").exists()


@pytest.mark.parametrize("texts", [True, False])
def test_archived(
    run: RunCommand, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, texts: bool
) -> None:
    """Deleted rows are archived as JSON lines, in a file that only its owner can read.

    The archive contains message texts only with --message.
    """
    monkeypatch.setattr(pruning, "BATCH", 2)
    ids = [ended(world, 100 - n) for n in range(5)]
    path = tmp_path / "old.jsonl.gz"
    options = ["--message"] if texts else []
    assert run("prune", "--older-than", "90d", "--archive", path, "--yes", *options).code == 0
    lines = archived(path)
    assert [line["id"] for line in lines] == [str(one) for one in ids]
    assert {line["message"] for line in lines} == {"Hällo" if texts else None}
    assert lines[0].keys() == {*FIELDS, "workspace", "attempts", "retryOf", "failedAttempts"}
    assert lines[0]["workspace"] == str(world.workspace_id)
    assert [each["outcome"] for each in lines[0]["failedAttempts"]] == ["rejected"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert world.rows() == []


def test_only_archived_rows_are_deleted(
    run: RunCommand, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk fills up, only complete batches are archived and only archived rows are deleted."""
    monkeypatch.setattr(pruning, "BATCH", 2)
    ids = [ended(world, 100 - n) for n in range(5)]
    real, calls = prune._write, iter(range(9))  # noqa: SLF001 - simulates a full disk

    def full(*arguments: Any) -> None:
        if next(calls):
            raise OSError(28, "No space left on device", "old.jsonl.gz")
        real(*arguments)

    monkeypatch.setattr(prune, "_write", full)
    ran = run("prune", "--older-than", "90d", "--archive", tmp_path / "old.jsonl.gz", "--yes")
    assert (ran.code, ran.stdout) == (1, "")
    assert "No space left on device" in ran.stderr
    assert [line["id"] for line in archived(tmp_path / "old.jsonl.gz")] == [str(one) for one in ids[:2]]
    assert {row.id for row in world.rows()} == set(ids[2:])


def test_an_archive_is_not_overwritten(run: RunCommand, world: World, tmp_path: Path) -> None:
    """If the archive file already exists, `prune` exits with a usage error and deletes nothing."""
    ended(world, 91)
    path = tmp_path / "old.jsonl.gz"
    path.write_text("mine")
    ran = run("prune", "--older-than", "90d", "--archive", path, "--yes")
    assert (ran.code, path.read_text(), len(world.rows())) == (2, "mine", 1)
    assert "already exists; name a new file" in ran.stderr


@pytest.mark.parametrize("options", [(), ("--older-than", "90"), ("--older-than", "-1d"), ("--older-than", "9999999d")])
def test_wrong_ages(run: RunCommand, world: World, options: tuple[str, ...]) -> None:
    """`prune` with an invalid age is a usage error, reported in one sentence.

    `prune` without a terminal and without --yes is a usage error.
    """
    ended(world, 91)
    ran = run("prune", *options, "--yes")
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert run("prune", "--older-than", "90d").code == 2
    assert len(world.rows()) == 1
