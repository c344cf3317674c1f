"""What delivers a message into a chat: the port, and the transports behind it.

``http`` posts to an endpoint, ``matrix`` speaks to a homeserver, ``sandbox`` plays the chat in the same
process; `load_transport` makes the one that the settings name.
"""

from __future__ import annotations

from followups.transports.registry import available_transports, load_transport

__all__ = ["available_transports", "load_transport"]
