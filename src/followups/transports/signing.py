"""The secrets with which deliveries are signed, as in Standard Webhooks (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from typing import TYPE_CHECKING

from standardwebhooks import Webhook, WebhookVerificationError

from followups.errors import TransportConfigurationError

if TYPE_CHECKING:
    from datetime import datetime

SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every such secret, not a secret


INVALID = (
    "FOLLOWUPS_TRANSPORT_SECRET should be base64 of 24 to 64 bytes, with or without the prefix whsec_, or several such "
    "secrets separated by spaces; make one with: openssl rand -base64 32."
)

MIN_SECRET_LENGTH, MAX_SECRET_LENGTH = 24, 64
"""Minimum and maximum length of a secret in bytes (the specification, "Symmetric signatures")."""


class Signer:
    """Signs with every secret, and accepts a signature by any of them, so that secrets can be replaced."""

    def __init__(self, secrets: str) -> None:
        """Parse base64 secrets separated by white space; padding and ``whsec_`` are optional.

        Raises `TransportConfigurationError`. A secret that is not base64 is rejected, because receivers' libraries
        decode such a secret differently. If a secret that is not base64 were used as raw bytes, some libraries would
        reject every signature.
        """
        self._webhooks = [Webhook(_key(secret)) for secret in secrets.split()]
        if not self._webhooks:
            raise TransportConfigurationError(INVALID)

    def sign(self, key: str, moment: datetime, body: str) -> str:
        """Return the value of ``webhook-signature``: one signature per secret, separated by spaces."""
        return " ".join([webhook.sign(key, moment, body) for webhook in self._webhooks])

    def verify(self, body: bytes, headers: dict[str, str]) -> None:
        """Raise `WebhookVerificationError` unless one of the secrets has signed the body."""
        for webhook in self._webhooks[1:]:
            with suppress(WebhookVerificationError, ValueError):
                webhook.verify(body, headers, json_parse=False)
                return
        try:
            self._webhooks[0].verify(body, headers, json_parse=False)
        except ValueError:  # the signature is not base64, or the header has no comma
            message = "Malformed signature header"
            raise WebhookVerificationError(message) from None


def _key(secret: str) -> bytes:
    encoded = secret.removeprefix(SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_SECRET_LENGTH <= len(key) <= MAX_SECRET_LENGTH:
        raise TransportConfigurationError(INVALID)
    return key
