"""The key that signs deliveries, by the Standard Webhooks specification (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii

from standardwebhooks import Webhook

from followups.errors import TransportConfigurationError

SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every such secret, not a secret


def webhook_from(secret: str) -> Webhook:
    """Return the signer and verifier of a secret: base64, with or without ``whsec_``, padded or not.

    A secret that is not base64 is refused (`TransportConfigurationError`) rather than taken as raw bytes:
    the libraries on the receiving side disagree about what it means (some skip the characters they don't
    know, some stop), so that every signature would be wrong at some of them.
    """
    encoded = secret.strip().removeprefix(SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        message = (
            "FOLLOWUPS_TRANSPORT_SECRET should be base64, with or without the prefix whsec_; "
            "make one with: openssl rand -base64 32."
        )
        raise TransportConfigurationError(message)
    return Webhook(key)
