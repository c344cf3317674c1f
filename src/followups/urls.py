"""Validation of database, broker and endpoint URLs before a connection is opened. Each error states the reason.

Error messages never quote the URL, because any part of it may belong to an unescaped password.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    from sqlalchemy import URL

HIGHEST_PORT = 65_535

_LIBPQS_HOSTS = re.compile(
    r"(?P<before>\w+://(?:[^:/@]*(?::[^@]*)?@)?)(?P<hosts>[^/?@]*[,%][^/?@]*)(?P<after>(?:[/?].*)?)", re.DOTALL
)
"""Hosts in a form that SQLAlchemy does not parse.

This is either several hosts (``host1:5432,host2:5432``) or a socket path (``%2Frun``).
"""

_HTTP_HOST = re.compile(
    r"(?:[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::[0-9]*)?"
)
"""Host and port of an HTTP URL that libcurl accepts."""

_HOST = re.compile(r"(?P<name>\[[^]]*\]|[^:]*)(?::(?P<port>.*))?", re.DOTALL)

_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}
_WHOLE_NUMBERS = (
    *("connect_timeout", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
)
"""Parameters that must be whole numbers; libpq checks them only when it connects."""

_BROKER = re.compile(
    r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^]]*\]|[^:/?#@]*)(?::(?P<port>[^/?#]*))?"
    r"(?:/(?P<database>[^?#]*))?(?:\?(?P<query>[^#]*))?",
    re.DOTALL,
)
"""Pattern of a broker URL with at most one @.

The user name and the password may contain any character except @.
"""

_BROKERS_HOST = re.compile(r"\[[0-9a-fA-F:.%a-z]+\]|[^\s,;%\[\]]*")

_NUMBERS = ("socket_timeout", "socket_connect_timeout", "health_check_interval", "max_connections")
_TUNING = frozenset({"socket_keepalive", "retry_on_timeout", "client_name", "protocol"})
"""Parameters of a broker URL that are ignored, because each client sets its own values."""

_CERTIFICATE, _CHECK_HOST = "ssl_cert_reqs", "ssl_check_hostname"
_FILES = frozenset({"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"})
_TLS = _FILES | {_CERTIFICATE, _CHECK_HOST, "ssl_ca_data", "ssl_ciphers", "ssl_password"}

ESCAPE = "its user, password or a parameter contains an @, which should be written as %40"
NO_PORT = f"its port should be a number from 1 to {HIGHEST_PORT}"


def database_url(text: str) -> URL:
    """Parse a PostgreSQL URL with one or several hosts, for psycopg. Raises ValueError with a reason.

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


def place_of(text: str) -> str:
    """Return the name and host of a database for display, without user and password.

    >>> place_of("postgresql://me:secret@db.example:5433/chats")
    "'chats' at db.example:5433"
    >>> place_of("postgresql://me@/chats?host=/run/postgresql")
    "'chats' at /run/postgresql"
    >>> place_of("postgresql://one:5433,two/chats?target_session_attrs=primary")
    "'chats' at one:5433,two"
    """
    url = database_url(text)
    host = url.host or url.query.get("host") or "localhost"
    hosts = host if isinstance(host, tuple) else host.split(",")
    ports = str(url.port or url.query.get("port") or "").split(",")
    named = ",".join(f"{one}:{port}" if port else one for one, port in zip_longest(hosts, ports[: len(hosts)]))
    return f"'{url.database or ''}' at {named}"


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
    if "@" in f"{options.get('host', '')}{options.get('dbname', '')}":
        raise ValueError(ESCAPE)
    for name, values in _CHOICES.items():
        if options.get(name, values[0]) not in values:
            message = f"its parameter {name} should be one of {', '.join(values)}"
            raise ValueError(message)
    for name in _WHOLE_NUMBERS:
        if not re.fullmatch(r"-?[0-9]+", str(options.get(name, 0))):
            message = f"its parameter {name} should be a whole number"
            raise ValueError(message)
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


def port_of(text: str | None, default: str) -> str:
    """Return the port from the environment; the default if the variable is unset or set by Kubernetes.

    >>> port_of("9000", "8000"), port_of("tcp://10.0.0.7:80", "8000"), port_of(None, "8000")
    ('9000', '8000', '8000')
    """
    return default if not text or "://" in text else text


def broker_url(text: str) -> str:
    """Return the URL in a form that has the same meaning for redis-py, kombu and Flower.

    Raises ValueError with a reason. redis-py always verifies a server certificate, but kombu does so only if the URL
    requests it.

    >>> broker_url("rediss://:p/a?s#s@broker?ssl_cert_reqs=CERT_REQUIRED&db=3")
    'rediss://:p%2Fa%3Fs%23s@broker/3?ssl_cert_reqs=required'
    """
    scheme, _, rest = text.partition("://")
    if rest.count("@") > 1:
        raise ValueError(ESCAPE)
    found = _BROKER.fullmatch(rest)
    if found is None:
        message = "it should look like redis://user:password@host:6379/0"
        raise ValueError(message)
    _check_port(found["port"] or "")
    if not _BROKERS_HOST.fullmatch(found["host"]):
        message = "it should name one host"
        raise ValueError(message)
    parameters = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    database = parameters.pop("db", found["database"] or "")
    if database and not (database.isascii() and database.isdigit()):
        message = "its path should be the number of a database, /0"
        raise ValueError(message)
    query = urlencode(_tls(scheme, _without_tuning(parameters)), safe="/:")
    user, colon, password = (found["user"] or "").partition(":")
    user = f"{_escaped(user)}{colon}{_escaped(password)}@" if found["user"] is not None else ""
    port = f":{found['port']}" if found["port"] else ""
    return f"{scheme}://{user}{found['host']}{port}/{database}{'?' if query else ''}{query}"


def tls_of(broker: str) -> dict[str, Any]:
    """Return redis-py's TLS arguments for a URL from `broker_url`. Without TLS, the result is empty."""
    parameters: dict[str, Any] = dict(parse_qsl(urlsplit(broker).query))
    if _CHECK_HOST in parameters:
        parameters[_CHECK_HOST] = parameters[_CHECK_HOST] == "true"
    return parameters


def _escaped(text: str) -> str:
    return quote(unquote(text), safe="")


def _without_tuning(parameters: dict[str, str]) -> dict[str, str]:
    for name in _NUMBERS:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", parameters.pop(name, "0")):
            message = f"its parameter {name} should be a number"
            raise ValueError(message)
    return {name: value for name, value in parameters.items() if name not in _TUNING}


def _tls(scheme: str, parameters: dict[str, str]) -> dict[str, str]:
    """Return the TLS parameters of a URL, with names that both Redis clients accept."""
    if unknown := parameters.keys() - _TLS:
        message = f"it has {len(unknown)} unknown parameters; known are db, {', '.join(sorted(_TLS))}"
        raise ValueError(message)
    if scheme != "rediss":
        if parameters:
            message = "its parameters ssl_... need rediss://"
            raise ValueError(message)
        return {}
    verified = parameters.get(_CERTIFICATE, "required").lower().removeprefix("cert_")
    if verified not in {"none", "optional", "required"}:
        message = f"its parameter {_CERTIFICATE} should be required or none"
        raise ValueError(message)
    tls = parameters | {_CERTIFICATE: verified}
    if _CHECK_HOST in tls:
        tls[_CHECK_HOST] = "false" if tls[_CHECK_HOST].lower() in {"0", "f", "false", "n", "no", "off"} else "true"
    for name in _FILES & tls.keys():
        _check_readable(name, tls[name])
    return tls


def _check_readable(parameter: str, path: str) -> None:
    try:
        readable = Path(path).is_dir() if parameter == "ssl_ca_path" else bool(Path(path).read_bytes())
    except OSError:
        readable = False
    if not readable:
        message = f"its parameter {parameter} should name a readable file"
        raise ValueError(message)


def is_address(url: str) -> bool:
    """Return whether a URL has a host, and only characters that may appear unescaped."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # this checks the length of each label
        return (
            _HTTP_HOST.fullmatch(parts.netloc.rpartition("@")[2]) is not None
            and parts.port != 0
            and parts.netloc.count("@") <= 1  # libcurl rejects a password with an unescaped @
            and url.isascii()
            and not any(c.isspace() or not c.isprintable() for c in url)
            and _fits_basic_authentication(unquote(parts.username or ""), unquote(parts.password or ""))
        )
    except ValueError:  # for example an invalid port, an unbalanced bracket or an empty label
        return False


def _fits_basic_authentication(user: str, password: str) -> bool:
    # In credentials, the first colon ends the user name, and control characters are forbidden (RFC 7617). Servers do
    # not agree on how to encode characters beyond Latin-1.
    return ":" not in user and not any(c < " " or c == "\x7f" or c > "\xff" for c in user + password)
