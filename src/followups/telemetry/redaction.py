"""Redaction of secrets and message texts in log lines, as a second safeguard.

The first safeguard is that secrets and message texts are not logged.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import EventDict

HIDDEN = "***"

SECRET_KEYS = frozenset(
    {"api_key", "apikey", "authorization", "body", "cookie", "message", "passwd", "password", "secret", "text"}
)
"""Keys whose values are never logged, in lower case and with ``_`` instead of ``-``. The value of a key that ends with
one of these words is also omitted.
"""

LONGER = tuple(f"_{key}" for key in sorted(SECRET_KEYS))

PASSWORD_IN_URL = re.compile(r"(://[^\s:/?#@]*:)[^\s/?#]*@")
"""A pattern that finds ``://user:`` and the password, which may contain an ``@``."""

BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+")


def redact(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Replace the secrets in the event itself; this function is a structlog processor."""
    for key, value in event.items():
        event[key] = HIDDEN if value is not None and _is_secret(key) else _cleaned(value)
    return event


@lru_cache(maxsize=1024)  # log lines repeat the same few keys
def _is_secret(key: str) -> bool:
    plain = key.lower().replace("-", "_")
    return plain in SECRET_KEYS or plain.endswith(LONGER)


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - whatever was logged
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(key, str) and _is_secret(key) else _cleaned(inner) for key, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_cleaned(inner) for inner in value]
    return value


def clean(text: str) -> str:
    """Return the string with the passwords of URLs and the tokens of authorization headers hidden.

    >>> clean("no broker at redis://me:secret@host:6379/0")
    'no broker at redis://me:***@host:6379/0'
    """
    if "://" in text:
        text = PASSWORD_IN_URL.sub(rf"\1{HIDDEN}@", text)
    if "earer " in text or "EARER " in text:
        text = BEARER.sub(rf"\1{HIDDEN}", text)
    return text
