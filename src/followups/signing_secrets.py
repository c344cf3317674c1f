"""The format of the secrets that sign deliveries, as in Standard Webhooks (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii

PREFIX = "whsec_"

INVALID = (
    "FOLLOWUPS_TRANSPORT_SECRET should be base64 of 24 to 64 bytes, with or without the prefix whsec_, or several such"
    " secrets separated by spaces; make one with: openssl rand -base64 32"
)

MIN_LENGTH, MAX_LENGTH = 24, 64
"""Minimum and maximum length of a secret in bytes (the specification, "Symmetric signatures")."""


def keys_of(secrets: str) -> list[bytes]:
    """Return the keys of secrets that are separated by white space; padding and ``whsec_`` are optional.

    Raises `ValueError`, which does not quote the secrets. A secret that is not base64 is rejected, because endpoints'
    libraries decode such a secret differently. If it were used as raw bytes, some libraries would reject every
    signature.
    """
    keys = [_key(secret) for secret in secrets.split()]
    if not keys:
        raise ValueError(INVALID)
    return keys


def _key(secret: str) -> bytes:
    encoded = secret.removeprefix(PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_LENGTH <= len(key) <= MAX_LENGTH:
        raise ValueError(INVALID)
    return key
