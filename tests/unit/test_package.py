"""Tests of the package's public names and of the cost of importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import followups


def test_exported_names_exist() -> None:
    """Every name in ``__all__`` can be imported from the package."""
    assert all(getattr(followups, name).__name__ == name for name in followups.__all__)


def test_unknown_names_raise_attribute_error() -> None:
    """Reading an unknown name from the package raises AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'send'"):
        _ = followups.send  # type: ignore[attr-defined]


def test_import_is_light() -> None:
    """Importing the package loads no database library, so that `followups --help` is quick."""
    code = "import followups, sys; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
