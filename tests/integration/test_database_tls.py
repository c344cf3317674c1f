"""Tests of TLS to PostgreSQL, with Debian's server, because the embedded one has no TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trustme
from sqlalchemy.exc import OperationalError

from faults.replica import INSTALLED, MISSING
from followups.database import make_async_engine, make_engine
from followups.operations.doctor import connection_checks
from followups.transactions import in_loop
from secure_postgres import SecureServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Engine

pytestmark = pytest.mark.skipif(INSTALLED is None, reason=MISSING)


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SecureServer, str]]:
    """Return a TLS server and the file that contains its authority's certificate."""
    assert INSTALLED
    authority = trustme.CA()
    trusted = tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(trusted)
    with SecureServer(INSTALLED, authority) as server:
        yield server, str(trusted)


def detail(engine: Engine) -> str:
    """Return what doctor finds about the connection to the database."""
    (finding,) = connection_checks.of_database(engine)
    return finding.detail


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sslmode=verify-full&sslrootcert={}", "TLSv1.3, certificate and host name verified"),
        ("sslmode=verify-ca&sslrootcert={}", "TLSv1.3, certificate verified, host name not"),
        ("sslmode=require", "TLSv1.3, not verified (sslmode is require; verify-full verifies)"),
        ("", "TLSv1.3, not verified (sslmode is prefer; verify-full verifies)"),
        ("sslmode=disable", "without TLS (sslmode=verify-full in FOLLOWUPS_DATABASE_URL requires and verifies it)"),
    ],
)
def test_doctor_reports_the_connection(tls_server: tuple[SecureServer, str], query: str, said: str) -> None:
    """Doctor shows the database connection's TLS version and what was verified, or the lack of TLS."""
    server, trusted = tls_server
    engine = make_engine(server.secure_url("localhost", query.format(trusted)))
    assert detail(engine) == said
    engine.dispose()
    engine = make_engine(server.url())
    assert detail(engine) == "through a Unix socket"
    engine.dispose()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_an_untrusted_server_is_refused(tls_server: tuple[SecureServer, str], tmp_path: Path, host: str) -> None:
    """With verify-full, a certificate from an unknown authority or for another host name is rejected."""
    server, trusted = tls_server
    if host == "localhost":
        trusted = str(tmp_path / "another.pem")
        trustme.CA().cert_pem.write_to_path(trusted)
    url = server.secure_url(host, f"sslmode=verify-full&sslrootcert={trusted}")
    engine, in_a_loop = make_engine(url), make_async_engine(url)
    refused = "certificate verify failed|does not match host name"
    with pytest.raises(OperationalError, match=refused):
        engine.connect()
    with pytest.raises(OperationalError, match=refused):
        await in_loop(in_a_loop, lambda made: made.connect())
    engine.dispose()
    await in_a_loop.dispose()
