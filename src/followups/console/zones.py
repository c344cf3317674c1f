"""Formats and parses times in the signed-in person's time zone. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from followups.errors import InvalidRequestError
from followups.sending_hours import zone_of
from followups.wording import Sentence

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo


WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class AmbiguousTimeError(InvalidRequestError):
    """The clock shows this time twice, because it is set back on that day; choose one of the two times."""

    slug = "ambiguous-time"


@dataclass(frozen=True, slots=True)
class Zone:
    """A time zone, given by its name."""

    name: str = "UTC"

    @property
    def info(self) -> ZoneInfo:
        """The time zone's data, or UTC if the time zone is unknown on this machine."""
        found = zone_of(self.name) or zone_of("UTC")
        if found is None:
            message = "this machine has no time zones"
            raise LookupError(message)
        return found

    def written(self, moment: datetime) -> str:
        """Format a time for display, to the second.

        >>> Zone("America/Sao_Paulo").written(datetime(2030, 1, 31, 12, tzinfo=UTC))
        '2030-01-31 09:00:00'
        """
        return moment.astimezone(self.info).strftime("%Y-%m-%d %H:%M:%S")

    def day(self, moment: datetime) -> Sentence:
        """Format a time for display as weekday, date, hour and minute.

        >>> str(Zone("UTC").day(datetime(2030, 1, 31, 12, tzinfo=UTC)))
        'Thursday 2030-01-31 12:00'
        """
        local = moment.astimezone(self.info)
        return Sentence("{day} {time}", day=Sentence(WEEKDAYS[local.weekday()]), time=f"{local:%Y-%m-%d %H:%M}")

    def typed(self, moment: datetime) -> str:
        """Format a time as the value of a browser's time field, to the second.

        >>> Zone("UTC").typed(datetime(2030, 1, 31, 12, tzinfo=UTC))
        '2030-01-31T12:00:00'
        """
        return moment.astimezone(self.info).strftime("%Y-%m-%dT%H:%M:%S")

    def read(self, text: str, fold: str = "") -> datetime:
        """Return the instant at which clocks in the zone show the typed time.

        ``fold`` chooses between the two occurrences of a repeated hour: "first" or "second". Raises
        `InvalidRequestError` for an invalid time, or for a time that the clocks skip. Raises `AmbiguousTimeError` for a
        time that occurs twice.

        >>> Zone("Europe/Berlin").read("2030-01-31T09:00").isoformat()
        '2030-01-31T08:00:00+00:00'
        """
        try:
            local = datetime.fromisoformat(text)
        except ValueError:
            message = Sentence("The due date is not a time; write it as 2030-01-31T09:00.")
            raise InvalidRequestError(message, field="due_date") from None
        if local.utcoffset() is not None:
            return local
        try:
            first, second = (local.replace(tzinfo=self.info, fold=each).astimezone(UTC) for each in (0, 1))
        except OverflowError:
            message = Sentence("The due date must be in the years 2 to 9998.")
            raise InvalidRequestError(message, field="due_date") from None
        if first == second:
            return first
        if first.astimezone(self.info).replace(tzinfo=None) != local:
            message = Sentence(
                "The clocks of {zone} are set forward and skip {time} on that day; choose another time.",
                zone=self.name,
                time=f"{local:%H:%M}",
            )
            raise InvalidRequestError(message, field="due_date")
        if fold not in {"first", "second"}:
            message = Sentence(
                "The clocks of {zone} are set back and show {time} twice on that day; choose one.",
                zone=self.name,
                time=f"{local:%H:%M}",
            )
            raise AmbiguousTimeError(message, field="due_date")
        return first if fold == "first" else second
