"""A transport's endpoint: the address and the connection options (TLS, proxy, timeout)."""

from __future__ import annotations

import os
import ssl
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pycurl

from followups.errors import TransportConfigurationError
from followups.settings import hide_password

if TYPE_CHECKING:
    from followups.settings import Settings


def required_url(settings: Settings, meaning: str) -> str:
    """Return ``FOLLOWUPS_TRANSPORT_URL``; error messages use ``meaning`` to describe the expected URL.

    Raises `TransportConfigurationError` if the setting is missing, or is not a URL with a host.
    """
    url = settings.transport_url
    if url is None:
        message = f"The transport {settings.transport} needs FOLLOWUPS_TRANSPORT_URL: set it to {meaning}."
        raise TransportConfigurationError(message)
    if not _is_well_formed(url):
        message = f"FOLLOWUPS_TRANSPORT_URL ({hide_password(url)}) is not a valid address: set it to {meaning}."
        raise TransportConfigurationError(message)
    return url


def _is_well_formed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return (
            bool(host)
            and parts.port != 0
            and not any(c.isspace() or not c.isprintable() for c in url)
            and _fits_basic_authentication(unquote(parts.username or ""), unquote(parts.password or ""))
        )
    except ValueError:  # for example an invalid port, an unbalanced bracket or an empty label
        return False


def _fits_basic_authentication(user: str, password: str) -> bool:
    # In credentials, the first colon ends the user name (RFC 7617). Servers do not agree on how to encode characters
    # beyond Latin-1.
    return ":" not in user and max(user + password, default="") <= "\xff"


def connection_options(settings: Settings) -> dict[int, object]:
    """Return libcurl's options for every connection to the endpoint: timeout, protocols, TLS, proxy.

    Raises `TransportConfigurationError` if a certificate cannot be read.
    """
    milliseconds = max(1, round(settings.transport_timeout / timedelta(milliseconds=1)))
    options: dict[int, object] = {
        pycurl.TIMEOUT_MS: milliseconds,
        pycurl.NOSIGNAL: True,
        pycurl.FOLLOWLOCATION: False,  # a redirect is not followed, and the message counts as rejected
        # With HTTP/2, more outcomes are unknown, because a broken connection affects all its calls.
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_2TLS
        if settings.transport_deduplicates
        else pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.PROXY: "",  # ignore the proxies that environment variables name
    }
    if (settings.transport_url or "").startswith("https:"):
        options |= _trusted() | _client_certificate(settings) | _proxy()
    return options


def _trusted() -> dict[int, object]:
    """Return libcurl's options for the trusted certificate authorities.

    By default, the system's authorities are trusted. ``SSL_CERT_FILE`` replaces the system's file of authorities.
    ``SSL_CERT_DIR`` replaces the system's directory, but not the system's file. The libcurl in pycurl's wheel knows the
    certificate path of only one Linux distribution. It also ignores ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``.
    """
    paths = ssl.get_default_verify_paths()
    for name, found, what in (("SSL_CERT_FILE", paths.cafile, "file"), ("SSL_CERT_DIR", paths.capath, "directory")):
        if os.environ.get(name) and not found:
            message = (
                f"{name} does not name a {what}: set it to the {what} of the certificate authorities that are trusted."
            )
            raise TransportConfigurationError(message)
    options: dict[int, object] = {}
    if paths.cafile:
        options[pycurl.CAINFO] = paths.cafile
    # With a certificate directory, libcurl would read the certificate file again for every connection.
    if paths.capath and (os.environ.get("SSL_CERT_DIR") or not paths.cafile):
        options[pycurl.CAPATH] = paths.capath
    return options


def _client_certificate(settings: Settings) -> dict[int, object]:
    certificate, key = settings.transport_client_cert, settings.transport_client_key or settings.transport_client_cert
    if certificate is None:
        return {}
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        message = (
            "FOLLOWUPS_TRANSPORT_CLIENT_CERT and FOLLOWUPS_TRANSPORT_CLIENT_KEY should name PEM files of a certificate "
            f"and its key without a password, readable for this user ({type(error).__name__})."
        )
        raise TransportConfigurationError(message) from None
    return {pycurl.SSLCERT: certificate, pycurl.SSLKEY: key}


def _proxy() -> dict[int, object]:
    # Only https endpoints use a proxy, which then sees nothing but the host name.
    named = {name: os.environ.get(name) or os.environ.get(name.upper()) or "" for name in ("https_proxy", "no_proxy")}
    return {pycurl.PROXY: named["https_proxy"], pycurl.NOPROXY: named["no_proxy"]}
