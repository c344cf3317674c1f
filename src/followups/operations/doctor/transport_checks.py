"""Checks of the transport: whether its endpoint is reachable, and how long a call may take."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from followups.errors import FollowUpsError, named
from followups.operations.doctor import Finding
from followups.settings import LEASE_MARGIN
from followups.transports.registry import load_transport
from followups.wording import span

if TYPE_CHECKING:
    from followups.settings import Settings


def timeouts(settings: Settings) -> Finding:
    """Report the sum of the timeouts of a call.

    A lease is at least as long as this sum, so it cannot expire during a call.
    """
    detail = (
        f"transport timeout {span(settings.transport_timeout)} + margin {span(LEASE_MARGIN)}"
        f" <= lease {span(settings.lease)}"
    )
    return Finding("timeouts", detail)  # the settings reject a lease that is shorter than the timeouts


def transport(settings: Settings) -> Finding:
    """Use the transport to check whether its endpoint is reachable."""
    try:
        detail = asyncio.run(_checked(settings))
    except FollowUpsError as error:
        return Finding("transport", f"{settings.transport}: {error}", "Correct the FOLLOWUPS_TRANSPORT settings.")
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
        return Finding("transport", f"{settings.transport}: {named(error)}", "Report it to the transport's author.")
    return Finding("transport", f"{settings.transport}: {detail}")


async def _checked(settings: Settings) -> str:
    made = load_transport(settings)
    await made.open()
    try:
        return await made.check()
    finally:
        await made.close()
