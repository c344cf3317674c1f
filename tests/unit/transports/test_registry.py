"""Tests of the transport registry: the selected transport, and the errors for a wrong choice."""

from __future__ import annotations

import traceback
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from followups import settings
from followups.errors import SettingsError, TransportConfigurationError
from followups.transports import load_transport
from followups.transports.http import HttpTransport
from followups.transports.matrix import MatrixTransport
from followups.transports.sandbox.transport import SandboxTransport
from unit.transports.doubles import TOKEN, settings_for

if TYPE_CHECKING:
    from followups.settings import Settings


class NoTransport:
    """A class without the methods of a transport, like a faulty plug-in."""

    name = "half"

    def __init__(self, _settings: object) -> None: ...

    async def open(self) -> None: ...


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Register a single plug-in, ``extra``."""
    extra = EntryPoint("extra", request.param, "followups.transports")
    monkeypatch.setattr(settings, "entry_points", lambda group: [extra] if group == extra.group else [])


@pytest.mark.parametrize(
    ("name", "made"), [("http", HttpTransport), ("matrix", MatrixTransport), ("sandbox", SandboxTransport)]
)
def test_each_built_in_transport_is_found_by_its_name(name: str, made: type) -> None:
    """`FOLLOWUPS_TRANSPORT` selects a transport by the name of its entry point."""
    secret = TOKEN if name == "matrix" else None
    transport = load_transport(settings_for("http://host", transport=name, transport_secret=secret))
    assert type(transport) is made
    assert transport.name == name


def test_an_unknown_name_lists_the_possible_names() -> None:
    """The error for an unknown transport names the setting and the possible values, but not the value."""
    with pytest.raises(SettingsError, match="http, matrix, sandbox") as caught:
        settings_for(transport="pigeon")
    assert str(caught.value).startswith("FOLLOWUPS_TRANSPORT should be")
    assert "pigeon" not in str(caught.value)


@pytest.mark.parametrize("name", ["Matrix", "matrix ", "MATRIX"])
def test_a_name_is_exact(name: str) -> None:
    """A transport's name is not guessed. Otherwise, web might not check that a Matrix room has one workspace."""
    with pytest.raises(SettingsError, match=r"^FOLLOWUPS_TRANSPORT should be"):
        settings_for(transport=name)


@pytest.mark.parametrize("plug_in", ["followups.transports.sandbox.transport:SandboxTransport"], indirect=True)
@pytest.mark.usefixtures("plug_in")
def test_a_plug_in_is_found_by_its_name() -> None:
    """An entry point of another package is found like a built-in transport."""
    assert isinstance(load_transport(settings_for(transport="extra")), SandboxTransport)


@pytest.mark.parametrize(
    "plug_in", ["no_such_module:X", "followups.transports.port:NoSuchClass", "json:dumps"], indirect=True
)
@pytest.mark.usefixtures("plug_in")
def test_a_plug_in_that_does_not_load_is_named() -> None:
    """If a plug-in cannot be imported, the error names the plug-in and the cause."""
    with pytest.raises(
        TransportConfigurationError, match=r"The transport 'extra' \(.*\) cannot be (?:loaded|created): \w+Error"
    ):
        load_transport(settings_for(transport="extra"))


def raise_with_secret(settings: Settings) -> None:
    """Raise an error that contains the secret, as ``int(secret)`` does."""
    assert settings.transport_secret
    raise ValueError(settings.transport_secret.get_secret_value())


@pytest.mark.parametrize("plug_in", [f"{__name__}:raise_with_secret"], indirect=True)
@pytest.mark.usefixtures("plug_in")
def test_a_plug_ins_error_does_not_show_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """If creating a transport fails, the error names the exception's type and location, but not its message."""
    monkeypatch.setattr(EntryPoint, "load", lambda _self: raise_with_secret)
    found = r"'extra' \(.*\) cannot be created: ValueError in .*test_registry.py, line \d+\.$"
    with pytest.raises(TransportConfigurationError, match=found) as caught:
        load_transport(settings_for(transport="extra", transport_secret=TOKEN))
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("plug_in", [f"{__name__}:NoTransport"], indirect=True)
@pytest.mark.usefixtures("plug_in")
def test_an_incomplete_plug_in_is_named_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a plug-in is not a complete transport, the error names the missing methods and attributes."""
    monkeypatch.setattr(EntryPoint, "load", lambda _self: NoTransport)
    with pytest.raises(
        TransportConfigurationError, match=r"'extra' .* is not a transport: it lacks send, check, close "
    ):
        load_transport(settings_for(transport="extra"))


@pytest.mark.parametrize("plug_in", ["followups.transports.http:HttpTransport"], indirect=True)
@pytest.mark.usefixtures("plug_in")
def test_a_transports_own_error_is_passed_on() -> None:
    """If a transport raises an error about its settings, the error is passed on unchanged."""
    with pytest.raises(TransportConfigurationError, match=r"^The transport extra needs FOLLOWUPS_TRANSPORT_URL"):
        load_transport(settings_for(transport="extra"))
