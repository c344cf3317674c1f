"""Creates the configured transport from its entry point."""

from __future__ import annotations

from traceback import extract_tb
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
        create = entry_point.load()
    except Exception as error:
        message = f"{where} cannot be loaded: {type(error).__name__}: {error}."
        raise TransportConfigurationError(message) from error
    try:
        transport = create(settings)
    except FollowUpsError:
        raise  # the transport's own error is more specific than ours
    except Exception as error:  # noqa: BLE001 - whatever a plug-in raises
        # the error's text may quote a secret from the settings
        last = extract_tb(error.__traceback__)[-1]
        message = f"{where} cannot be created: {type(error).__name__} in {last.filename}, line {last.lineno}."
        raise TransportConfigurationError(message) from None
    if not isinstance(transport, Transport):
        message = (
            f"{where} is not a transport: it lacks {', '.join(_missing(transport))} (see followups.transports.port)."
        )
        raise TransportConfigurationError(message)
    return transport


def _missing(candidate: object) -> list[str]:
    return [member for member in ("name", "open", "send", "check", "close") if not hasattr(candidate, member)]
