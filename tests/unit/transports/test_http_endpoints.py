"""Tests of network setups: private CAs, client certificates, proxies, IPv6 and keep-alive."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pycurl
import pytest

from followups.errors import FollowUpsError, TransportConfigurationError
from followups.transports import http_client
from followups.transports.http import HttpTransport
from followups.transports.http_client import READ_SIZE
from followups.transports.port import Outcome, Retry, Sent, Unknown
from unit.transports.doubles import (
    MESSAGE,
    SIGNING_SECRET,
    Request,
    a_delivery,
    answer,
    certified,
    listening,
    opened,
    scripted,
    settings_for,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    import trustme

OK = answer(200)
OTHER = answer(200, b'{"chatMessageId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"}')

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl creates the hashed file names")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's own proxy and certificate variables from the environment."""
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


async def outcome_at(url: str, **settings: object) -> Outcome:
    """Send once to ``url`` and return the outcome."""
    async with opened(HttpTransport(settings_for(url, **settings))) as transport:
        return await transport.send(a_delivery())


# Tests of certificate authorities.


@pytest.mark.usefixtures("trusted")
async def test_a_private_authority_is_trusted_by_its_file(authority: trustme.CA) -> None:
    """Both `check` and calls trust the certificate authorities that SSL_CERT_FILE names."""
    async with scripted(OK, certified(authority)) as server:
        assert await outcome_at(server.url) == Sent(None, 200)
        assert "accepts connections over TLS" in await HttpTransport(settings_for(server.url)).check()


@needs_openssl
async def test_a_private_authority_is_trusted_by_its_directory(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_DIR names a directory of trusted authorities, created by ``openssl rehash``."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)  # noqa: ASYNC221, S607 - runs before any other task
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    async with scripted(OK, certified(authority)) as server:
        assert await outcome_at(server.url) == Sent(None, 200)


async def test_an_unknown_authority_is_not_trusted(authority: trustme.CA) -> None:
    """If the certificate's authority is unknown, nothing is sent and `check` reports the reason."""
    async with scripted(OK, certified(authority)) as server:
        outcome = await outcome_at(server.url)
        assert isinstance(outcome, Retry)
        assert outcome.detail.startswith("no connection: TLS failed (")
        assert "certificate" in outcome.detail
        with pytest.raises(FollowUpsError, match=r"cannot be reached: TLS failed \(.*certificate"):
            await HttpTransport(settings_for(server.url)).check()
        assert server.requests == []


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_of_another_host_is_not_trusted(authority: trustme.CA) -> None:
    """The certificate of another host is rejected, and the reason contains no host name."""
    async with scripted(OK, certified(authority, "elsewhere.example")) as server:
        outcome = await outcome_at(server.url)
        assert isinstance(outcome, Retry)
        assert "does not match" in outcome.detail or "no alternative certificate subject name" in outcome.detail
        assert "127.0.0.1" not in outcome.detail
        assert server.requests == []


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_missing_authorities_stop_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the endpoint uses TLS, a wrong path to the CA certificates is rejected at startup."""
    monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(TransportConfigurationError, match=f"{name} does not name a (file|directory)"):
        HttpTransport(settings_for("https://host"))
    HttpTransport(settings_for("http://host"))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("at_the_proxy", [False, True])
async def test_no_key_exchange_with_numbers_of_any_size_is_offered(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, *, at_the_proxy: bool
) -> None:
    """No cipher with DHE is offered to the endpoint or to an https proxy, only ECDHE."""
    offered: set[str] = set()

    async def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        offered.update(name for name, _, _ in writer.get_extra_info("ssl_object").shared_ciphers())

    secure = certified(authority)
    secure.set_ciphers("ALL")
    async with listening(note, secure) as url:
        if at_the_proxy:
            monkeypatch.setenv("HTTPS_PROXY", url)
        await outcome_at("https://127.0.0.1:9" if at_the_proxy else url)
    assert any(name.startswith("ECDHE-") for name in offered)
    assert not any(name.startswith("DHE-") for name in offered)


# Tests of client certificates.


def asking(authority: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a server's TLS context that requests a client certificate signed by the given authority."""
    context = certified(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = version
    authority.configure_trust(context)
    return context


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("apart", [True, False])
async def test_a_client_certificate_is_shown(
    authority: trustme.CA, tmp_path: Path, version: ssl.TLSVersion, *, apart: bool
) -> None:
    """The client certificate is sent if the endpoint requests one.

    The private key may be in the certificate's file or in its own file.
    """
    ours = authority.issue_cert("worker.example")
    ours.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    settings = (
        {"transport_client_cert": f"{tmp_path}/cert.pem", "transport_client_key": f"{tmp_path}/key.pem"}
        if apart
        else {"transport_client_cert": f"{tmp_path}/both.pem"}
    )
    async with scripted(OK, asking(authority, version)) as server:
        assert await outcome_at(server.url, **settings) == Sent(None, 200)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("deduplicates", [True, False])
async def test_a_renewed_client_certificate_is_shown(
    authority: trustme.CA, tmp_path: Path, version: ssl.TLSVersion, *, deduplicates: bool
) -> None:
    """After the certificate's file was replaced, the next connection shows the new certificate."""
    seen = []

    async def note_certificate(writer: asyncio.StreamWriter, _request: Request) -> None:
        seen.append(writer.get_extra_info("peercert")["serialNumber"])
        writer.write(answer(200, connection="close"))

    file = tmp_path / "both.pem"
    settings = {"transport_client_cert": str(file), "transport_deduplicates": deduplicates}
    authority.issue_cert("old.example").private_key_and_cert_chain_pem.write_to_path(file)
    async with (
        scripted(note_certificate, asking(authority, version)) as server,
        opened(HttpTransport(settings_for(server.url, **settings))) as transport,
    ):
        for _ in range(2):
            assert await transport.send(a_delivery()) == Sent(None, 200)
        authority.issue_cert("new.example").private_key_and_cert_chain_pem.write_to_path(file)
        assert await transport.send(a_delivery()) == Sent(None, 200)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.usefixtures("trusted")
async def test_an_unreadable_certificate_is_retried(authority: trustme.CA, tmp_path: Path) -> None:
    """If the certificate's file has become unreadable, nothing is sent, and the call is retried."""
    file = tmp_path / "both.pem"
    authority.issue_cert("worker.example").private_key_and_cert_chain_pem.write_to_path(file)
    async with (
        scripted(OK, asking(authority, ssl.TLSVersion.TLSv1_3)) as server,
        opened(HttpTransport(settings_for(server.url, transport_client_cert=str(file)))) as transport,
    ):
        file.unlink()
        outcome = await transport.send(a_delivery())
        assert isinstance(outcome, Retry)
        assert outcome.detail.startswith("no connection: TLS failed (")
        assert server.requests == []


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        (ssl.TLSVersion.TLSv1_2, Retry),
        # With TLS 1.3, the server rejects a missing certificate only after the client's request.
        (ssl.TLSVersion.TLSv1_3, Unknown),
    ],
)
async def test_without_the_certificate_nothing_is_accepted(
    authority: trustme.CA, version: ssl.TLSVersion, outcome: type
) -> None:
    """An endpoint that requires a client certificate accepts no message without one."""
    async with scripted(OK, asking(authority, version)) as server:
        assert isinstance(await outcome_at(server.url), outcome)
        assert server.requests == []


@pytest.mark.parametrize("content", ["", "no certificate", None])
def test_an_invalid_certificate_stops_the_start(content: str | None, tmp_path: Path) -> None:
    """If a certificate file is missing or invalid, startup fails with an error that names the file."""
    file = tmp_path / "cert.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TransportConfigurationError, match="FOLLOWUPS_TRANSPORT_CLIENT_CERT and"):
        HttpTransport(settings_for("https://host", transport_client_cert=str(file)))


def test_a_key_of_another_certificate_stops_the_start(authority: trustme.CA, tmp_path: Path) -> None:
    """If the private key does not belong to the certificate, startup fails."""
    one, other = authority.issue_cert("one.example"), authority.issue_cert("other.example")
    one.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    other.private_key_pem.write_to_path(tmp_path / "key.pem")
    settings = {"transport_client_cert": f"{tmp_path}/cert.pem", "transport_client_key": f"{tmp_path}/key.pem"}
    with pytest.raises(TransportConfigurationError, match="FOLLOWUPS_TRANSPORT_CLIENT_KEY"):
        HttpTransport(settings_for("https://host", **settings))


@pytest.mark.usefixtures("trusted")
async def test_certificate_files_may_have_any_name(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths of certificate files may contain non-ASCII characters."""
    folder = tmp_path / "schl\u00fcssel"
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.issue_cert("worker.example").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    monkeypatch.setenv("SSL_CERT_FILE", f"{folder}/ca.pem")
    async with scripted(OK, asking(authority, ssl.TLSVersion.TLSv1_2)) as server:
        assert await outcome_at(server.url, transport_client_cert=f"{folder}/both.pem") == Sent(None, 200)


def test_a_client_certificate_requires_https(authority: trustme.CA, tmp_path: Path) -> None:
    """If the endpoint uses plain HTTP, a client certificate is rejected at startup, since it would not be sent."""
    authority.issue_cert("worker.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    with pytest.raises(TransportConfigurationError, match="FOLLOWUPS_TRANSPORT_CLIENT_CERT needs an https"):
        HttpTransport(settings_for("http://host", transport_client_cert=f"{tmp_path}/both.pem"))


@pytest.mark.parametrize("url", ["https://host", "http://host"])
def test_a_key_without_a_certificate_stops_the_start(url: str) -> None:
    """A private key without a certificate is rejected at startup."""
    with pytest.raises(TransportConfigurationError, match="set FOLLOWUPS_TRANSPORT_CLIENT_CERT too"):
        HttpTransport(settings_for(url, transport_client_key="key.pem"))


# Tests of proxies.


@dataclass
class ConnectProxy:
    """A CONNECT proxy that either records its requests and traffic or rejects every request."""

    refusal: bytes = b""
    url: str = ""
    heads: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    seen: bytearray = field(default_factory=bytearray)
    certificates: list[object] = field(default_factory=list)
    """The client certificate of each connection, or None if the client sent none."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.certificates.append(writer.get_extra_info("peercert"))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            self.targets.append(head.split(" ")[1])
            if self.refusal:
                writer.write(self.refusal)
            else:
                host, _, port = self.targets[-1].rpartition(":")
                further = await asyncio.open_connection(host, int(port))
                writer.write(b"HTTP/1.1 200 Connection established\r\nx-proxy: 1\r\n\r\n")
                await asyncio.gather(self._pass(reader, further[1]), self._pass(further[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(65_536):
                self.seen += part
                writer.write(part)
        except ConnectionError:
            pass  # either peer closed the connection
        finally:
            writer.close()


@asynccontextmanager
async def proxy_that(refusal: bytes = b"", secure: ssl.SSLContext | None = None) -> AsyncIterator[ConnectProxy]:
    """Run a CONNECT proxy on a free port, over TLS if a certificate is given."""
    proxy = ConnectProxy(refusal)
    async with listening(proxy.serve, secure) as proxy.url:
        yield proxy


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
async def test_https_is_tunnelled_through_the_proxy(
    authority: trustme.CA, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections through HTTPS_PROXY are reused, and tunnelled so that the proxy sees no plain text."""
    async with proxy_that() as proxy, scripted(OK, certified(authority)) as server:
        monkeypatch.setenv(name, proxy.url)
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            for _ in range(3):
                assert await transport.send(a_delivery()) == Sent(None, 200)
            assert "accepts connections over TLS" in await transport.check()
        assert proxy.targets == [server.url.removeprefix("https://")] * 2
        assert server.connections == 1
        assert proxy.seen
        assert MESSAGE.encode() not in proxy.seen


@pytest.mark.usefixtures("trusted")
async def test_a_second_response_through_a_proxy(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsolicited response that comes through an http proxy is not read as the answer to the next call."""

    async def answer_twice(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(OK)
        writer.write(OTHER)
        await asyncio.sleep(60)

    async with proxy_that() as proxy, scripted(answer_twice, certified(authority)) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            for _ in range(3):
                assert await transport.send(a_delivery()) == Sent(None, 200)
                await asyncio.sleep(0.01)
        assert server.connections == 3


async def test_the_rest_of_a_record_through_a_proxy_over_tls(
    trusted: None,  # noqa: ARG001 - clients trust the certificate
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through an https proxy, an unsolicited response in the TLS record of another response closes the connection."""
    first = answer(200, b" " * (READ_SIZE - len(answer(200, b" " * 900)) + 900))
    assert len(first) == READ_SIZE  # so that reads of this size would end at the end of the response
    async with (
        proxy_that(secure=certified(authority)) as proxy,
        scripted(first + OTHER, certified(authority)) as server,
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            for _ in range(3):
                assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 3


@pytest.mark.usefixtures("trusted")
async def test_the_proxy_receives_no_header_of_the_request(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy receives the endpoint's host and port, but no header of the request."""
    async with proxy_that() as proxy, scripted(OK, certified(authority)) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//user:password@"))
        settings = {"transport_secret": SIGNING_SECRET}
        assert await outcome_at(server.url.replace("//", "//me:hunter2@"), **settings) == Sent(None, 200)
        target = server.url.removeprefix("https://")
        line, *headers = proxy.heads[0].rstrip().split("\r\n")
        assert line == f"CONNECT {target} HTTP/1.1"
        assert sorted(headers) == [
            f"Host: {target}",
            "Proxy-Authorization: Basic dXNlcjpwYXNzd29yZA==",
            "Proxy-Connection: Keep-Alive",
            "User-Agent: followups",
        ]
        assert server.requests[0].headers["user-agent"] == "followups"
        assert "proxy-authorization" not in server.requests[0].headers


def proxied(authority: trustme.CA) -> ssl.SSLContext:
    """Return the TLS context of a proxy that requests a client certificate but does not require one."""
    context = asking(authority, ssl.TLSVersion.TLSv1_2)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", pytest.param("SSL_CERT_DIR", marks=needs_openssl)])
async def test_a_proxy_over_tls_is_trusted_like_the_endpoint(
    variable: str, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An https proxy's certificate is verified like the endpoint's; it gets no client certificate."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    if variable == "SSL_CERT_DIR":
        subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)  # noqa: ASYNC221, S607 - runs before any other task
    monkeypatch.setenv(variable, str(tmp_path if variable == "SSL_CERT_DIR" else tmp_path / "ca.pem"))
    authority.issue_cert("worker.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    async with (
        proxy_that(secure=proxied(authority)) as proxy,
        scripted(OK, asking(authority, ssl.TLSVersion.TLSv1_2)) as server,
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        settings = settings_for(server.url, transport_client_cert=f"{tmp_path}/both.pem")
        async with opened(HttpTransport(settings)) as transport:
            for _ in range(2):
                assert await transport.send(a_delivery()) == Sent(None, 200)
            assert "accepts connections over TLS" in await transport.check()
        assert proxy.certificates == [None, None]  # the connection of both calls, and that of `check`


async def test_a_proxy_of_an_unknown_authority_is_not_trusted(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the certificate of an https proxy cannot be verified, nothing is sent."""
    async with proxy_that(secure=certified(authority)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        outcome = await outcome_at("https://127.0.0.1:9")
        assert isinstance(outcome, Retry)
        assert outcome.detail.startswith("no connection: TLS failed (")
        assert proxy.heads == []


SCHEMES = ["http", "https", "socks4", "socks4a", "socks5", "socks5h"]


@pytest.mark.parametrize(
    "proxy",
    ["proxy:3128", "[::1]:3128", "proxy", "user:pass@proxy:3128", "HTTP://proxy:3128/", " proxy:3128\n"]
    + [f"{scheme}://user:pa%40ss@proxy:3128" for scheme in SCHEMES],
)
def test_a_proxy_may_have_any_scheme_that_can_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy may be an HTTP, HTTPS or SOCKS proxy; without a scheme, it is an HTTP proxy."""
    monkeypatch.setenv("https_proxy", proxy)
    HttpTransport(settings_for("https://host"))


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_scheme_of_a_proxy_is_supported(
    scheme: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each accepted scheme leads to a connection to the proxy."""
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://127.0.0.1:{free_port}")
    assert await outcome_at("https://127.0.0.1:9") == Retry("no connection: Connection refused")


@pytest.mark.parametrize(
    "proxy",
    [
        *("http://", "user:hunter2@", "user:hunter2@proxy:99999", "http://user:hunter2@proxy:0", "http://proxy:"),
        *("ftp://user:hunter2@proxy:3128", "http2://proxy:3128", "http:/proxy:3128", "//proxy:3128", "http://::1:3128"),
        *("http://a b:3128", "http://user:hunter2/@proxy:3128", "http://user:hunter2@x@proxy:3128"),
        *("user:hunter2://@proxy:3128", "http://b\u00fccher.example:3128"),
    ],
)
def test_an_invalid_proxy_stops_the_start(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that cannot be used is rejected at startup, and the error does not show it.

    An endpoint with plain HTTP uses no proxy, so an invalid one is ignored.
    """
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(TransportConfigurationError, match=r"^HTTPS_PROXY should be the address of a proxy") as caught:
        HttpTransport(settings_for("https://host"))
    assert not {"hunter2", "3128"} & set(re.split(r"\W", str(caught.value)))
    HttpTransport(settings_for("http://host"))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("exempt", ["b\u00fccher.example,127.0.0.1", "127.0.0.1", "example.org,127.0.0.1", "*"])
async def test_no_proxy_exempts_hosts(authority: trustme.CA, exempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts in NO_PROXY are called directly, without the proxy."""
    async with proxy_that() as proxy, scripted(OK, certified(authority)) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", exempt)
        assert await outcome_at(server.url) == Sent(None, 200)
        assert proxy.targets == []


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("exempt", ["example.org", "127.0.0", "1", "127.0.0.1:9"])
async def test_no_proxy_exempts_no_other_hosts(
    authority: trustme.CA, exempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that NO_PROXY does not list is called through the proxy."""
    async with proxy_that() as proxy, scripted(OK, certified(authority)) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("no_proxy", exempt)
        assert await outcome_at(server.url) == Sent(None, 200)
        assert proxy.targets == [server.url.removeprefix("https://")]


@pytest.mark.usefixtures("trusted")
async def test_a_tunnel_that_ends_after_the_request(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the connection through a proxy breaks after the request was sent, the outcome is unknown; it was sent once."""

    async def break_off(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.transport.abort()

    async with proxy_that() as proxy, scripted(break_off, certified(authority)) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert isinstance(await outcome_at(server.url), Unknown)
        assert len(server.requests) == 1


async def test_the_proxy_is_for_https_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint with plain HTTP is reached without the proxy."""
    async with proxy_that() as proxy, scripted(OK) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert await outcome_at(server.url) == Sent(None, 200)
        assert proxy.targets == []


@pytest.mark.parametrize("status", [403, 407, 502, 503, 600])
async def test_a_proxys_error_is_not_the_endpoints(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's error response, whatever its status, means that nothing was sent."""
    async with proxy_that(answer(status, b"proxy", retry_after="7")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert await outcome_at("https://127.0.0.1:9") == Retry(f"no connection: the proxy answered HTTP {status}")


async def test_an_unreachable_proxy_is_retried(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call through an unreachable proxy is retried, since nothing was sent."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port}")
    assert await outcome_at("https://127.0.0.1:9") == Retry("no connection: Connection refused")


async def test_a_proxy_that_fails_before_its_tunnel_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a proxy fails before its tunnel exists, nothing was sent, so the call is retried."""
    for refusal in (b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\n\r\nno TLS"):
        async with proxy_that(refusal) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            assert isinstance(await outcome_at("https://127.0.0.1:9", transport_timeout=0.5), Retry)


# Tests of address families.


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("secure", [True, False])
async def test_an_address_of_ip_version_6(authority: trustme.CA, *, secure: bool) -> None:
    """An endpoint can be given as an IPv6 address."""
    async with scripted(OK, certified(authority, "::1") if secure else None, "::1") as server:
        assert "//[::1]:" in server.url
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            for _ in range(2):
                assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 1


ADDRESSES = ["127.0.0.1,[::1]", "[::1],127.0.0.1"]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Return a function that lets a host name resolve to given addresses, and returns the host's URL."""
    options = http_client.connection_options

    def resolve(port: str, addresses: str) -> str:
        entry = f"dual.example:{port}:{addresses}"
        monkeypatch.setattr(
            http_client, "connection_options", lambda settings: options(settings) | {pycurl.RESOLVE: [entry]}
        )
        return f"http://dual.example:{port}"

    return resolve


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("addresses", ADDRESSES)
async def test_a_host_of_two_families_is_reached_by_the_one_that_answers(
    host: str, addresses: str, resolve: Callable[[str, str], str]
) -> None:
    """A host with an IPv4 and an IPv6 address is reached even if it listens on only one of them.

    The order of the host's addresses does not matter.
    """
    async with scripted(OK, host=host) as server:
        url = resolve(server.url.rpartition(":")[2], addresses)
        async with opened(HttpTransport(settings_for(url))) as transport:
            for _ in range(3):
                assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 1


@contextlib.contextmanager
def no_room(host: str, port: int) -> Iterator[None]:
    """Listen with a full backlog, so that the kernel ignores further connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as sockets, socket.create_server((host, port), family=family, backlog=0):
        for _ in range(2):
            client = sockets.enter_context(socket.socket(family))
            client.setblocking(False)  # noqa: FBT003 - a method of the standard library
            client.connect_ex((host, port))
        yield


@pytest.mark.parametrize(("host", "silent"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
@pytest.mark.parametrize("addresses", ADDRESSES)
async def test_a_silent_family_delays_no_message(
    host: str, silent: str, addresses: str, resolve: Callable[[str, str], str]
) -> None:
    """If one of a host's two addresses never responds, messages are soon sent to the other one."""
    async with scripted(OK, host=host) as server:
        port = server.url.rpartition(":")[2]
        url = resolve(port, addresses)
        with no_room(silent, int(port)):
            silent_url = f"http://{f'[{silent}]' if ':' in silent else silent}:{port}"
            assert await outcome_at(silent_url, transport_timeout=0.2) == Retry("no connection within 0.2 s")
            async with opened(HttpTransport(settings_for(url))) as transport:
                began = time.monotonic()
                for _ in range(3):
                    assert await transport.send(a_delivery()) == Sent(None, 200)
                assert time.monotonic() - began < 2
        assert server.connections == 1


# Tests of servers that close idle connections early.


@pytest.mark.parametrize("kept", [0.1, 1, 4])
async def test_a_closed_idle_connection_is_replaced(kept: float) -> None:
    """If the server has closed an idle connection, the next call uses another one.

    If the server closes the connection during a send, the outcome may be unknown. No message arrives twice. The client
    closes an idle connection after 3 s.
    """
    bodies: list[bytes] = []
    ends: asyncio.Queue[str] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        closed_by = "client"
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                while True:
                    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), kept)
                    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    bodies.append(await reader.readexactly(length))
                    writer.write(OK)
            except TimeoutError:
                closed_by = "server"
        ends.put_nowait(closed_by)

    async with listening(serve) as url, opened(HttpTransport(settings_for(url))) as transport:
        for _ in range(2):
            assert await transport.send(a_delivery()) == Sent(None, 200)
            assert await asyncio.wait_for(ends.get(), 10) == ("server" if kept < 3 else "client")
        for _ in range(min(20, round(1 / kept))):
            assert isinstance(await transport.send(a_delivery()), Sent | Unknown)
            await asyncio.sleep(kept)
    assert len(bodies) == len(set(bodies))
