"""Arguments and options that several commands share, and the parsers of their values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Annotated, ClassVar
from uuid import UUID

import typer

from followups.channels import Channel
from followups.errors import WorkspaceNotFoundError
from followups.sending_hours import read_days
from followups.states import ReasonCode
from followups.store import workspaces
from followups.wording import SECONDS

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
RELATIVE = re.compile(r"\+(?:\d+(?:\.\d+)?[smhd])+", re.ASCII)
PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)


DUE_HELP = "2030-01-31T09:00:00Z (with an offset), +10m, or now."


@dataclass(frozen=True, slots=True)
class Due:
    """A due date as entered: a time, or a duration from now by the database's clock."""

    given: datetime | timedelta
    NOW: ClassVar[Due]

    def resolve(self, now: datetime) -> datetime:
        """Return the due date as a time. Raises `typer.BadParameter` if the due date is outside the calendar."""
        try:
            return self.given if isinstance(self.given, datetime) else now + self.given
        except OverflowError:
            message = "that is too far in the future."
            raise typer.BadParameter(message) from None


Due.NOW = Due(timedelta(0))


def parse_due(text: str) -> Due:
    """Parse ``now``, ``+10m``, ``+1h30m`` or ISO 8601 with an offset. Raises `typer.BadParameter`.

    >>> parse_due("+1h30m").given
    datetime.timedelta(seconds=5400)
    """
    if text == "now":
        return Due.NOW
    if RELATIVE.fullmatch(text):
        return Due(_duration(text))
    return Due(_moment(text, "2030-01-31T09:00:00Z, +10m or now"))


AGE = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+", re.ASCII)


def parse_age(text: str) -> timedelta:
    """Parse a duration such as ``90d`` or ``1h30m``. Raises `typer.BadParameter`.

    >>> parse_age("1d12h")
    datetime.timedelta(days=1, seconds=43200)
    """
    if not AGE.fullmatch(text):
        message = f"{text!r} is not a duration; write it as 90d, 12h or 1h30m."
        raise typer.BadParameter(message)
    return _duration(text)


@dataclass(frozen=True, slots=True)
class Since:
    """A past time as entered: absolute, or a duration before now by the database's clock."""

    given: datetime | timedelta

    def resolve(self, now: datetime) -> datetime:
        """Return the given time; an age is counted back from ``now``, but no further than ``EARLIEST``."""
        if isinstance(self.given, datetime):
            return self.given
        return now - self.given if self.given < now - EARLIEST else EARLIEST


EARLIEST = datetime(2, 1, 1, tzinfo=UTC)


def parse_since(text: str) -> Since:
    """Parse ``2h`` (two hours ago) or ISO 8601 with an offset. Raises `typer.BadParameter`.

    >>> parse_since("2h").given
    datetime.timedelta(seconds=7200)
    """
    if AGE.fullmatch(text):
        return Since(_duration(text))
    return Since(_moment(text, "2h (ago) or 2030-01-31T09:00:00Z"))


def parse_moment(text: str) -> datetime:
    """Parse a time in ISO 8601 with an offset. Raises `typer.BadParameter`."""
    return _moment(text, "2030-01-31T09:00:00Z")


def _moment(text: str, forms: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text!r} is not a time; write it as {forms}."
        raise typer.BadParameter(message) from None
    if moment.utcoffset() is None:
        message = f"{text!r} must carry an offset, as in 2030-01-31T09:00:00Z."
        raise typer.BadParameter(message)
    return moment


def _duration(text: str) -> timedelta:
    try:
        return sum((timedelta(**{UNITS[unit]: float(number)}) for number, unit in PART.findall(text)), timedelta(0))
    except OverflowError:
        message = f"{text!r} is too far in the future."
        raise typer.BadParameter(message) from None


CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)


def parse_clock(text: str) -> time:
    """Parse a time of day: ``08:00``. Raises `typer.BadParameter`.

    >>> parse_clock("8:30")
    datetime.time(8, 30)
    """
    if text == "24:00":
        return time(0)
    found = CLOCK.fullmatch(text)
    if not found:
        message = f"{text!r} is not a time of day; write it as 08:00."
        raise typer.BadParameter(message)
    return time(int(found[1]), int(found[2]))


def parse_days(text: str) -> frozenset[int]:
    """Parse days of the week such as ``mon-fri``. Raises `typer.BadParameter`."""
    try:
        return read_days(text)
    except ValueError:
        message = f"{text!r} are not days; write them as mon-fri or sat,sun."
        raise typer.BadParameter(message) from None


RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h|d)", re.ASCII)
MOST = 1_000_000
"""Largest accepted rate, in follow-ups per second, and largest accepted bucket.

No practical rate or burst reaches this limit.
"""
LEAST = 0.01 / SECONDS["d"]
"""Smallest accepted rate, in follow-ups per second.

At a lower rate, the Redis key of a large bucket would expire before the bucket is full.
"""


def parse_rate(text: str) -> float:
    """Parse ``50/s``, ``20/min``, ``1000/h`` or ``5/d`` into follow-ups per second.

    Raises `typer.BadParameter`.

    >>> parse_rate("90/min")
    1.5
    """
    found = RATE.fullmatch(text)
    if not found:
        message = f"{text!r} is not a rate; write it as 50/s, 20/min or 1000/h."
        raise typer.BadParameter(message)
    rate = float(found[1]) / SECONDS[found[2]]
    if not LEAST <= rate <= MOST:
        message = f"{text!r} should be at least 0.01/d, and at most {MOST}/s; followups pause stops sending."
        raise typer.BadParameter(message)
    return rate


def default_burst(rate: float) -> int:
    """Return the default burst: as many follow-ups as the rate allows in a second, but at least one.

    >>> default_burst(50), default_burst(1 / 3)
    (50, 1)
    """
    return max(1, math.floor(rate))


MOST_ROWS = 2**31 - 1
NO_QUOTA = -1
"""The value that `parse_quota` returns for ``none``."""


def parse_quota(text: str) -> int:
    """Parse a quota: a number of rows, or ``none``. Raises `typer.BadParameter`.

    >>> parse_quota("100,000"), parse_quota("none")
    (100000, -1)
    """
    if text == "none":
        return NO_QUOTA
    number = text.replace(",", "").replace("_", "")
    if number.isascii() and number.isdigit() and int(number) <= MOST_ROWS:
        return int(number)
    message = f"{text!r} is neither a number from 0 to {MOST_ROWS:,} nor none."
    raise typer.BadParameter(message)


EXAMPLE_ID = "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"
EXAMPLE_CHAT = "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11"

FollowUpId = Annotated[
    UUID, typer.Argument(metavar="ID", show_default=False, help="The follow-up's ID, as shown by followups list.")
]
OneFollowUp = Annotated[
    UUID | None,
    typer.Argument(metavar="[ID]", show_default=False, help="The ID of one follow-up, as shown by followups list."),
]

Codes = Annotated[
    list[ReasonCode] | None, typer.Option("--reason", help="Only follow-ups with this reason code; may be repeated.")
]

Workspace = Annotated[str | None, typer.Option("--workspace", help="Only for this workspace.", show_default="all")]
OneChannel = Annotated[Channel | None, typer.Option("--channel", help="Only for this channel.", show_default="all")]


def workspace_id_of(session: Session, name: str | None) -> UUID | None:
    """Return the id of the workspace, or None if no name is given.

    Raises a usage error for an unknown name.
    """
    if name is None:
        return None
    try:
        return workspaces.find(session, name).id
    except WorkspaceNotFoundError:
        message = f"there is no workspace {name!r}; followups workspace list shows the existing ones"
        raise typer.BadParameter(message, param_hint="--workspace") from None


def require_either(follow_up_id: UUID | None, many: object, options: str) -> None:
    """Raise a usage error unless a follow-up's ID or a bulk option is given."""
    if bool(follow_up_id) == bool(many):
        message = f"give the ID of one follow-up, or select many with {options}."
        raise typer.BadParameter(message)


def refuse_bulk_options(**options: object) -> None:
    """Raise a usage error if the command line has both a bulk option and a follow-up's ID."""
    for name, value in options.items():
        if value:
            message = "cannot be combined with the ID of one follow-up."
            raise typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}")
