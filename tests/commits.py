"""Helpers for commits whose acknowledgement is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def break_once(monkeypatch: pytest.MonkeyPatch, what: Callable[[psycopg.Connection], None]) -> None:
    """At the next commit, call ``what`` and then break the connection."""
    commit = psycopg.Connection.commit

    def broken(connection: psycopg.Connection) -> None:
        monkeypatch.setattr(psycopg.Connection, "commit", commit)
        what(connection)
        connection.close()
        message = "the connection broke"
        raise psycopg.OperationalError(message)

    monkeypatch.setattr(psycopg.Connection, "commit", broken)
