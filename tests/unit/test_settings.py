"""Tests of the settings: names, defaults, limits, display and errors."""

from __future__ import annotations

import base64
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from followups.errors import SettingsError
from followups.settings import (
    LEASE_MARGIN,
    LONGEST_LEASE,
    Settings,
    environment_name,
    get_settings,
    hide_password,
    load_settings,
)

if TYPE_CHECKING:
    from pathlib import Path

DATABASE_URL = "postgresql://app:pa55@db:5432/followups"
BROKER_URL = "redis://:s3cret@broker:6379/0"
SECRET = base64.b64encode(bytes(range(24))).decode()

DEFAULTS: dict[str, Any] = {
    "FOLLOWUPS_TRANSPORT": "http",
    "FOLLOWUPS_TRANSPORT_URL": None,
    "FOLLOWUPS_TRANSPORT_SECRET": None,
    "FOLLOWUPS_TRANSPORT_TIMEOUT": timedelta(seconds=10),
    "FOLLOWUPS_TRANSPORT_DEDUPLICATES": True,
    "FOLLOWUPS_TICK_INTERVAL": timedelta(seconds=1),
    "FOLLOWUPS_LEASE": timedelta(seconds=60),
    "FOLLOWUPS_MAX_ATTEMPTS": 8,
    "FOLLOWUPS_RETRY_BASE": timedelta(seconds=5),
    "FOLLOWUPS_RETRY_FACTOR": 2.0,
    "FOLLOWUPS_RETRY_CAP": timedelta(hours=1),
    "FOLLOWUPS_MAX_LATENESS": timedelta(days=1),
    "FOLLOWUPS_RETENTION": timedelta(0),
    "FOLLOWUPS_MAX_IN_FLIGHT": 5000,
    "FOLLOWUPS_BATCH_SIZE": 100,
    "FOLLOWUPS_CONCURRENCY": 100,
    "FOLLOWUPS_API_RATE_LIMIT": 60_000,
    "FOLLOWUPS_METRICS_PORT": None,
    "FOLLOWUPS_REMOTE_CONTROL": False,
    "FOLLOWUPS_LOG_FORMAT": None,
    "FOLLOWUPS_LOG_LEVEL": "info",
}
"""Names and defaults of the documented settings, except the two required URLs."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set only the required settings in the environment."""
    for name in [*DEFAULTS, "DATABASE_URL", "REDIS_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOLLOWUPS_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("FOLLOWUPS_BROKER_URL", BROKER_URL)


def _by_name(settings: Settings) -> dict[str, Any]:
    return {environment_name(name): value for name, value in settings}


def test_every_published_name_has_its_default() -> None:
    """With only the two URLs set, every other documented setting has its default."""
    read = _by_name(load_settings())
    assert read["FOLLOWUPS_DATABASE_URL"] == SecretStr(DATABASE_URL)
    assert read["FOLLOWUPS_BROKER_URL"] == SecretStr(BROKER_URL)
    assert {name: read[name] for name in DEFAULTS} == DEFAULTS


def test_the_api_rate_limit_has_an_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOLLOWUPS_RATE_LIMIT is still read, but FOLLOWUPS_API_RATE_LIMIT takes precedence."""
    monkeypatch.setenv("FOLLOWUPS_RATE_LIMIT", "7")
    assert load_settings().api_rate_limit == 7
    monkeypatch.setenv("FOLLOWUPS_API_RATE_LIMIT", "8")
    assert load_settings().api_rate_limit == 8


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("FOLLOWUPS_DATABASE_URL", "database_url"),
        ("DATABASE_URL", "database_url"),
        ("REDIS_URL", "broker_url"),
        ("FOLLOWUPS_TRANSPORT_SECRET", "transport_secret"),
    ],
)
def test_a_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, field: str) -> None:
    """A secret or URL can be read from the file that NAME_FILE names, without surrounding white space."""
    values = {"database_url": DATABASE_URL, "broker_url": BROKER_URL, "transport_secret": "whsec_" + "x" * 32}
    file = tmp_path / "secret"
    file.write_text(f"  {values[field]}\n\n")
    monkeypatch.setenv(f"{name}_FILE", str(file))
    others = {other: value for other, value in values.items() if other in {"database_url", "broker_url"} - {field}}
    for variable in ("FOLLOWUPS_DATABASE_URL", "FOLLOWUPS_BROKER_URL"):
        monkeypatch.delenv(variable)
    assert getattr(load_settings(**others), field).get_secret_value() == values[field]


def test_a_file_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If a secret file is missing, startup fails with an error that names only the setting.

    If a setting has both a variable and a file, startup fails.
    """
    monkeypatch.setenv("FOLLOWUPS_TRANSPORT_SECRET_FILE", str(tmp_path / "s3cret"))
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT_SECRET_FILE should name a readable file") as error:
        load_settings()
    assert "s3cret" not in str(error.value)
    monkeypatch.setenv("FOLLOWUPS_DATABASE_URL_FILE", str(tmp_path))
    with pytest.raises(SettingsError, match="FOLLOWUPS_DATABASE_URL and FOLLOWUPS_DATABASE_URL_FILE are both set"):
        load_settings()


def test_every_setting_has_a_description() -> None:
    """Every setting has a description, which the documentation and the errors quote."""
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("name", "given_value", "read"),
    [
        ("TRANSPORT", "matrix", "matrix"),
        ("TRANSPORT_URL", "https://chat.example/hook", "https://chat.example/hook"),
        ("TRANSPORT_URL", "", None),
        ("TRANSPORT_SECRET", f"whsec_{SECRET}", SecretStr(f"whsec_{SECRET}")),
        ("TRANSPORT_SECRET", "", None),
        ("TRANSPORT_TIMEOUT", "2.5", timedelta(seconds=2.5)),
        ("TRANSPORT_DEDUPLICATES", "false", False),
        ("TICK_INTERVAL", "0.25", timedelta(milliseconds=250)),
        ("LEASE", "PT2M", timedelta(minutes=2)),
        ("MAX_ATTEMPTS", "3", 3),
        ("RETRY_BASE", "PT0.5S", timedelta(milliseconds=500)),
        ("RETRY_FACTOR", "1.5", 1.5),
        ("RETRY_CAP", "P1D", timedelta(days=1)),
        ("MAX_LATENESS", "0", timedelta(0)),
        ("MAX_IN_FLIGHT", "10", 10),
        ("BATCH_SIZE", "1", 1),
        ("CONCURRENCY", "7", 7),
        ("LOG_FORMAT", "JSON", "json"),
        ("LOG_FORMAT", "", None),
        ("LOG_LEVEL", "Warning", "warning"),
    ],
)
def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, name: str, given_value: str, read: object) -> None:
    """Each setting is read from its variable; durations are given in seconds or ISO 8601."""
    monkeypatch.setenv(f"FOLLOWUPS_{name}", given_value)
    assert _by_name(load_settings())[f"FOLLOWUPS_{name}"] == read


@pytest.mark.parametrize(
    ("field", "alias", "url"),
    [("database_url", "DATABASE_URL", "postgres://h/d"), ("broker_url", "REDIS_URL", "rediss://h:6380/1")],
)
def test_the_platforms_usual_names_are_read_too(
    monkeypatch: pytest.MonkeyPatch, field: str, alias: str, url: str
) -> None:
    """DATABASE_URL and REDIS_URL are read only if the project's own variables are not set."""
    monkeypatch.setenv(alias, url)
    assert getattr(load_settings(), field).get_secret_value() != url
    monkeypatch.delenv(environment_name(field))
    assert getattr(load_settings(), field).get_secret_value().startswith(url)


@pytest.mark.parametrize("field", ["database_url", "broker_url"])
def test_a_missing_required_setting_is_named(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """If a required URL is missing, the error names the setting and an example."""
    monkeypatch.delenv(environment_name(field))
    with pytest.raises(SettingsError, match=rf"^{environment_name(field)} is required: set it to .*\w+://.*\.$"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://app:pa55@db/followups"),
        ("BROKER_URL", "amqp://app:pa55@broker"),
        ("TRANSPORT", ""),
        ("TRANSPORT_URL", "chat.example/hook"),
        ("TRANSPORT_TIMEOUT", "0"),
        ("TRANSPORT_TIMEOUT", "nan"),
        ("TRANSPORT_DEDUPLICATES", "perhaps"),
        ("TICK_INTERVAL", "0.01"),
        ("TICK_INTERVAL", "PT1H"),
        ("LEASE", "inf"),
        ("LEASE", "3600"),
        ("LEASE", "a minute"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_ATTEMPTS", "1.5"),
        ("RETRY_BASE", "-1"),
        ("RETRY_FACTOR", "0.5"),
        ("RETRY_FACTOR", "inf"),
        ("RETRY_CAP", "P31D"),
        ("MAX_LATENESS", "-1"),
        ("MAX_LATENESS", "1e300"),
        ("MAX_IN_FLIGHT", "0"),
        ("BATCH_SIZE", "0"),
        ("CONCURRENCY", "many"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_stops_the_start_with_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """If a value is invalid, the error begins with the variable's name and shows no password."""
    monkeypatch.setenv(f"FOLLOWUPS_{name}", value)
    with pytest.raises(SettingsError, match=rf"^FOLLOWUPS_{name} should .*\.$") as caught:
        load_settings()
    assert "pa55" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_all_wrong_values_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names all invalid settings together."""
    monkeypatch.setenv("FOLLOWUPS_MAX_ATTEMPTS", "0")
    monkeypatch.setenv("FOLLOWUPS_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError, match=r"FOLLOWUPS_MAX_ATTEMPTS should .*; FOLLOWUPS_LOG_LEVEL should"):
        load_settings()


@pytest.mark.parametrize("from_file", [True, False])
def test_the_prefix_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, from_file: bool) -> None:
    """DATABASE_URL_FILE is ignored if FOLLOWUPS_DATABASE_URL is set, directly or through a file."""
    other, own = tmp_path / "other", tmp_path / "own"
    other.write_text("postgresql://other/other")
    own.write_text(DATABASE_URL)
    monkeypatch.setenv("DATABASE_URL_FILE", str(other))
    if from_file:
        monkeypatch.delenv("FOLLOWUPS_DATABASE_URL")
        monkeypatch.setenv("FOLLOWUPS_DATABASE_URL_FILE", str(own))
    else:
        monkeypatch.setenv("FOLLOWUPS_DATABASE_URL", DATABASE_URL)
    assert load_settings().database_url.get_secret_value() == DATABASE_URL


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """A file without a value is an error: with an empty secret, deliveries would not be signed."""
    path = tmp_path / "secret"
    path.write_text(content)
    monkeypatch.setenv("FOLLOWUPS_TRANSPORT_SECRET_FILE", str(path))
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT_SECRET_FILE should name a file that is not empty"):
        load_settings()


def test_a_lease_outlives_an_attempt() -> None:
    """A lease exceeds the transport's timeout by at least the margin, and is shorter than an hour."""
    timeout = timedelta(seconds=20)
    assert load_settings(transport_timeout=timeout, lease=timeout + LEASE_MARGIN).lease == timedelta(seconds=22)
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_LEASE should be at least 2 s longer"):
        load_settings(transport_timeout=timeout, lease=timedelta(seconds=21.5))
    with pytest.raises(SettingsError, match="FOLLOWUPS_LEASE"):
        load_settings(lease=LONGEST_LEASE)


def test_secrets_are_not_shown() -> None:
    """The displayed settings and their repr contain neither passwords nor the transport's secret."""
    url = "https://me:pa55@chat.example/hook?key=s3cret"
    settings = load_settings(transport_secret=SECRET, transport_url=url)
    shown = settings.shown()
    assert shown["FOLLOWUPS_DATABASE_URL"] == "postgresql://app:***@db:5432/followups"
    assert shown["FOLLOWUPS_BROKER_URL"] == "redis://:***@broker:6379/0"
    assert shown["FOLLOWUPS_TRANSPORT_URL"] == "https://me:***@chat.example/hook"
    assert set(shown["FOLLOWUPS_TRANSPORT_SECRET"]) == {"*"}
    assert shown["FOLLOWUPS_LEASE"] == "60"
    assert shown["FOLLOWUPS_LOG_FORMAT"] == "-"
    for secret in ("pa55", "s3cret", SECRET):
        assert secret not in str(shown)
    assert "pa55@db" not in repr(settings)


@pytest.mark.parametrize("password", ["plain", "with@at", "with/slash", "with?question", "with:colon", "with#hash"])
def test_no_part_of_an_unescaped_password_is_shown(password: str) -> None:
    """A password with unescaped special characters is hidden completely."""
    assert hide_password(f"postgresql://app:{password}@db/followups") == "postgresql://app:***@db/followups"


@pytest.mark.parametrize("password", ["plain", "with://scheme", "with@at"])
def test_a_password_is_hidden_even_without_a_scheme(password: str) -> None:
    """The password of an address without a scheme, such as a proxy's address, is hidden too."""
    assert hide_password(f"app:{password}@proxy:3128") == "app:***@proxy:3128"


def test_a_url_without_a_password_stays_as_it_is() -> None:
    """In a URL without credentials, only the query is hidden."""
    assert hide_password("redis://broker:6379/0?ssl=1") == "redis://broker:6379/0"


def test_another_process_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are written to another process's environment are read back unchanged."""
    settings = load_settings(transport_url="http://127.0.0.1:9/", transport_deduplicates=False, log_format="console")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


@given(st.timedeltas(timedelta(0), timedelta(days=36_500)))
def test_durations_pass_unrounded(max_lateness: timedelta) -> None:
    """A duration passed through the environment is exact to the microsecond."""
    text = load_settings(max_lateness=max_lateness).environment()["FOLLOWUPS_MAX_LATENESS"]
    assert "e" not in text
    assert load_settings(max_lateness=text).max_lateness == max_lateness


def test_the_retry_policy_comes_from_the_settings() -> None:
    """The retry policy is defined by the four retry settings."""
    policy = load_settings(retry_base=1, retry_factor=3, retry_cap=10, max_attempts=5).retry_policy
    assert [policy.ceiling(attempt).total_seconds() for attempt in (1, 2, 3)] == [1, 3, 9]
    assert (policy.cap, policy.max_attempts) == (timedelta(seconds=10), 5)


def test_a_process_reads_its_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a process are read once and cannot be changed."""
    settings = get_settings()
    monkeypatch.setenv("FOLLOWUPS_MAX_ATTEMPTS", "1")
    assert get_settings() is settings
    assert os.environ["FOLLOWUPS_MAX_ATTEMPTS"] == "1"
    with pytest.raises(ValueError, match="frozen"):
        settings.max_attempts = 2


@pytest.mark.parametrize("value", ["90", "P0DT23H", "-1"])
def test_a_retention_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A retention of 90, probably meant as days, is rejected with an explanation; nothing is deleted."""
    monkeypatch.setenv("FOLLOWUPS_DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("FOLLOWUPS_BROKER_URL", BROKER_URL)
    monkeypatch.setenv("FOLLOWUPS_RETENTION", value)
    with pytest.raises(SettingsError, match=r"FOLLOWUPS_RETENTION should be 0, or at least a day \(86400, or P1D\)"):
        load_settings()
    monkeypatch.setenv("FOLLOWUPS_RETENTION", "P90D")
    assert load_settings().retention == timedelta(days=90)


@pytest.mark.parametrize(("value", "port"), [("9100", 9100), ("", None), ("tcp://10.96.0.7:9100", None)])
def test_the_port_for_metrics(monkeypatch: pytest.MonkeyPatch, value: str, port: int | None) -> None:
    """If the metrics port is set to a URL, this value is ignored.

    Kubernetes sets this variable to a URL for a Service named followups-metrics.
    """
    monkeypatch.setenv("FOLLOWUPS_METRICS_PORT", value)
    assert load_settings().metrics_port == port
