"""URLs of database and broker: which are accepted, and how the others are refused."""

from __future__ import annotations

import pytest

from followups.errors import SettingsError
from followups.settings import load_settings
from followups.urls import check_broker_url, database_url

DATABASE = "postgresql://app:pa55@db:5432/chats"
BROKER = "redis://:pa55@broker:6379/0"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("postgresql://app@one:5432,two:5433/chats", "one,two", "5432,5433"),
        ("postgresql://app:p,a@one,two:5433/chats", "one,two", ",5433"),
        ("postgres://one,two,three/chats?target_session_attrs=primary", "one,two,three", ""),
        ("postgresql://[::1]:5432,[::2]:5433/chats", "::1,::2", "5432,5433"),
        ("postgresql://app@%2Frun%2Fone,two/chats", "/run/one,two", ""),
        ("postgresql://app@%2Frun%2Fone/chats", "/run/one", ""),
        ("postgresql://app@/chats?host=one:5432&host=two:5433", "one,two", "5432,5433"),
        ("postgresql://app@/chats?host=one,two&port=5432,5433", "one,two", "5432,5433"),
        ("postgresql://app@one/chats", "one", ""),
    ],
)
def test_hosts_of_a_database(text: str, host: str, port: str) -> None:
    """Several hosts are read in libpq's form and in both of SQLAlchemy's."""
    url = database_url(text)
    (_, options) = url.get_dialect()().create_connect_args(url)
    assert (options["host"], (options.get("port") or "").rstrip(",")) == (host, port)
    assert options["dbname"] == "chats"


def test_what_stands_beside_the_hosts_stays() -> None:
    """User, password, database and parameters of the URL are kept, also with several hosts."""
    url = database_url("postgresql://me:s%40crs@one,two:1/chats?target_session_attrs=read-write&sslmode=disable")
    assert (url.username, url.password, url.database) == ("me", "s@crs", "chats")
    assert (url.query["target_session_attrs"], url.query["sslmode"]) == ("read-write", "disable")


@pytest.mark.parametrize("hosts", ["one:5432", "one", "one:5432,two:5433"])
def test_escaped_characters(hosts: str) -> None:
    """Escaped characters of a name and a password are read as they are, with one host and with several."""
    url = database_url(f"postgresql://a%40pp:p%40s%2Fs%25%3A%2C,w@{hosts}/chats")
    assert (url.username, url.password, url.database) == ("a@pp", "p@s/s%:,,w", "chats")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://app:pa55@db:port/chats",
        "postgresql://app:pa55@db:65536/chats",
        "postgresql://app:pa55@one:1,two:port/chats",
        "postgresql://app:pa55@one:1:2,two/chats",
        "postgresql://app:pa55@/chats?host=one:a&host=two:b",
        "postgresql://app:p@pa55@db/chats",
        "postgresql://app:p@pa,55@db/chats",
        "postgresql://app:pa55@db/chats?no_such_parameter=1",
        "postgresql://app:pa55@db/chats?port=word",
    ],
)
def test_a_database_url_that_cannot_be_read(text: str) -> None:
    """An invalid database URL is refused in one sentence that shows nothing of the URL."""
    with pytest.raises(
        SettingsError, match=r"^FOLLOWUPS_DATABASE_URL should be a URL that can be read: .*\.$"
    ) as raised:
        load_settings(database_url=text, broker_url=BROKER)
    assert not [word for word in ("pa55", "chats", "app", "no_such") if word in str(raised.value)]


@pytest.mark.parametrize(
    "text",
    [
        "redis://:pa55@broker:port/0",
        "redis://:pa55@broker:0/0",
        "redis://:pa55@broker:65536",
        "redis://:pa55@broker:6379/zero",
        "redis://:pa55@one:6379,two:6379/0",
        "redis://:pa55@one:6379;redis://two:6379",
        "redis://:p@pa55@broker/0",
        "redis://:p#pa55@broker/0",
        "redis://[::1/0",
        "redis://:pa55@broker?socket_timeout=long",
    ],
)
def test_a_broker_url_that_cannot_be_read(text: str) -> None:
    """An invalid broker URL is refused in one sentence that shows nothing of the URL."""
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_BROKER_URL should be a URL that can be read: .*\.$") as raised:
        load_settings(database_url=DATABASE, broker_url=text)
    assert not [word for word in ("pa55", "broker", "zero", "long") if word in str(raised.value)]


@pytest.mark.parametrize(
    "text", ["redis://broker", "rediss://me:p%40ss@[::1]:6380/15?ssl_cert_reqs=none", "redis://h/?db=3", "redis://h:1/"]
)
def test_broker_urls(text: str) -> None:
    """A URL that redis-py and kombu can read is accepted unchanged."""
    check_broker_url(text)
    assert load_settings(database_url=DATABASE, broker_url=text).broker_url.get_secret_value() == text
