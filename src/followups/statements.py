"""Statements that run with both SQLAlchemy and psycopg, and the rules that use them.

A rule is a generator without I/O: it yields a query, receives the query's rows, and decides. Each rule therefore has
one implementation for both libraries. A session runs a rule synchronously (`run`). The API uses psycopg, and runs the
rule on its event loop (`followups.event_loop`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, update_wrapper
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeAlias, TypeVar

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

if TYPE_CHECKING:
    from sqlalchemy import Connection, Executable
    from sqlalchemy.orm import DeclarativeBase, Session

P = ParamSpec("P")
T = TypeVar("T")

COLUMNS = "{columns}"
"""A placeholder in an SQL statement, replaced by the columns of the statement's entity."""

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call] # of a constructor without annotations


class Statement:
    """An SQL statement with named parameters (``:name``), compiled once.

    Rows of an entity are loaded into the session as objects with all columns. Objects that were loaded before are
    refreshed. The driver returns named tuples with ``fields``, or with all columns if ``fields`` is empty.
    """

    def __init__(
        self, sql: str, entity: type[DeclarativeBase] | None = None, fields: Sequence[str] | None = None
    ) -> None:
        """Store the SQL; `COLUMNS` in it stands for the columns of the entity's table."""
        self._sql = sql
        self._entity = entity
        self._fields = fields

    def __call__(self, **parameters: Any) -> Query:  # noqa: ANN401 - values of any column
        """Return a query made from this statement and the given parameters."""
        return Query(self, parameters)

    def rows(self, session: Session | Connection, parameters: Mapping[str, Any]) -> Sequence[Any]:
        """Execute the statement in the session's transaction and return its rows, if there are any."""
        result = session.execute(self._executable, parameters)
        if self._entity is not None:
            return result.scalars().all()
        return result.all() if result.returns_rows else ()  # type: ignore[attr-defined] # of every cursor's result

    @cached_property
    def driver_sql(self) -> str:
        """The statement in psycopg's parameter style, without a trailing semicolon or line break."""
        return str(text(self._with(self._fields)).compile(dialect=_DIALECT)).strip()

    @cached_property
    def _executable(self) -> Executable:
        plain = text(self._with(None))
        if self._entity is None:
            return plain
        found = select(self._entity).from_statement(plain.columns(*self._entity.__table__.columns))
        return found.execution_options(populate_existing=True)

    def _with(self, fields: Sequence[str] | None) -> str:
        if self._entity is None:
            return self._sql
        table = self._entity.__table__
        names = fields or [column.name for column in table.columns]
        return self._sql.replace(COLUMNS, ", ".join(f"{self._entity.__tablename__}.{name}" for name in names))


@dataclass(frozen=True, slots=True)
class Query:
    """A statement and its parameters."""

    statement: Statement
    parameters: Mapping[str, Any]


Steps: TypeAlias = Generator[Query, Sequence[Any], T]
"""A running rule: it yields queries, receives their rows, and returns its result."""


def run(session: Session | Connection, steps: Steps[T]) -> T:
    """Execute the rule's statements in the session's transaction and return the rule's result.

    If a query fails, its error is raised inside the rule, which may handle the error.
    """
    try:
        query = next(steps)
        while True:
            try:
                rows = query.statement.rows(session, query.parameters)
            except Exception as error:  # noqa: BLE001 - raised in the rule, and from there to the caller
                query = steps.throw(error)
            else:
                query = steps.send(rows)
    except StopIteration as end:
        result: T = end.value
        return result


class Rule(Generic[P, T]):
    """A rule that runs in a session when called. Inside another rule or on the event loop, call `steps` instead."""

    def __init__(self, steps: Callable[P, Steps[T]]) -> None:
        """Store the generator function."""
        self.steps = steps
        update_wrapper(self, steps)

    def __call__(self, session: Session | Connection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the rule in the session's transaction."""
        return run(session, self.steps(*args, **kwargs))
