"""Requirements: the lock holds one version of all that is required; pyproject.toml reads the same files."""

import re
import tomllib

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


def test_the_project_table_reads_the_requirements_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == ["requirements.txt"]
    for extra, source in dynamic["optional-dependencies"].items():
        assert source["file"] == [f"requirements-{extra}.txt"]
        assert [Requirement(line) for line in lines(source["file"][0])]  # setuptools reads no `-r` lines
    assert set(project["project"]["dynamic"]) == set(dynamic)
    assert "uv.lock" in lines(".gitignore") and not (ROOT / "uv.lock").exists()
