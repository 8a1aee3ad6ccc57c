"""What is installed: the lock file holds one version of everything that requirements.txt asks for."""

import re

from packaging.requirements import Requirement

from tests.conftest import ROOT


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def test_the_lock_file_holds_what_is_required() -> None:
    locked: dict[str, set[str]] = {}
    for line in lines("requirements.lock"):
        requirement = Requirement(line)
        (version,) = [one.version for one in requirement.specifier if one.operator == "=="]
        locked.setdefault(re.sub(r"[-_.]+", "-", requirement.name).lower(), set()).add(version)
    for line in lines("requirements.txt"):
        requirement = Requirement(line)
        versions = locked[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert all(requirement.specifier.contains(version) for version in versions), line
