"""Every error that this package raises on purpose.

A single base class lets callers catch every error of the package. Each class's docstring is its default message.
``slug`` is the last segment of the problem ``type`` in the REST API.
"""

from __future__ import annotations

import inspect
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TOLD = 20
"""Maximum number of errors listed in the message of a combined error."""


class FollowUpsError(Exception):
    """The follow-up dispatcher could not carry out the request."""

    slug: ClassVar[str] = "error"

    def __init__(self, message: str | Sentence | None = None) -> None:
        """Use the given message, or else the class's docstring."""
        message = message or inspect.cleandoc(type(self).__doc__ or "")
        self.sentence = message if isinstance(message, Sentence) else Sentence(message)
        super().__init__(str(message))


class SettingsError(FollowUpsError):
    """A setting is missing or wrong."""

    slug = "settings"


class TransportConfigurationError(SettingsError):
    """The transport cannot work with the given settings."""

    slug = "transport-configuration"


class NotFoundError(FollowUpsError):
    """It was not found."""

    slug = "not-found"


class FollowUpNotFoundError(NotFoundError):
    """The follow-up was not found."""


class ChatNotFoundError(NotFoundError):
    """The chat was not found."""


class WorkspaceNotFoundError(NotFoundError):
    """The workspace was not found."""


class ConsoleOffError(NotFoundError):
    """The console is switched off (FOLLOWUPS_CONSOLE)."""


class WorkspaceBeingDeletedError(WorkspaceNotFoundError):
    """The workspace is being deleted; if that was interrupted, followups workspace delete completes it."""


class ApiKeyNotFoundError(NotFoundError):
    """The API key was not found."""


class ConflictError(FollowUpsError):
    """The state of the follow-up or its chat does not allow this."""

    slug = "conflict"


class NothingToFollowUpError(ConflictError):
    """The chat has no messages or the last message is from the user."""

    slug = "nothing-to-follow-up"


class TooManyPendingError(ConflictError):
    """The chat has too many pending follow-ups; cancel some, or wait until some have been sent."""

    slug = "too-many-pending"


class ExternalChatTakenError(ConflictError):
    """The externalId belongs to another workspace's chat."""

    slug = "external-chat-taken"


class AlreadyFinishedError(ConflictError):
    """The follow-up has already finished; a finished follow-up never changes."""

    slug = "already-finished"


class AlreadyRetriedError(ConflictError):
    """A new follow-up has already been created from this one."""

    slug = "already-retried"


class DeliveryInProgressError(ConflictError):
    """The follow-up is being delivered at this moment; try again shortly."""

    slug = "delivery-in-progress"

    def __init__(self, message: str | Sentence | None = None, *, retry_after: float = 1.0) -> None:
        """Store the number of seconds after which the outcome should be known."""
        super().__init__(message)
        self.retry_after = retry_after


class SomeRefusedError(FollowUpsError):
    """None of the follow-ups was scheduled, because some of them cannot be."""

    slug = "some-refused"

    def __init__(self, refused: Mapping[int, FollowUpsError], total: int) -> None:
        """Store the errors of the refused follow-ups, by their index in the list of all follow-ups."""
        told = "; ".join(f"[{index}] {error}" for index, error in islice(refused.items(), MOST_TOLD))
        more = "" if len(refused) <= MOST_TOLD else f"; and {len(refused) - MOST_TOLD:,} more"
        super().__init__(f"{len(refused):,} of {total:,} follow-ups cannot be scheduled, so none was: {told}{more}")
        self.refused = refused


class IdempotencyKeyInUseError(ConflictError):
    """The first request with this Idempotency-Key is still running; try again shortly."""

    slug = "idempotency-key-in-use"


class TransactionError(FollowUpsError):
    """The session's transaction cannot guarantee the rules of scheduling; use one at READ COMMITTED."""

    slug = "transaction"


class UnauthorizedError(FollowUpsError):
    """The API key is missing, malformed, unknown, expired or revoked; send it in the authorization header."""

    slug = "unauthorized"


class TooManyRequestsError(FollowUpsError):
    """The API key has made too many requests; slow down."""

    slug = "too-many-requests"

    def __init__(self, message: str | Sentence | None = None, *, retry_after: float = 1.0) -> None:
        """Store the number of seconds after which the next request is allowed."""
        super().__init__(message)
        self.retry_after = retry_after


class InvalidRequestError(FollowUpsError):
    """The request is not valid."""

    slug = "invalid-request"

    def __init__(self, message: str | Sentence | None = None, *, field: str = "") -> None:
        """Store the name (snake_case) of the invalid field, if there is one."""
        super().__init__(message)
        self.field = field


class IdempotencyKeyReusedError(InvalidRequestError):
    """The Idempotency-Key came with another body within the last 24 hours; use a new key for a new request."""

    slug = "idempotency-key-reused"


class OutsideMessagingWindowError(InvalidRequestError):
    """The due date is outside the channel's messaging window."""

    slug = "outside-messaging-window"


class QuotaExceededError(InvalidRequestError):
    """The workspace has reached its quota of pending follow-ups or chats."""

    slug = "quota-exceeded"


class TransitionError(FollowUpsError):
    """The table of states holds no such transition."""

    slug = "transition"


def named(error: BaseException) -> str:
    """Return the error's class name and the first line of its message."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def reason_of(error: BaseException) -> str:
    r"""Return why a connection failed: the text after the last colon in the first line of libpq's message.

    >>> reason_of(OSError('connection to server at "::1", port 5432 failed: Connection refused\n\tIs it running?'))
    'connection refused'
    """
    first = str(error).strip().partition("\n")[0]
    reason = first.rpartition("failed: ")[2].removeprefix("FATAL:").strip().rstrip(".")
    return reason[:1].lower() + reason[1:]
