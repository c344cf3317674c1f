"""Intercept the SQL statements of SQLAlchemy and of the package on their way to PostgreSQL."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import psycopg
from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine


@contextmanager
def intercepted(engine: Engine, replace: Callable[[str, Any], str]) -> Iterator[None]:
    """Before the engine executes a statement, replace it with the result of ``replace(text, parameters)``.

    SQLAlchemy's own event `before_cursor_execute` does not see the statements of `driver_rows`.
    """

    class InterceptingCursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
            statement = query.decode() if isinstance(query, bytes) else query
            return super().execute(replace(statement, params).encode(), params, **options)

    def begin(connection: Any, *_: object) -> None:
        connection.cursor_factory = InterceptingCursor

    def end(connection: Any, *_: object) -> None:
        connection.cursor_factory = psycopg.Cursor

    event.listen(engine, "checkout", begin)
    event.listen(engine, "checkin", end)
    try:
        yield
    finally:
        event.remove(engine, "checkout", begin)
        event.remove(engine, "checkin", end)
