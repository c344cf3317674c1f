"""Terminal output: untrusted text is displayed as plain text on any terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.cli import main
from followups.cli.output import cell, console, print_json, print_line, print_table, remark
from followups.telemetry.escaping import escape, escape_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOLD = re.compile(r"\x1b\[[01]m")
NASTY = (
    "see [/b]", "[link=http://evil]here[/link]", "\x1b[2J\x1b]0;title\x07", "\x9b31m", "left \u202e", "\udcff", "a\nb"
)  # fmt: skip
TEXTS = st.text(st.characters()) | st.sampled_from(NASTY)
"""Strings of arbitrary characters, including lone surrogates."""


class EncodedTerminal(io.TextIOWrapper):
    """An in-memory terminal with a given encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        """The output so far, without the bold style of headings."""
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return BOLD.sub("", buffer.getvalue().decode(self.encoding))


@contextmanager
def terminal(encoding: str) -> Iterator[EncodedTerminal]:
    """Replace stdout and stderr with an in-memory terminal."""
    with pytest.MonkeyPatch.context() as patch, EncodedTerminal(encoding) as made:
        patch.setattr(sys, "stdout", made)
        patch.setattr(sys, "stderr", made)
        patch.setenv("COLUMNS", "10000")
        patch.setenv("NO_COLOR", "1")
        yield made


ENCODINGS = st.sampled_from(["utf-8", "ascii", "latin-1"])


def table(text: str) -> None:
    """Print a table that contains the given cell."""
    print_table(("A", "B"), [(text, "end")], empty="")


def line(text: str) -> None:
    """Print a table with a single cell."""
    console().print(cell(text))


WRITERS = st.sampled_from([table, line, print_line, remark])


@given(text=TEXTS)
def test_escaped_text_has_no_control_characters(text: str) -> None:
    """Escaped text contains no control characters, and escaped JSON keeps its meaning."""
    shown = escape(text)
    assert escape(shown) == shown
    assert "\x1b" not in shown
    assert json.loads(escape_json(json.dumps(text, ensure_ascii=False))) == text


@given(write=WRITERS, text=TEXTS, encoding=ENCODINGS)
def test_no_text_controls_a_terminal(write: Callable[[str], None], text: str, encoding: str) -> None:
    """Any text can be printed in any encoding, without errors or control characters."""
    with terminal(encoding) as made:
        write(text)
        assert escape(made.written, lines=True) == made.written


@given(write=WRITERS, text=st.sampled_from(NASTY), encoding=ENCODINGS)
def test_untrusted_text_is_escaped(write: Callable[[str], None], text: str, encoding: str) -> None:
    """Markup in untrusted text has no effect, and control characters are printed as escapes."""
    with terminal(encoding) as made:
        write(text)
        assert escape(text) in made.written


@given(text=TEXTS, encoding=ENCODINGS)
def test_json_is_readable_in_every_encoding(text: str, encoding: str) -> None:
    """JSON output is valid in every encoding; its only control characters are line feeds."""
    with terminal(encoding) as made:
        print_json({"text": text})
        assert json.loads(made.written) == {"text": text}
        assert escape(made.written, lines=True) == made.written


def test_an_error_escapes_its_input() -> None:
    """An error quotes the input with its control characters escaped."""
    with terminal("ascii") as made:
        assert main(["list\x1b[31m"]) == 2
        assert r"No such command 'list\x1b[31m'" in made.written
