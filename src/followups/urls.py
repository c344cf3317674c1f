"""Database and broker URLs, checked before anything connects; a wrong one is an error with a reason.

No reason contains any part of the URL, since a part may belong to a password that was not escaped.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    from sqlalchemy import URL

HIGHEST_PORT = 65_535

_LIBPQS_HOSTS = re.compile(
    r"(?P<before>\w+://(?:[^:/@]*(?::[^@]*)?@)?)(?P<hosts>[^/?@]*[,%][^/?@]*)(?P<after>(?:[/?].*)?)", re.DOTALL
)
"""Unparsed by SQLAlchemy: several hosts, ``host1:5432,host2:5432``, and a socket's path, ``%2Frun``."""

_HOST = re.compile(r"(?P<name>\[[^]]*\]|[^:]*)(?::(?P<port>.*))?", re.DOTALL)

_NUMBERS = ("db", "socket_timeout", "socket_connect_timeout", "health_check_interval", "max_connections")
"""Parameters of a broker's URL that are numbers."""

ESCAPE = "its password holds an @, which should be written as %40"
NO_PORT = f"its port should be a number from 1 to {HIGHEST_PORT}"


def database_url(text: str) -> URL:
    """Parse a PostgreSQL URL, of one host or of several, for psycopg. Raises ValueError with a reason.

    >>> database_url("postgres://one,two:5433/chats?target_session_attrs=primary").query["host"]
    'one,two'
    """
    from sqlalchemy import make_url  # noqa: PLC0415 - most commands that only check settings do without

    theirs = _LIBPQS_HOSTS.fullmatch(text)
    hosts = [_split(one) for one in theirs["hosts"].split(",")] if theirs else []
    try:
        url = make_url(f"{theirs['before']}{theirs['after']}" if theirs else text)
    except ValueError:
        raise ValueError(NO_PORT) from None
    if hosts:
        url = url.update_query_dict({"host": ",".join(name for name, _ in hosts)})
        if any(port for _, port in hosts):
            url = url.update_query_dict({"port": ",".join(port for _, port in hosts)})
    _check_database(url)
    return url.set(drivername="postgresql+psycopg")


def _split(host: str) -> tuple[str, str]:
    found = _HOST.fullmatch(host)
    if found is None:
        message = "its hosts should be separated by commas"
        raise ValueError(message)
    return unquote(found["name"].strip("[]")), found["port"] or ""


def _check_database(url: URL) -> None:
    from psycopg import ProgrammingError  # noqa: PLC0415 - as SQLAlchemy above
    from psycopg.conninfo import make_conninfo  # noqa: PLC0415

    dialect = url.set(drivername="postgresql+psycopg").get_dialect()()
    try:
        options = dialect.create_connect_args(url)[1]
    except Exception:  # noqa: BLE001 - SQLAlchemy's own kinds quote the URL
        raise ValueError(NO_PORT) from None
    if "@" in str(options.get("host", "")):
        raise ValueError(ESCAPE)
    for port in str(options.get("port") or "").split(","):
        _check_port(port)
    try:
        make_conninfo(**options)
    except ProgrammingError:
        message = "it has a parameter that libpq does not know"
        raise ValueError(message) from None


def _check_port(port: str) -> None:
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) <= HIGHEST_PORT):
        raise ValueError(NO_PORT)


def check_broker_url(text: str) -> None:
    """Raise ValueError with a reason unless redis-py and kombu both parse the URL and read it alike."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(NO_PORT) from None
    if port == 0:
        raise ValueError(NO_PORT)
    name = parts.hostname or ""
    if parts.netloc.count("@") > 1:
        raise ValueError(ESCAPE)
    if {",", ";"} & set(name) or parts.fragment:
        message = "it should name one host"
        raise ValueError(message)
    if not re.fullmatch(r"(/[0-9]*)?", parts.path):
        message = "its path should be the number of a database, /0"
        raise ValueError(message)
    for parameter, value in parse_qsl(parts.query):
        if parameter in _NUMBERS and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
            message = f"its parameter {parameter} should be a number"
            raise ValueError(message)
