"""All settings, each declared once with its name, default, limits and meaning.

Settings are read from the environment with the prefix ``FOLLOWUPS_``. An invalid value ends the process with an error
that names the setting (`SettingsError`). Durations are seconds (``60``, ``0.5``) or ISO 8601 (``PT1M``).
"""

from __future__ import annotations

import math
import os
import re
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from followups.errors import SettingsError
from followups.retry_policy import RetryPolicy
from followups.signing_secrets import keys_of
from followups.urls import HIGHEST_PORT, broker_url, database_url, is_address, port_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Network, IPv6Network

T = TypeVar("T")

LEASE_MARGIN = timedelta(seconds=2)
"""A lease must exceed the transport timeout by at least this margin.

The margin allows for begin, settle and a slow commit.
"""

LONGEST_LEASE = timedelta(hours=1)
"""Maximum duration of a lease.

After a worker has crashed, its follow-ups in flight wait until their leases expire. Without this maximum, the wait
could be hours long.
"""

LEAST_RETENTION = timedelta(days=1)
"""Minimum retention. The API keeps its stored responses, which refer to follow-ups, for this long."""


def _seconds_or_iso(value: object) -> object:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value  # pydantic parses this value as ISO 8601
    if isinstance(value, float) and not math.isfinite(value):
        message = "should be a finite number of seconds"
        raise ValueError(message)
    return value


def _parsed(value: SecretStr, parse: Callable[[str], T]) -> T:
    try:
        return parse(value.get_secret_value())
    except ValueError as error:
        message = f"should be a valid URL: {error}"
        raise ValueError(message) from None


NOT_HTTP = "FOLLOWUPS_TRANSPORT_URL should start with http:// or https://"
NO_ADDRESS = (
    "FOLLOWUPS_TRANSPORT_URL should be an address such as https://chat.example/messages, with a host name in ASCII"
    " (xn--...), and with every other special character percent-encoded"
)
NO_TOKEN = "FOLLOWUPS_TRANSPORT_SECRET should be the access token of the Matrix user that writes the messages"  # noqa: S105

PUBLIC_URL = re.compile(r"https?://(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/[\w.~-]+)*", re.ASCII)
HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]{1,100}", re.ASCII)

Duration = Annotated[timedelta, BeforeValidator(_seconds_or_iso)]
ZERO = timedelta(0)


class Settings(BaseSettings):
    """The settings of every process, documented by `Settings.model_fields`."""

    model_config = SettingsConfigDict(env_prefix="FOLLOWUPS_", frozen=True, extra="ignore", populate_by_name=True)

    database_url: SecretStr = Field(
        validation_alias=AliasChoices("FOLLOWUPS_DATABASE_URL", "DATABASE_URL"),
        description="PostgreSQL 14 or newer, postgresql://user:password@host/name",
    )
    broker_url: SecretStr = Field(
        validation_alias=AliasChoices("FOLLOWUPS_BROKER_URL", "REDIS_URL"),
        description="Redis 6.2 or newer, or Valkey, redis://host:6379/0",
    )
    broker_prefix: str = Field(
        "followups:", min_length=1, description="prefix of every key, so that other programs can use the same broker"
    )
    transport: str = Field("http", min_length=1, description="http, matrix, or the entry-point name of a plug-in")
    transport_url: str | None = Field(None, description="address to which the transport delivers")
    transport_secret: SecretStr | None = Field(
        None, description="secret that signs deliveries (Standard Webhooks), or several, separated by spaces"
    )
    transport_client_cert: str | None = Field(
        None, description="PEM file of the client certificate and its chain, if the endpoint requires one"
    )
    transport_client_key: str | None = Field(
        None,
        description="PEM file of the client certificate's key, without a password; default: the certificate's file",
    )
    transport_timeout: Duration = Field(
        timedelta(seconds=10), gt=ZERO, description="maximum duration of one transport call"
    )
    transport_deduplicates: bool = Field(
        default=True, description="the transport recognises a repeated idempotency-key"
    )
    tick_interval: Duration = Field(
        timedelta(seconds=1), ge=timedelta(milliseconds=100), le=timedelta(minutes=5), description="time between ticks"
    )
    lease: Duration = Field(
        timedelta(seconds=60),
        gt=ZERO,
        lt=LONGEST_LEASE,
        description="how long a claim or an attempt may take until another worker takes over",
    )
    max_attempts: int = Field(8, ge=1, le=1000, description="maximum number of attempts for one follow-up")
    retry_base: Duration = Field(timedelta(seconds=5), gt=ZERO, description="upper limit of the first backoff")
    retry_factor: float = Field(
        2.0, ge=1.0, le=100.0, allow_inf_nan=False, description="growth of the backoff with each attempt"
    )
    retry_cap: Duration = Field(
        timedelta(hours=1), gt=ZERO, le=timedelta(days=30), description="upper limit of every backoff"
    )
    max_lateness: Duration = Field(
        timedelta(days=1),
        ge=ZERO,
        le=timedelta(days=36_500),
        description="how long after its due date a message may be sent; 0 = without limit",
    )
    retention: Duration = Field(
        ZERO,
        le=timedelta(days=36_500),
        description="how long finished follow-ups are kept, at least a day; 0 = forever",
    )
    audit_retention: Duration = Field(
        timedelta(days=365),
        le=timedelta(days=36_500),
        description="how long audit events are kept, at least a day; 0 = forever",
    )
    max_in_flight: int = Field(5000, ge=1, le=1_000_000, description="maximum number of claimed, unfinished follow-ups")
    batch_size: int = Field(100, ge=1, le=10_000, description="maximum number of follow-ups in one deliver task")
    concurrency: int = Field(
        100, ge=1, le=10_000, description="maximum number of concurrent calls in one worker process"
    )
    breaker_failures: int = Field(
        50,
        ge=0,
        le=1_000_000,
        description="the breaker opens after this many different follow-ups have failed in a row; 0 = never",
    )
    api_rate_limit: int = Field(
        60_000,
        ge=0,
        le=100_000_000,
        validation_alias=AliasChoices("FOLLOWUPS_API_RATE_LIMIT", "FOLLOWUPS_RATE_LIMIT"),
        description="API requests per minute for each key; 0 = no limit",
    )
    remote_control: bool = Field(
        default=False, description="whether Flower and celery control may stop and change workers"
    )
    metrics_port: int | None = Field(
        None, ge=1, le=HIGHEST_PORT, description="separate port of web that serves only /metrics; default: PORT"
    )
    console: bool = Field(default=True, description="whether web serves the console at /console")
    public_url: str | None = Field(
        None,
        description="address at which people reach web, with any path prefix, as in https://chat.example/followups",
    )
    console_proxy_header: str | None = Field(
        None, description="header in which an authenticating proxy names the person"
    )
    console_proxy_addresses: str | None = Field(
        None, description="addresses and networks from which the header is trusted, separated by commas"
    )
    console_proxy_role: Literal["viewer", "agent", "admin", "operator"] | None = Field(
        None, description="role, in all workspaces, of people whom the proxy has authenticated"
    )
    runtime_dir: str | None = Field(
        None, description="directory of the heartbeat files for followups health; default: in the temporary directory"
    )
    log_format: Literal["json", "console"] | None = Field(
        None, description="json or console; default: console on a terminal, json elsewhere"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level logged")

    @field_validator("database_url", "broker_url", "transport_url", mode="before")
    @classmethod
    def _without_white_space(cls, value: object) -> object:
        return value.strip() if isinstance(value, str) else value

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _empty_is_no_port(cls, value: object) -> object:
        return (port_of(value, "") or None) if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            message = "should start with postgresql://"
            raise ValueError(message)
        _parsed(value, database_url)
        return value

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("redis://", "rediss://")):
            message = "should start with redis:// or rediss://"
            raise ValueError(message)
        return SecretStr(_parsed(value, broker_url))

    @field_validator("public_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        value = (value or "").rstrip("/")
        if value and not PUBLIC_URL.fullmatch(value):
            message = "should be an origin, optionally with a path, as in https://chat.example/followups"
            raise ValueError(message)
        return value or None

    @field_validator("console_proxy_header")
    @classmethod
    def _is_a_header(cls, value: str | None) -> str | None:
        if value and not HEADER.fullmatch(value):
            message = "should be the name of a header, as in X-Forwarded-Email"
            raise ValueError(message)
        return value.lower() if value else None

    @field_validator("console_proxy_addresses")
    @classmethod
    def _are_networks(cls, value: str | None) -> str | None:
        try:
            networks_of(value)
        except ValueError:
            message = "should be addresses or networks, separated by commas, as in 10.0.0.7,192.168.0.0/24"
            raise ValueError(message) from None
        return value or None

    @field_validator("console_proxy_role", mode="before")
    @classmethod
    def _empty_is_no_role(cls, value: object) -> object:
        return value or None

    @field_validator("transport_url", "transport_client_cert", "transport_client_key")
    @classmethod
    def _empty_means_unset(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("runtime_dir")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        if value and not value.startswith("/"):
            message = "should be an absolute path"
            raise ValueError(message)
        return value or None

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return (value.lower() or None) if isinstance(value, str) else value

    @field_validator("transport_secret")
    @classmethod
    def _empty_is_none(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value and value.get_secret_value() else None

    @field_validator("retention", "audit_retention")
    @classmethod
    def _is_a_day_or_more(cls, value: timedelta) -> timedelta:
        # A bare number means seconds. Without a minimum, 90 (meant as days) would delete everything older than 90
        # seconds.
        if value and value < LEAST_RETENTION:
            message = "should be 0, or at least a day (86400, or P1D)"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _sum_of_timeouts(self) -> Self:
        # A worker must not lose its lease while it waits for a response: transport timeout (10 s) + margin (2 s) <=
        # lease (60 s). Hints do not expire. The broker has no visibility timeout, so a consumed hint never returns to
        # its queue.
        if self.transport_timeout + LEASE_MARGIN > self.lease:
            message = (
                f"FOLLOWUPS_LEASE should be at least {LEASE_MARGIN.total_seconds():g} s longer than"
                " FOLLOWUPS_TRANSPORT_TIMEOUT"
            )
            raise ValueError(message)
        return self

    @field_validator("transport")
    @classmethod
    def _is_installed(cls, value: str) -> str:
        if value not in transports():
            message = f"should be the name of an installed transport: {', '.join(sorted(transports()))}"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _fits_the_transport(self) -> Self:
        # A plug-in may give these settings another meaning.
        if self.transport not in {"http", "matrix"}:
            return self
        url = self.transport_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(NOT_HTTP)
        if url is not None and not is_address(url):
            raise ValueError(NO_ADDRESS)
        secret = self.transport_secret and self.transport_secret.get_secret_value()
        if secret and self.transport == "http":
            keys_of(secret)
        if secret and self.transport == "matrix" and not is_access_token(secret.strip()):
            raise ValueError(NO_TOKEN)
        return self

    @model_validator(mode="after")
    def _whole_proxy(self) -> Self:
        given = (self.console_proxy_header, self.console_proxy_addresses, self.console_proxy_role)
        if any(given) and not all(given):
            message = (
                "FOLLOWUPS_CONSOLE_PROXY_HEADER, FOLLOWUPS_CONSOLE_PROXY_ADDRESSES and FOLLOWUPS_CONSOLE_PROXY_ROLE"
                " should be set together"
            )
            raise ValueError(message)
        return self

    @property
    def retry_policy(self) -> RetryPolicy:
        """The retry policy that the four retry settings define."""
        return RetryPolicy(self.retry_base, self.retry_factor, self.retry_cap, self.max_attempts)

    @property
    def exclusive_external_ids(self) -> bool:
        """Whether an external id may belong to only one workspace.

        A request of the `matrix` transport names only the room (the chat's external id), not the workspace.
        """
        return self.transport == "matrix"

    def environment(self) -> dict[str, str]:
        """Return the environment variables that pass these settings to another process.

        The returned secrets are in plain text.
        """
        files = {f"{name}_FILE": "" for field in FROM_FILES for name in _names(field)}
        return files | {environment_name(name): _plain(value) for name, value in self if value is not None}

    def shown(self) -> dict[str, str]:
        """Return every setting for display, keyed by its environment variable. Secrets and passwords are hidden."""
        return {environment_name(name): _hidden(name, value) for name, value in self}


def transports() -> dict[str, EntryPoint]:
    """Return the entry points of the installed transports by name (group ``followups.transports``).

    A plug-in registers its transport as ``name = "package.module:Class"``.
    """
    return {entry_point.name: entry_point for entry_point in entry_points(group="followups.transports")}


def is_access_token(secret: str) -> bool:
    """Return whether a secret can be sent as an access token: visible ASCII characters only."""
    return bool(secret) and secret.isascii() and secret.isprintable() and " " not in secret


def networks_of(addresses: str | None) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks in a comma-separated list. Raises `ValueError`.

    >>> [str(network) for network in networks_of("10.0.0.7, 192.168.0.0/24")]
    ['10.0.0.7/32', '192.168.0.0/24']
    """
    return tuple(ip_network(each.strip()) for each in (addresses or "").split(",") if each.strip())


def environment_name(field: str) -> str:
    """Return the name of the environment variable for a field, such as ``FOLLOWUPS_LEASE`` for ``lease``."""
    return f"FOLLOWUPS_{field.upper()}"


def _plain(value: Any) -> str:  # noqa: ANN401 - the value of any field
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, timedelta):
        # Durations are written with six decimals, because the format 'g' would round them to six digits.
        return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hidden(name: str, value: Any) -> str:  # noqa: ANN401 - the value of any field
    if value is None:
        return "-"
    if isinstance(value, SecretStr):
        return hide_password(value.get_secret_value()) if name.endswith("_url") else "***"
    return hide_password(_plain(value)) if name.endswith("_url") else _plain(value)


def hide_password(url: str) -> str:
    """Return the URL without its password and without its query.

    >>> hide_password("redis://me:secret@host:6379/0")
    'redis://me:***@host:6379/0'
    """
    rest = re.sub(r"\A[A-Za-z][\w+.-]*://", "", url)
    # Everything before the last '@' is hidden, so that an unescaped '/', '?' or '@' in a password reveals nothing.
    user, at, host = rest.rpartition("@")
    shown = f"{re.split('[:/?#]', user)[0]}:***@" if at else ""
    return f"{url.removesuffix(rest)}{shown}{host.partition('?')[0]}"


FROM_FILES = ("database_url", "broker_url", "transport_url", "transport_secret")
"""Settings that can be read from a file instead of the environment: secrets and URLs.

The variable with ``_FILE`` after the setting's name contains the file's path.
"""


def load_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - the value of any field
    """Read the settings from the environment.

    Raises `SettingsError` with a message that names each invalid setting.
    """
    try:
        return Settings(**_read_files() | overrides)
    except ValidationError as error:
        message = "; ".join(_sentence(detail) for detail in error.errors()) + "."
        raise SettingsError(message) from None


def _read_files() -> dict[str, str]:
    """Return the settings from files (``_FILE``), stripped of surrounding white space."""
    found: dict[str, str] = {}
    for field in FROM_FILES:
        for name in _names(field):
            value = read_file_of(name)
            if value is not None:
                found[field] = value
            # FOLLOWUPS_ names take precedence, as they do for plain variables
            if value is not None or os.environ.get(name):
                break
    return found


def read_file_of(name: str) -> str | None:
    """Return the stripped content of the file named by ``NAME_FILE``, or None if the variable is not set.

    Raises `SettingsError` if ``NAME`` is also set, or if the file is empty or cannot be read.
    """
    if not (path := os.environ.get(f"{name}_FILE")):
        return None
    if os.environ.get(name):
        message = f"{name} and {name}_FILE are both set: unset one of them."
        raise SettingsError(message)
    try:
        content = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        message = f"{name}_FILE should name a readable file ({why})."
        raise SettingsError(message) from None
    if not content:
        message = f"{name}_FILE should name a file that is not empty."
        raise SettingsError(message)
    return content


def _names(field: str) -> list[str]:
    alias = Settings.model_fields[field].validation_alias
    return [str(name) for name in alias.choices] if isinstance(alias, AliasChoices) else [environment_name(field)]


def _sentence(detail: Any) -> str:  # noqa: ANN401 - pydantic's own ErrorDetails
    location = [str(part) for part in detail["loc"]]
    said = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    if not location:
        return f"{said}"
    name = location[0] if location[0].isupper() else environment_name(location[0])
    names = next((names for field in Settings.model_fields if name in (names := _names(field))), [])
    # the name of the variable as the operator wrote it
    name = next((each for each in names if os.environ.get(each)), name)
    if detail["type"] == "missing":
        described = next(f.description for n, f in Settings.model_fields.items() if environment_name(n) == name)
        return f"{name} is required: set it to {described}"
    return f"{name} {said}"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the settings of this process, which are read only once."""
    return load_settings()
