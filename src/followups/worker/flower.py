"""Check that Flower listens on this machine only, or requires a password.

Flower shows every task and worker, and can stop them. By default Flower listens on all addresses without
authentication. ``celery -A followups.worker flower`` imports our app before Flower listens. The check runs when Flower
imports the app.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from celery import signals

from followups.errors import SettingsError
from followups.settings import read_file_of
from followups.urls import port_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LOOPBACK = "127.0.0.1"

FLOWERS_COLUMNS = "name,uuid,state,received,runtime,worker"
COLUMNS = "name,args,state,received,runtime,worker,uuid"
"""Columns of Flower's task list. Unlike Flower's default columns, these columns show how many follow-ups a task
contains.
"""

REFUSAL = (
    "Flower on the address {address} needs a password: set FLOWER_BASIC_AUTH=user:password, "
    "or keep it on this machine with --address=127.0.0.1."
)
OPEN_API = (
    "FLOWER_UNAUTHENTICATED_API would let every program and web page send tasks: "
    "unset it, and set FLOWER_BASIC_AUTH=user:password to use Flower's API."
)
PORT = "FLOWER_PORT"
AUTH = "FLOWER_BASIC_AUTH"
NO_PASSWORD = f"{AUTH}_FILE should name a file that contains user:password."


def install(configure_logging: Callable[[], None]) -> None:
    """If this process is Flower, check its options before it listens.

    Celery's command imports Flower in every process. A process counts as Flower only if it parses Flower's options.
    ``configure_logging`` restores our format in place of Tornado's.
    """
    if "flower.options" not in sys.modules:
        return
    from flower.options import options  # noqa: PLC0415 - is there already, or is not wanted

    if not port_of(os.environ.get(PORT), ""):
        os.environ.pop(PORT, None)
    read: list[bool] = []
    options.add_parse_callback(lambda: read.append(True))

    def check(**_: object) -> None:
        if read:
            configure_logging()
            _restrict(options)

    signals.import_modules.connect(check, weak=False)


def _restrict(options: Any) -> None:  # noqa: ANN401 - Tornado's own
    from flower.views import monitor  # noqa: PLC0415 - with Flower itself
    from tornado.web import authenticated  # noqa: PLC0415 - comes with Flower

    if options.tasks_columns == FLOWERS_COLUMNS:
        options.tasks_columns = COLUMNS
    if users := _users_from_file():
        options.basic_auth = users
    if requires_login(options.basic_auth or [], options.auth):
        monitor.Metrics.get = authenticated(monitor.Metrics.get)  # all other pages already require authentication
        return
    if os.environ.get("FLOWER_UNAUTHENTICATED_API"):
        _refuse(OPEN_API)
    if options.unix_socket:
        return
    if not options.address:
        options.address = LOOPBACK
    if not is_loopback(options.address):
        _refuse(REFUSAL.format(address=options.address))


def _users_from_file() -> list[str]:
    """Return the users with their passwords, or an empty list if no file is configured. Flower cannot read a file."""
    try:
        found = read_file_of(AUTH)
    except SettingsError as error:
        _refuse(str(error))
    users = [] if found is None else found.split(",")
    if users and not requires_login(users, ""):
        _refuse(NO_PASSWORD)
    return users


def _refuse(sentence: str) -> NoReturn:
    sys.stderr.write(f"followups: {sentence}\n")
    raise SystemExit(2)


def requires_login(basic_auth: Sequence[str], auth: str) -> bool:
    """Return whether Flower requires a password or an identity. An empty password does not count as a password.

    >>> requires_login(["me:pa55"], ""), requires_login([], ".*@example.com")
    (True, True)
    >>> requires_login([""], ""), requires_login(["me:"], "")
    (False, False)
    """
    named = [each.partition(":") for each in basic_auth]
    return bool(auth) or (bool(named) and all(user and password for user, _, password in named))


def is_loopback(address: str) -> bool:
    """Return whether an address can be reached from this machine only.

    >>> [is_loopback(each) for each in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "flower.example")]
    [True, True, True, False, False, False]
    """
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
