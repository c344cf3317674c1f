"""What delivers a message into a chat: the port, and the transports that implement it.

``http`` posts to an endpoint, ``matrix`` speaks to a homeserver, ``sandbox`` simulates the chat in the same process;
`load_transport` creates the one that the settings name.
"""

from __future__ import annotations

from followups.transports.registry import available_transports, load_transport

__all__ = ["available_transports", "load_transport"]
