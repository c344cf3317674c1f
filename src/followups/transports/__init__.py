"""Delivery of a message into a chat: the port, and the transports that implement it.

``http`` posts to an endpoint, ``matrix`` sends to a Matrix homeserver, and ``sandbox`` simulates the chat in the same
process. `load_transport` creates the transport that the settings select.
"""

from __future__ import annotations

from followups.transports.registry import load_transport

__all__ = ["load_transport"]
