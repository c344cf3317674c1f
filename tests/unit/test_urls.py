"""Tests of database and broker URLs: accepted forms, and errors for invalid URLs."""

from __future__ import annotations

import ssl

import pytest
import redis.connection
from kombu.utils import url as kombu_url

from followups.errors import SettingsError
from followups.settings import load_settings
from followups.urls import broker_url, database_url, tls_of

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
    """A URL with several database hosts is accepted in libpq's form and in both of SQLAlchemy's forms."""
    url = database_url(text)
    (_, options) = url.get_dialect()().create_connect_args(url)
    assert (options["host"], (options.get("port") or "").rstrip(",")) == (host, port)
    assert options["dbname"] == "chats"


def test_other_parts_of_the_url_are_kept() -> None:
    """User, password, database and parameters of the URL are kept, even with several hosts."""
    url = database_url("postgresql://me:s%40crs@one,two:1/chats?target_session_attrs=read-write&sslmode=disable")
    assert (url.username, url.password, url.database) == ("me", "s@crs", "chats")
    assert (url.query["target_session_attrs"], url.query["sslmode"]) == ("read-write", "disable")


@pytest.mark.parametrize("hosts", ["one:5432", "one", "one:5432,two:5433"])
def test_escaped_characters(hosts: str) -> None:
    """Escaped characters in a user name or password are decoded, whether the URL has one host or several."""
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
        "postgresql://a/pp:pa55@db/chats",
        "postgresql://app:pa55@db/chats?connect_timeout=pa55",
        "postgresql://app:pa55@db/chats?sslmode=pa55",
        "postgresql://app:pa55@db/chats?target_session_attrs=pa55",
    ],
)
def test_an_invalid_database_url(text: str) -> None:
    """If a database URL is invalid, the error is one sentence that contains no part of the URL."""
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_DATABASE_URL should be a valid URL: .*\.$") as raised:
        load_settings(database_url=text, broker_url=BROKER)
    assert not [word for word in ("pa55", "chats", "app", "no_such") if word in str(raised.value)]


@pytest.mark.parametrize(
    "text",
    [
        "redis://:pa55@broker:port/0",
        "redis://:pa55@broker:0/0",
        "redis://:pa55@broker:6379:6379/0",
        "redis://:pa55@bro ker/0",
        "redis://:pa55@broker:65536",
        "redis://:pa55@broker:6379/zero",
        "redis://:pa55@one:6379,two:6379/0",
        "redis://:pa55@one:6379;redis://two:6379",
        "redis://:p@pa55@broker/0",
        "redis://:pa55@broker/0#1",
        "redis://:pa55@broker/?db=zero",
        "redis://:pa55@broker/?pa55=1",
        "redis://:pa55@broker/?ssl_cert_reqs=none",
        "rediss://:pa55@broker/?ssl_cert_reqs=long",
        "rediss://:pa55@broker/?ssl_ca_certs=/nowhere/pa55.pem",
        "rediss://:pa55@broker/?ssl_ca_path=/nowhere/pa55",
        "redis://[::1/0",
        "redis://:pa55@broker?socket_timeout=long",
    ],
)
def test_an_invalid_broker_url(text: str) -> None:
    """If a broker URL is invalid, the error is one sentence that contains no part of the URL."""
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_BROKER_URL should be a valid URL: .*\.$") as raised:
        load_settings(database_url=DATABASE, broker_url=text)
    assert not [word for word in ("pa55", "broker", "zero", "long") if word in str(raised.value)]


@pytest.mark.parametrize("text", ["redis://broker/", "redis://me:p%40ss@[::1]:6380/15", "redis://h:1/3", "redis://@h/"])
def test_broker_urls(text: str) -> None:
    """If redis-py and kombu parse a broker URL identically, only its surrounding white space is removed."""
    assert broker_url(text) == text
    assert load_settings(database_url=DATABASE, broker_url=f" {text}\n").broker_url.get_secret_value() == text


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("redis://:p/a?s#s:1@broker:1/2", "redis://:p%2Fa%3Fs%23s%3A1@broker:1/2"),
        ("redis://m%2Fe:100%@broker", "redis://m%2Fe:100%25@broker/"),
        ("redis://broker/?db=3", "redis://broker/3"),
        ("redis://broker/2?socket_timeout=5&protocol=3&health_check_interval=30", "redis://broker/2"),
        ("rediss://broker/2", "rediss://broker/2?ssl_cert_reqs=required"),
        ("rediss://broker/?ssl_cert_reqs=CERT_NONE", "rediss://broker/?ssl_cert_reqs=none"),
        ("rediss://broker/?ssl_cert_reqs=optional", "rediss://broker/?ssl_cert_reqs=optional"),
        (
            "rediss://broker/?ssl_check_hostname=False",
            "rediss://broker/?ssl_check_hostname=false&ssl_cert_reqs=required",
        ),
    ],
)
def test_a_broker_url_is_normalised(text: str, read: str) -> None:
    """redis-py and kombu read the same password, TLS parameters and database from a normalised URL."""
    assert broker_url(text) == broker_url(read) == read
    ours, theirs = redis.connection.parse_url(read), kombu_url.parse_url(read)
    for name, named in {"username": "userid", "password": "password", "host": "hostname", "port": "port"}.items():
        assert ours.get(name) == theirs[named]
    assert str(ours.get("db", "")) == (theirs["virtual_host"] or "")
    verified = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
    tls = theirs.get("ssl", {})
    assert tls.get("ssl_cert_reqs") == verified.get(ours.get("ssl_cert_reqs"))
    assert tls.get("ssl_check_hostname") == ours.get("ssl_check_hostname") == tls_of(read).get("ssl_check_hostname")


def test_white_space_around_a_database_url() -> None:
    """White space around a database URL is removed."""
    read = load_settings(database_url=f"\t{DATABASE} \n", broker_url=BROKER)
    assert read.database_url.get_secret_value() == DATABASE
