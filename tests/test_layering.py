"""Imports run one way: main, eval -> trainer -> models -> backbone; all -> utils, which knows none above."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from models import LEARNERS
from tests.conftest import ROOT

PACKAGES = ("backbone", "models", "utils")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py"))])
FRONT_DOOR = "models.__init__"  # names what others import from `models`; its files are a room as `models`
# A room may import those that stand before it, and itself; `utils` below means the files at its top.
ROOMS = (
    "utils",
    "utils.cache",
    "utils.training",
    "utils.data",
    "utils.config",
    "utils.runs",
    "utils.analysis",
    "utils.reports",
    "utils.sweeps",
    "backbone",
    "models.base",
    "models.vit",
    "models.config",
    "models.shared_subspace",
    "models",
    "models.compared",
    "models.methods",
    "models.saved",
    "models.benchmark",
    FRONT_DOOR,
    "trainer",
    "eval",
    "main",
)


def module_of(path: Path) -> str:
    """`utils/runs/metrics.py` -> `utils.runs.metrics`; a package's `__init__.py` is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    """The longest room that a module lies in."""
    module = FRONT_DOOR if module == "models" else module
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imported(path: Path) -> set[str]:
    """Our modules that a file imports: at any depth of its code, for type checking, or named in a text.

    A text such as "models.sema" or "models.sema.SEMA" is an import path: in the end it is imported, too.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            paths = {node.value, node.value.rpartition(".")[0]} & MODULES.keys()
            found |= {path for path in paths if "." in path}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in {*PACKAGES, "trainer", "eval", "main", "tests"}}


def test_every_room_is_looked_at() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    """`backbone` imports nothing of ours, `utils` nothing above it, and a room none that stands after it."""
    own = room_of(module)
    allowed = {"backbone"} if own == "backbone" else set(ROOMS[: ROOMS.index(own) + 1])
    assert {other for other in imported(MODULES[module]) if room_of(other) not in allowed} == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Local imports and those for type checking count, too."""
    graph = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("path", sorted(ROOT.glob("utils/**/*.py")), ids=str)
def test_utils_name_no_method(path: Path) -> None:
    """No learner is spelled out in code below `utils/` (comments and docstrings may give examples)."""
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node, clean=False)
    }
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    spelled = [n.value for n in constants if n not in docstrings and n.value in LEARNERS]
    identifiers = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    spelled += [name for name in identifiers if name.lower() in LEARNERS]
    assert spelled == []


def test_no_file_names_a_machine() -> None:
    machine = re.compile(r"(?<![\w.])/(home|mnt|data/Datasets)/")
    assert [path for path in FILES if machine.search(path.read_text())] == []
