"""Finds the configured transport among the entry points of the group ``followups.transports``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from followups.errors import FollowUpsError, TransportConfigurationError
from followups.transports.port import Transport

if TYPE_CHECKING:
    from followups.settings import Settings

GROUP = "followups.transports"
"""The entry-point group in which a plug-in registers its transport as ``name = "package.module:Class"``."""


def available_transports() -> list[str]:
    """Return the values that ``FOLLOWUPS_TRANSPORT`` can have on this machine, sorted."""
    return sorted(_registered())


def load_transport(settings: Settings) -> Transport:
    """Create the transport that ``FOLLOWUPS_TRANSPORT`` selects, without opening it.

    Raises `TransportConfigurationError`, with a one-sentence message, if the name is unknown, the plug-in is unusable,
    or the transport rejects the settings.
    """
    entry_point = _registered().get(settings.transport)
    if entry_point is None:
        message = (
            f"FOLLOWUPS_TRANSPORT names {settings.transport!r}, which is not installed; "
            f"available: {', '.join(available_transports())}."
        )
        raise TransportConfigurationError(message)
    return _made(entry_point, settings)


def _registered() -> dict[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}


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
