"""Creates the configured transport from its entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.errors import FollowUpsError, TransportConfigurationError
from followups.settings import transports
from followups.transports.port import Transport

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from followups.settings import Settings


def load_transport(settings: Settings) -> Transport:
    """Create the transport that ``FOLLOWUPS_TRANSPORT`` selects, without opening it.

    Raises `TransportConfigurationError`, with a one-sentence message, if the plug-in is unusable, or if the transport
    rejects the settings.
    """
    return _made(transports()[settings.transport], settings)


def _made(entry_point: EntryPoint, settings: Settings) -> Transport:
    where = f"The transport {entry_point.name!r} ({entry_point.value})"
    try:
        transport = entry_point.load()(settings)
    except FollowUpsError:
        raise  # the transport's own error is more specific than ours
    except Exception as error:
        message = f"{where} cannot be loaded: {type(error).__name__}: {error}."
        raise TransportConfigurationError(message) from error
    if not isinstance(transport, Transport):
        message = (
            f"{where} is not a transport: it lacks {', '.join(_missing(transport))} (see followups.transports.port)."
        )
        raise TransportConfigurationError(message)
    return transport


def _missing(candidate: object) -> list[str]:
    return [member for member in ("name", "open", "send", "check", "close") if not hasattr(candidate, member)]
