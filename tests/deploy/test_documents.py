"""Checks README and deploy/*.md: links work, and commands, settings and files exist."""

from __future__ import annotations

import re
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.core import TyperGroup

from deploy.manifests import DEPLOY, ROOT, SETTINGS
from deploy.test_alerts import anchors
from followups.cli.entry import CATALOGUE, load
from followups.settings import Settings, environment_name

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DEPLOY.glob("*.md")))}
CODE = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
OTHERS = {"DATABASE_URL", "REDIS_URL", "FLOWER_ADDRESS", "FLOWER_BASIC_AUTH", "FOLLOWUPS_TEST_SEED", "FLOWER_PORT"}
"""Variables of other programs, and alternative names of this project's settings."""
OTHER_PROGRAMS = {"createdb", "createuser", "kubectl", "runuser", "cp", "install", "systemctl", "docker build"}
HOSTS = {"", "127.0.0.1", "localhost", "chat.example", "chat-server", "www.w3.org", "www.textualize.io", "..."}
"""Allowed hosts: this machine, placeholders, and hosts in the metadata of pictures."""


def without_code(text: str) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Return the lines of all code blocks, with continuations joined, and all inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [*lines, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_code(text)))]


def commands(text: str) -> list[list[str]]:
    """Return each `followups` command as a list of words, without the words before `followups`."""
    found = []
    for line in code(text):
        for part in re.split(r"&&|;| \| | # |\s{4,}|\$\(", line.strip().removeprefix("$ ").removeprefix("# ")):
            words = shlex.split(part.replace("'", ""), comments=False) if part.count('"') % 2 == 0 else part.split()
            places = [at for at, word in enumerate(words[:-1]) if word.rpartition("/")[2] == "followups"]
            if places and not set(words) & OTHER_PROGRAMS and re.fullmatch(r"-*[a-z-]+", words[places[-1] + 1]):
                found.append(words[places[-1] :])
    return found


CALLS = sorted({" ".join(words) for path in DOCUMENTS.values() for words in commands(path.read_text())})


def options(command: Any) -> set[str]:
    """Return the options that a command accepts."""
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_link_leads_somewhere(name: str) -> None:
    """Every relative link points to an existing file and heading."""
    path = DOCUMENTS[name]
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_code(path.read_text()))
    for target in (one or other for one, other in links):
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place.read_text()), target


@pytest.mark.parametrize("call", CALLS)
def test_each_command_exists(call: str) -> None:
    """Every command in the documents exists and accepts the options shown."""
    _, name, *rest = call.split()
    if name.startswith("-"):
        return
    assert name in CATALOGUE
    called = [load(name)]
    if isinstance(called[0], TyperGroup) and rest:
        called = [called[0].commands[one] for one in rest[0].split("|")]
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert all(given <= options(command) for command in called)


def test_commands_are_found() -> None:
    """The documents contain commands; otherwise, the test of the commands would check nothing."""
    assert {call.split()[1] for call in CALLS} >= {
        "demo",
        "up",
        "migrate",
        "doctor",
        "health",
        "show",
        "retry",
        "prune",
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_setting_exists(name: str) -> None:
    """Every setting named in the documents exists, even if it is named without its prefix."""
    spans = "\n".join(code(DOCUMENTS[name].read_text()))
    named = {each.removesuffix("_FILE") for each in re.findall(r"\bFOLLOWUPS_[A-Z_]+", spans)}
    assert named <= SETTINGS | OTHERS
    tables = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \|", DOCUMENTS[name].read_text(), re.MULTILINE)
    for setting in (one for cell in tables for one in re.findall(r"`([A-Z][A-Z_]+)`", cell)):
        assert f"FOLLOWUPS_{setting}" in SETTINGS


def test_the_readme_lists_every_setting() -> None:
    """The README's table lists all settings with their defaults."""
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| ([^|]*) \|", DOCUMENTS["README.md"].read_text(), re.MULTILINE)
    listed = {}
    for cell, default in rows:
        names = re.findall(r"`([A-Z_]+)`", cell)
        values = default.split(", ") if len(default.split(", ")) == len(names) else [default] * len(names)
        listed |= {f"FOLLOWUPS_{one}": value.strip("`") for one, value in zip(names, values, strict=True)}
    assert listed.keys() == SETTINGS
    for field, declared in Settings.model_fields.items():
        default, said = declared.default, listed[environment_name(field)]
        if isinstance(default, timedelta):
            assert float(said) == default.total_seconds()
        elif isinstance(default, bool):
            assert said == str(default).lower()
        elif isinstance(default, int | float):
            assert float(said) == default


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_metric_and_log_line_exists(name: str) -> None:
    """Every metric and log event in the documents occurs in the code."""
    text = DOCUMENTS[name].read_text()
    for metric in set(re.findall(r"\bfollowups_[a-z]+_*[a-z_]*[a-z]", " ".join(code(text)))) - {
        "followups_b",
        "followups_owner",
    }:
        assert f'"{metric}"' in CODE
    for event in re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"[Ll]og ((?:`[a-z_]+`(?:, )?)+)", text))):
        assert f'"{event}"' in CODE


def test_no_real_host_or_home_directory_is_named() -> None:
    """The documents contain no real host names and no path of a home directory."""
    committed = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "Procfile", *DEPLOY.rglob("*")]
    for path in (path for path in committed if path.is_file() and path.name != ".env" and path.suffix != ".png"):
        text = path.read_text()
        urls = re.findall(r"\bhttps?://[^\s\"'`<>)|,;]+", text)
        hosts = {(urlsplit(url).hostname or "") for url in urls}
        assert {host for host in hosts if not host.endswith(".svc")} <= HOSTS, path
        assert not re.search(r"(?<![\w.])/(?:work|root|home|Users)/", text), path


def test_the_pictures_load_nothing_else() -> None:
    """The README shows every picture, and no picture loads anything from another host."""
    pictures = sorted((DEPLOY / "pictures").glob("*.svg"))
    assert pictures
    for path in (DEPLOY / "pictures").glob("*.png"):
        assert path.stat().st_size < 100_000
        assert f"(deploy/pictures/{path.name})" in (ROOT / "README.md").read_text()
    for path in pictures:
        text = path.read_text()
        assert len(text) < 100_000
        assert not re.search(r"url\([\"']?\w+:|href=", text)
        assert f"(deploy/pictures/{path.name})" in (ROOT / "README.md").read_text()


def test_paths_are_of_this_repository() -> None:
    """Every project file that the documents mention exists."""
    for path in DOCUMENTS.values():
        for named in re.findall(r"`((?:src|tests|deploy)/[\w./-]+)`", path.read_text()):
            assert (ROOT / named).exists(), named


def test_documents() -> None:
    """The documents checked include README, OPERATIONS and SCALING."""
    assert {Path(name).name for name in DOCUMENTS} >= {"README.md", "OPERATIONS.md", "SCALING.md"}
