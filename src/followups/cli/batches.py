"""The steps of bulk commands and deletions: count, show a sample, confirm, run in batches."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from followups.cli import connection
from followups.cli.output import print_json, print_line, remark, remarks
from followups.operations import deletion
from followups.settings import get_settings
from followups.store import deletion as store
from followups.telemetry.escaping import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from followups.store.deletion import DeletionScope

    Batches = Callable[[], Iterator[dict[str, int]]]


SAMPLE = 5
"""Number of affected follow-ups that a bulk command lists before it runs."""

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the number and some examples; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


@dataclass(frozen=True, slots=True)
class BulkOptions:
    """The options that all bulk commands share."""

    dry_run: bool
    yes: bool
    json: bool


@dataclass(frozen=True, slots=True)
class BulkPreview:
    """What a bulk command is about to do, and how many follow-ups it affects."""

    verb: str
    """The verb's infinitive, as in "cancel"."""
    done: str
    """The past participle of the action's verb, as in "3 are cancelled"."""
    number: int
    sample: Sequence[str]
    remark: str = ""
    """An additional remark for the operator, shown before the command runs."""
    noun: str = "follow-up"

    @property
    def counted(self) -> str:
        """The count with its noun, as in "1 follow-up" or "3 follow-ups"."""
        return f"{self.number:,} {self.noun}{'' if self.number == 1 else 's'}"


def carry_out(plan: BulkPreview, batches: Batches, manner: BulkOptions) -> None:
    """Run the batches, unless this is a dry run or the operator declines.

    Each batch yields its counts, keyed by name. The progress bar shows the sum of the counts ``plan.done`` and
    ``passedOver``. After Ctrl-C, each follow-up is either completely processed or unchanged. Running the command again
    processes the remaining follow-ups.
    """
    if manner.dry_run:
        _announce(plan, json=manner.json, then="Nothing has changed: this was a dry run.")
        return
    if plan.number and not manner.yes:
        _announce(plan, json=False, then="")
        confirm(plan)
    totals: dict[str, int] = {plan.done: 0}
    interrupted = False
    try:
        _run(plan, batches(), totals)
    except KeyboardInterrupt:
        interrupted = True
    _conclude(plan, totals, interrupted=interrupted, json=manner.json)
    if interrupted:
        raise typer.Exit(1)


def confirm(plan: BulkPreview) -> None:
    """Ask for confirmation.

    Raises a usage error if stdin is not a terminal. Raises `typer.Exit` if the operator declines.
    """
    if not sys.stdin.isatty():
        message = f"{plan.counted} to {plan.verb}: there is no terminal to ask for confirmation, so confirm with --yes"
        raise typer.BadParameter(message, param_hint="--yes")
    if not typer.confirm(f"{plan.verb.capitalize()} {plan.counted}?", err=True):
        remark("Nothing has changed.")
        raise typer.Exit(1)


def _announce(plan: BulkPreview, *, json: bool, then: str) -> None:
    if json:
        print_json({"dryRun": True, "matched": plan.number, plan.done: 0, "sample": list(plan.sample)})
        return
    write = print_line if then else remark
    write(f"{plan.counted} to {plan.verb}{':' if plan.sample else '.'}")
    for line in plan.sample:
        write(f"  {line}")
    if plan.number > len(plan.sample) > 0:
        write(f"  and {plan.number - len(plan.sample):,} more")
    if plan.remark:
        write(plan.remark)
    if then:
        remark(then)


def _run(plan: BulkPreview, batches: Iterator[dict[str, int]], totals: dict[str, int]) -> None:
    with progress(plan) as bar:
        task = bar.add_task(plan.verb.capitalize(), total=plan.number)
        for batch in batches:
            for name, number in batch.items():
                totals[name] = totals.get(name, 0) + number
            bar.advance(task, sum(batch.values()))


def progress(plan: BulkPreview) -> Progress:
    """Return a progress bar on stderr, shown only on a terminal and removed when complete."""
    target = remarks()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=target, transient=True, disable=not target.is_terminal or not plan.number)


def _conclude(plan: BulkPreview, totals: dict[str, int], *, interrupted: bool, json: bool) -> None:
    if json:
        document: dict[str, Any] = {"dryRun": False, "matched": plan.number, **totals, "interrupted": interrupted}
        print_json(document)
        return
    rest = "".join(f"; {number:,} {_words(name)}" for name, number in totals.items() if name != plan.done and number)
    print_line(f"{totals[plan.done]:,} of {plan.counted} {plan.done}{rest}")
    if interrupted:
        remark("Interrupted. Completed items stay completed; run the command again to continue.")


def _words(name: str) -> str:
    """Return a count's name as words: ``inFlight`` -> ``in flight``."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)


PATIENCE = timedelta(seconds=15)
"""A deletion waits for attempts in flight for the length of a lease plus this time."""


def carry_out_deletion(whole: DeletionScope, what: str, name: str, manner: BulkOptions) -> None:
    """Delete a workspace or chat, by default after a confirmation; a dry run deletes nothing."""
    with connection.engine() as engine:
        with engine.connect() as opened:
            counted = store.count(opened, whole)
        plan = BulkPreview(verb="delete", done="deleted", number=counted, sample=())
        if not (manner.dry_run or manner.yes):
            _ask(what, name, plan.counted)
        patience = get_settings().lease + PATIENCE
        actor = connection.actor()
        carry_out(plan, lambda: deletion.delete(engine, actor, whole, patience), replace(manner, yes=True))


def _ask(what: str, name: str, counted: str) -> None:
    """Ask the operator to type the name.

    Raises a usage error if stdin is not a terminal. Raises `typer.Exit` unless the exact name is typed.
    """
    if not sys.stdin.isatty():
        message = f"{what} with {counted}: there is no terminal to ask for the name, so confirm with --yes"
        raise typer.BadParameter(message, param_hint="--yes")
    remark(f"This permanently deletes {what} with {counted}.")
    if typer.prompt(escape(f"Type {name} to delete it"), err=True, default="", show_default=False) != name:
        remark("Nothing has changed.")
        raise typer.Exit(1)
