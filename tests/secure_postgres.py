"""Debian's PostgreSQL with TLS, for tests. The embedded server is built without TLS."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from faults.replica import Server
from followups.embedded import free_port

if TYPE_CHECKING:
    from pathlib import Path

    import trustme

    from followups.embedded.child import Command

ACCESS = """
local all all trust
host all postgres 127.0.0.1/32 trust
hostssl all all 127.0.0.1/32 scram-sha-256
"""
"""The superuser needs no password. Other roles need a password, and must use TLS over a network."""


class SecureServer(Server):
    """A PostgreSQL server that also accepts TLS; its certificate is valid for ``localhost``."""

    def __init__(self, binaries: Path, authority: trustme.CA) -> None:
        """Store the path of the binaries and the authority that signs the server's certificate."""
        super().__init__(binaries)
        self._authority, self._port = authority, free_port()

    def url(self, database: str = "postgres") -> str:
        """Return the database URL that uses the socket."""
        return f"{super().url(database)}&port={self._port}"

    def secure_url(self, host: str, query: str, user: str = "postgres", database: str = "postgres") -> str:
        """Return the database URL for the loopback interface; ``user`` may include a password."""
        return f"postgresql://{user}@{host}:{self._port}/{database}?{query}"

    def _prepare(self, directory: Path) -> Command:
        command = super()._prepare(directory)
        assert command.directory
        keys = command.directory / "server.pem"
        self._authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(keys)
        keys.chmod(0o600)
        if command.run_as:
            shutil.chown(keys, *command.run_as)
        tls = f"ssl = on\nssl_cert_file = '{keys}'\nssl_key_file = '{keys}'\n"
        with (command.directory / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = '127.0.0.1'\nport = {self._port}\n{tls}")
        (command.directory / "pg_hba.conf").write_text(ACCESS)
        return command
