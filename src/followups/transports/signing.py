"""The secrets with which deliveries are signed, as in Standard Webhooks (standardwebhooks.com)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from standardwebhooks import Webhook, WebhookVerificationError

from followups.errors import TransportConfigurationError
from followups.signing_secrets import keys_of

if TYPE_CHECKING:
    from datetime import datetime


class Signer:
    """Signs with every secret, and accepts a signature by any of them, so that secrets can be replaced."""

    def __init__(self, secrets: str) -> None:
        """Parse secrets separated by white space (`followups.signing_secrets`).

        Raises `TransportConfigurationError` if one is invalid.
        """
        try:
            self._webhooks = [Webhook(key) for key in keys_of(secrets)]
        except ValueError as error:
            raise TransportConfigurationError(f"{error}.") from None  # noqa: EM102 - the sentence is in keys_of

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
