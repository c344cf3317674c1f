"""Who watches the demo: a terminal (a live picture), a pipe (a line for each event), or a program (nothing)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rich.live import Live

from followups.cli.demo import closing
from followups.cli.demo.view import Picture, state_of
from followups.cli.output import console, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from followups.cli.demo.score import Score, Standing


class Audience(Protocol):
    """What the demo tells."""

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """See where everything stands."""

    def hear(self, name: str) -> None:
        """Hear that a user wrote back."""

    def close(self, score: Score) -> None:
        """See how it ended."""

    def leave(self) -> None:
        """Give the terminal back; also when the demo was stopped."""


class Terminal:
    """A live picture, and a panel at the end."""

    def __init__(self, sandbox: str) -> None:
        """Take the address of the sandbox's page."""
        self._console = console()
        self._sandbox = sandbox
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Draw."""
        size = self._console.size
        self._live.update(Picture(standings, now, self._sandbox, size.width, size.height).render(), refresh=True)

    def hear(self, name: str) -> None:
        """Nothing: the picture shows what it comes to."""

    def close(self, score: Score) -> None:
        """Print the panel below the last picture."""
        self.leave()
        self._console.print(closing.panel(score))

    def leave(self) -> None:
        """Leave the last picture where it is."""
        self._live.stop()


class Pipe:
    """A line for each thing that happens."""

    def __init__(self, sandbox: str) -> None:
        """Take the address of the sandbox's page."""
        self._known: dict[UUID, tuple[str, int]] = {}
        say(f"The sandbox page is at {sandbox}/ while this runs.")

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Tell what has changed."""
        for each in standings:
            found = (each.status.value, each.attempts if each.trying_again else 0)
            if found != self._known.get(each.scheduled.id, ("pending", 0)):
                lag = "" if each.lag is None else f"  lag {each.lag:.1f} ms"
                due = f"due second {each.scheduled.part.due:5.2f}"
                say(f"{each.chat:5} {due}  {state_of(each, now)}{lag}")
            self._known[each.scheduled.id] = found

    def hear(self, name: str) -> None:
        """Tell it."""
        say(f"{name:5} writes back")

    def close(self, score: Score) -> None:
        """Print the summary."""
        for line in closing.lines(score):
            say(line)

    def leave(self) -> None:
        """Nothing to give back."""


class Program:
    """One JSON object, at the end."""

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Nothing."""

    def hear(self, name: str) -> None:
        """Nothing."""

    def close(self, score: Score) -> None:
        """Print the object."""
        print_json(score.document())

    def leave(self) -> None:
        """Nothing to give back."""
