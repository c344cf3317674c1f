"""The demo's presentations: a live picture on a terminal, a line for each event in a pipe, JSON at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rich.live import Live

from followups.cli.demo import summary
from followups.cli.demo.view import Picture, state_of
from followups.cli.output import console, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from followups.cli.demo.score import Score, Standing


class Audience(Protocol):
    """What a presentation of the demo can show."""

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Show the current state of all follow-ups."""

    def hear(self, name: str) -> None:
        """Show that a user replied."""

    def close(self, score: Score) -> None:
        """Show the result."""

    def leave(self) -> None:
        """Restore the terminal; called also when the demo was interrupted."""


class Terminal:
    """A live picture, and a panel at the end."""

    def __init__(self, sandbox: str) -> None:
        """Take the address of the sandbox's page."""
        self._console = console()
        self._sandbox = sandbox
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Draw the picture."""
        size = self._console.size
        self._live.update(Picture(standings, now, self._sandbox, size.width, size.height).render(), refresh=True)

    def hear(self, name: str) -> None:
        """Do nothing: the picture shows the effect."""

    def close(self, score: Score) -> None:
        """Print the panel below the last picture."""
        self.leave()
        self._console.print(summary.panel(score))

    def leave(self) -> None:
        """Keep the last picture on the screen."""
        self._live.stop()


class Pipe:
    """One line for each event."""

    def __init__(self, sandbox: str) -> None:
        """Take the address of the sandbox's page."""
        self._known: dict[UUID, tuple[str, int]] = {}
        say(f"The sandbox page is at {sandbox}/ while this runs.")

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Print what has changed."""
        for each in standings:
            found = (each.status.value, each.attempts if each.trying_again else 0)
            if found != self._known.get(each.scheduled.id, ("pending", 0)):
                lag = "" if each.lag is None else f"  lag {each.lag:.1f} ms"
                due = f"due second {each.scheduled.part.due:5.2f}"
                say(f"{each.chat:5} {due}  {state_of(each, now)}{lag}")
            self._known[each.scheduled.id] = found

    def hear(self, name: str) -> None:
        """Print the reply."""
        say(f"{name:5} writes back")

    def close(self, score: Score) -> None:
        """Print the summary."""
        for line in summary.lines(score):
            say(line)

    def leave(self) -> None:
        """Do nothing: there is nothing to restore."""


class Program:
    """One JSON object at the end."""

    def watch(self, standings: Sequence[Standing], now: datetime) -> None:
        """Do nothing."""

    def hear(self, name: str) -> None:
        """Do nothing."""

    def close(self, score: Score) -> None:
        """Print the JSON object."""
        print_json(score.document())

    def leave(self) -> None:
        """Do nothing: there is nothing to restore."""
