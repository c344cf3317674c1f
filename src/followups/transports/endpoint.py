"""A transport's endpoint: the address and the connection options (TLS, proxy)."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

import pycurl

from followups.errors import TransportConfigurationError
from followups.urls import is_address

if TYPE_CHECKING:
    from followups.settings import Settings

_PROXY_SCHEMES = {"http", "https", "socks", "socks4", "socks4a", "socks5", "socks5h"}
"""Schemes of the proxies that libcurl can use."""


def required_url(settings: Settings, meaning: str) -> str:
    """Return ``FOLLOWUPS_TRANSPORT_URL``; the error message uses ``meaning`` to describe the expected URL.

    Raises `TransportConfigurationError` if the setting is missing.
    """
    if settings.transport_url is None:
        message = f"The transport {settings.transport} needs FOLLOWUPS_TRANSPORT_URL: set it to {meaning}."
        raise TransportConfigurationError(message)
    return settings.transport_url


def connection_options(settings: Settings) -> dict[int, object]:
    """Return libcurl's options for every connection to the endpoint: protocols, TLS, proxy.

    Raises `TransportConfigurationError` if a certificate cannot be read or used, or if the proxy is invalid.
    """
    options: dict[int, object] = {
        pycurl.NOSIGNAL: True,
        pycurl.FOLLOWLOCATION: False,  # a redirect is not followed, and the message counts as rejected
        # With HTTP/2, more outcomes are unknown, because a broken connection affects all its calls.
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_2TLS
        if settings.transport_deduplicates
        else pycurl.CURL_HTTP_VERSION_1_1,
        # A server may choose huge numbers for DHE, with which a handshake occupies the processor for a second.
        pycurl.SSL_CIPHER_LIST: "DEFAULT:!kDHE",
        pycurl.PROXY_SSL_CIPHER_LIST: "DEFAULT:!kDHE",
        pycurl.USERAGENT: "followups",  # also for CONNECT, which carries none of the request's headers
        pycurl.PROXY: "",  # ignore the proxies that environment variables name
    }
    certificate = _client_certificate(settings)
    if (settings.transport_url or "").startswith("https:"):
        options |= _trusted() | certificate | _proxy()
    elif certificate:
        message = (
            "FOLLOWUPS_TRANSPORT_CLIENT_CERT needs an https endpoint: set FOLLOWUPS_TRANSPORT_URL to an https address, "
            "or unset FOLLOWUPS_TRANSPORT_CLIENT_CERT."
        )
        raise TransportConfigurationError(message)
    return options


def _trusted() -> dict[int, object]:
    """Return libcurl's options for the trusted certificate authorities of the endpoint and of an https proxy.

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
        options[pycurl.CAINFO] = options[pycurl.PROXY_CAINFO] = os.fsencode(paths.cafile)
    # With a certificate directory, libcurl would read the certificate file again for every connection.
    if paths.capath and (os.environ.get("SSL_CERT_DIR") or not paths.cafile):
        options[pycurl.CAPATH] = options[pycurl.PROXY_CAPATH] = os.fsencode(paths.capath)
    return options


def _client_certificate(settings: Settings) -> dict[int, object]:
    certificate, key = settings.transport_client_cert, settings.transport_client_key
    if certificate is None:
        if key is not None:
            message = (
                "FOLLOWUPS_TRANSPORT_CLIENT_KEY names the key of a client certificate: "
                "set FOLLOWUPS_TRANSPORT_CLIENT_CERT too, or unset FOLLOWUPS_TRANSPORT_CLIENT_KEY."
            )
            raise TransportConfigurationError(message)
        return {}
    key = key or certificate
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        message = (
            "FOLLOWUPS_TRANSPORT_CLIENT_CERT and FOLLOWUPS_TRANSPORT_CLIENT_KEY should name PEM files of a certificate "
            f"and its key without a password, readable for this user ({type(error).__name__})."
        )
        raise TransportConfigurationError(message) from None
    return {
        pycurl.SSLCERT: os.fsencode(certificate),
        pycurl.SSLKEY: os.fsencode(key),
        # An endpoint that resumes a TLS session knows only the certificate with which the session began.
        pycurl.SSL_SESSIONID_CACHE: False,
    }


def _proxy() -> dict[int, object]:
    # Only https endpoints use a proxy, which then sees nothing but the host name.
    name, proxy = _variable("https_proxy")
    if proxy and not _is_proxy(proxy):
        message = (
            f"{name} should be the address of a proxy, such as http://host:port. "
            "The schemes https, socks4, socks4a, socks5 and socks5h are also supported."
        )
        raise TransportConfigurationError(message)
    return {pycurl.PROXY: proxy, pycurl.NOPROXY: os.fsencode(_variable("no_proxy")[1])}


def _variable(name: str) -> tuple[str, str]:
    """Return the name and value of an environment variable; its name may be in lower or upper case."""
    value = os.environ.get(name, "").strip()
    return (name, value) if value else (name.upper(), os.environ.get(name.upper(), "").strip())


def _is_proxy(value: str) -> bool:
    url = value if "://" in value else f"http://{value}"
    scheme, _, rest = url.partition("://")
    return (
        scheme.lower() in _PROXY_SCHEMES
        and is_address(url)
        and not rest.partition("/")[0].endswith(":")  # as in http:/proxy, which libcurl reads as the host http
    )
