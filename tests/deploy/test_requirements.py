"""The pinned requirements are complete, include hashes, and name no hosts."""

from __future__ import annotations

import re
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.manifests import DEPLOY, pyproject

LISTS = ("requirements.txt", "requirements-flower.txt", "requirements-build.txt")


def entries(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Return the pinned requirement and the hashes of each package that this machine needs."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement = Requirement(line.split("--hash")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(requirement.name)] = requirement, re.findall(r"--hash=(\S+)", line)
    return found


def pinned(requirement: Requirement) -> Version:
    """Return the pinned version."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("name", LISTS)
def test_each_is_pinned_and_hashed(name: str) -> None:
    """Each requirement is pinned with SHA-256 hashes, and contains no host, index or path."""
    for requirement, hashes in entries(name).values():
        assert pinned(requirement)
        assert requirement.url is None
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes)
    assert not re.search(r"://|--index|--find-links|\bfile:", (DEPLOY / name).read_text())


def test_every_dependency_is_pinned() -> None:
    """Every direct or indirect dependency is pinned to an allowed version.

    The dependencies of a package are checked only if its pinned version is installed.
    """
    have = entries("requirements.txt")
    open_ones = [Requirement(line) for line in pyproject()["project"]["dependencies"]]
    seen = set()
    while open_ones:
        wanted = open_ones.pop()
        name = canonicalize_name(wanted.name)
        assert name in have, f"{name} is missing: make deploy/requirements.txt anew (deploy/OPERATIONS.md, Install)"
        assert wanted.specifier.contains(pinned(have[name][0]), prereleases=True), f"{wanted}, but {have[name][0]}"
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen and Version(version(name)) == pinned(have[name][0]):
                needs = map(Requirement, requires(name) or ())
                open_ones += [one for one in needs if one.marker is None or one.marker.evaluate({"extra": extra})]
            seen.add((name, extra))


def test_every_build_dependency_is_pinned() -> None:
    """Every dependency of the build backend is pinned to an allowed version."""
    have = entries("requirements-build.txt")
    for wanted in map(Requirement, pyproject()["build-system"]["requires"]):
        assert wanted.specifier.contains(pinned(have[canonicalize_name(wanted.name)][0]))
