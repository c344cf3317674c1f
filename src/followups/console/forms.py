"""Parsing of HTML forms and query strings, with limits."""

from __future__ import annotations

from urllib.parse import parse_qsl
from uuid import UUID

from followups.errors import InvalidRequestError
from followups.wording import Sentence

MAX_FIELDS = 300
"""Maximum number of fields in a form or query string: one check box per row, and a dozen other fields."""


class Fields:
    """The fields of a form or query string, in the order in which they were sent."""

    def __init__(self, encoded: str) -> None:
        """Parse the fields. Raises `InvalidRequestError` if there are too many or if they are not valid UTF-8."""
        try:
            pairs = parse_qsl(encoded, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        except (ValueError, UnicodeDecodeError):
            message = Sentence("A form must have at most {most} fields, in UTF-8.", most=MAX_FIELDS)
            raise InvalidRequestError(message) from None
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def text(self, name: str, default: str = "") -> str:
        """Return the last value of a field, without surrounding white space."""
        return self.raw(name, default).strip()

    def raw(self, name: str, default: str = "") -> str:
        """Return the last value of a field as the user typed it, with line breaks as line feeds."""
        return self._values.get(name, [default])[-1].replace("\r\n", "\n")

    def every(self, name: str) -> list[str]:
        """Return all values of the field."""
        return self._values.get(name, [])

    def uuid(self, name: str) -> UUID | None:
        """Return the value of a field as a UUID, or None if it is missing or not a UUID."""
        return uuid_or_none(self.text(name))

    def __contains__(self, name: object) -> bool:
        """Return whether the form or query string contains the field."""
        return name in self._values


def uuid_or_none(text: str) -> UUID | None:
    """Return the text as a UUID, or None if it is not a UUID.

    >>> uuid_or_none("0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"), uuid_or_none("x")
    (UUID('0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51'), None)
    """
    try:
        return UUID(text)
    except ValueError:
        return None
