"""TLS to the broker: each client verifies the server before sending any data."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis
import trustme

from followups.api.key_rate_limit import KeyRateLimit
from followups.api.routes.health import ReadinessChecks
from followups.flow_control import connect
from followups.operations.doctor import broker_checks, connection_checks
from followups.operations.doctor.broker_checks import broker_client
from followups.settings import load_settings
from followups.worker.broker import App
from redis_server import MISSING, PROGRAM, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine

    from followups.settings import Settings


class Impostor:
    """A server with a self-signed certificate; it records every byte that clients send over TLS."""

    def __init__(self, certificate: trustme.LeafCert) -> None:
        """Start listening; a thread performs the TLS handshakes."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard = b""
        self.called = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening for connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.called += 1
            with connection:
                connection.settimeout(2)
                try:
                    with self._context.wrap_socket(connection, server_side=True) as secured:
                        self.heard += secured.recv(1024)
                except OSError:
                    continue


def ask_as_celery(settings: Settings, _engine: Engine) -> None:
    """Connect to the broker in the same way as workers, beat and Flower."""
    app = App("test", settings.broker_url.get_secret_value())
    with app.connection_for_write() as connection:
        connection.transport.establish_connection()  # connecting also sends a ping


def ask_as_limiter(settings: Settings, _engine: Engine) -> None:
    """Connect to the broker as the rate limiter and the breaker do."""

    async def ask() -> None:
        client = connect(settings, timedelta(seconds=2))
        try:
            await client.ping()
        finally:
            await client.aclose()

    asyncio.run(ask())


def ask_as_api(settings: Settings, _engine: Engine) -> None:
    """Connect to the broker in the same way as the rate limiter for API keys."""

    async def ask() -> bool:
        limit = KeyRateLimit(settings)
        try:
            await limit.check(uuid4())
            return await limit._storage.check()  # noqa: SLF001 - the public method hides connection errors
        finally:
            await limit.close()

    if not asyncio.run(ask()):
        raise redis.ConnectionError


def ask_as_readiness(settings: Settings, engine: Engine) -> None:
    """Connect to the broker in the same way as `/readyz`."""
    health = ReadinessChecks(settings, engine)
    broker = health.checks()["broker"]
    health.close()
    if not broker.ok:
        raise redis.ConnectionError(broker.detail)


def ask_as_command(settings: Settings, _engine: Engine) -> None:
    """Connect to the broker in the same way as doctor and the other commands."""
    with broker_client(settings, timedelta(seconds=2)) as client:
        client.ping()


CLIENTS = [ask_as_celery, ask_as_limiter, ask_as_api, ask_as_readiness, ask_as_command]


def at(settings: Settings, url: str) -> Settings:
    """Return the settings with the broker URL replaced."""
    return load_settings(**settings.model_dump() | {"broker_url": url})


@pytest.fixture
def impostor() -> Iterator[Impostor]:
    """Return a server whose certificate has the right host name but an unknown issuer."""
    running = Impostor(trustme.CA().issue_cert("localhost"))
    yield running
    running.stop()


@pytest.mark.parametrize("ask", CLIENTS)
def test_an_untrusted_server_receives_no_data(
    ask: Callable[[Settings, Engine], None], settings: Settings, engine: Engine, impostor: Impostor, tmp_path: Path
) -> None:
    """If the server's certificate is from an unknown authority, clients send no data, not even a password."""
    trusted = tmp_path / "authority.pem"
    trustme.CA().cert_pem.write_to_path(trusted)
    for query in ("", f"?ssl_ca_certs={trusted}", f"?ssl_ca_certs={trusted}&ssl_cert_reqs=CERT_REQUIRED"):
        url = f"rediss://:pa55@localhost:{impostor.port}/0{query}"
        with pytest.raises((redis.RedisError, OSError, ssl.SSLError)):
            ask(at(settings, url), engine)
    assert impostor.called >= 3
    (finding,) = broker_checks.broker(at(settings, url))
    assert finding.advice.startswith("Make sure that this is your broker. Then set ssl_ca_certs")
    assert "pa55" not in finding.detail
    assert impostor.heard == b""


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
def test_one_url_serves_every_client(settings: Settings, engine: Engine, redis_server: RedisServer) -> None:
    """Even with an unescaped password, one broker URL works for every client.

    Both spellings of each TLS parameter are accepted.
    """
    for query in ("", "&ssl_cert_reqs=CERT_REQUIRED", "&ssl_cert_reqs=required&ssl_check_hostname=True"):
        for ask in CLIENTS:
            ask(at(settings, redis_server.url(query)), engine)


def finding_detail(settings: Settings) -> str:
    """Return what doctor finds about the connection to the broker."""
    (finding,) = connection_checks.of_broker(settings)
    return finding.detail


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("", "certificate and host name verified"),
        ("&ssl_check_hostname=false", "certificate verified, host name not"),
        ("&ssl_cert_reqs=none", "not verified (ssl_cert_reqs is none)"),
    ],
)
def test_doctor_reports_the_connection(settings: Settings, redis_server: RedisServer, query: str, detail: str) -> None:
    """Doctor shows the broker's TLS version and what was verified, or that TLS is not used."""
    assert finding_detail(at(settings, redis_server.url(query))) == f"TLSv1.3, {detail}"
    assert finding_detail(settings).startswith("without TLS (rediss://")


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
def test_a_certificate_of_another_host(settings: Settings, engine: Engine) -> None:
    """A certificate for another host name is rejected, unless the URL disables the name check."""
    with RedisServer(trustme.CA(), "broker.example") as server:
        for ask in CLIENTS:
            with pytest.raises((redis.RedisError, OSError)):
                ask(at(settings, server.url()), engine)
            for query in ("&ssl_check_hostname=false", "&ssl_cert_reqs=none", "&ssl_cert_reqs=CERT_NONE"):
                ask(at(settings, server.url(query)), engine)
