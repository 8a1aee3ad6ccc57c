"""Imports run one way: main, eval -> trainer -> models -> backbone; anything -> utils, which knows nothing above."""

import ast
import pydoc
import re
from pathlib import Path

import pytest

from models import LEARNERS

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "main": {"trainer", "models", "utils"},
    "eval": {"trainer", "utils"},
    "trainer": {"models", "utils"},
    "models": {"models", "backbone", "utils"},
    "backbone": {"backbone"},
    "utils": {"utils"},
}
COMMANDS = ("benchmark.py", "cache.py")  # files of utils that are also run with `python -m`
FILES = [path for name in ALLOWED for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")]]


def imported(path: Path, without: str = "") -> set[str]:
    """First parts of every module the file imports, at any depth of the code but in the function `without`."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) != without or not without]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.module and not node.level else "relative import")
    return names


def test_every_layer_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = (set(ALLOWED) | {"relative import", "tests"}) & imported(path)
    if path.name == "benchmark.py":  # its `main` is a command line like main.py; nothing else of it looks up
        ours = imported(path, without="main") & ours
    assert ours <= ALLOWED[layer]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "utils"], ids=lambda path: path.name)
def test_utils_name_no_method(path: Path) -> None:
    """No learner is spelled out in code below `utils/` (comments and docstrings may give examples)."""
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False)
    }
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    spelled = [n.value for n in constants if n not in docstrings and n.value in LEARNERS]
    identifiers = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    spelled += [name for name in identifiers if name.lower() in LEARNERS]
    assert spelled == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_file_names_a_machine_or_prints_where_the_log_belongs() -> None:
    """`print` is for the command lines only."""
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"(?<![\w.])/(home|mnt|data/Datasets)/", text), path
        if path.name not in ("main.py", "eval.py", *COMMANDS):
            calls = [
                n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
            ]
            assert not calls, path


def test_where_published_names_went_exists() -> None:
    """Every dotted name in the right column of the README's table can be imported."""
    table = (ROOT / "README.md").read_text().split("Where published names went")[1].split("## The tree")[0]
    names = re.findall(r"`((?:models|backbone|utils)\.[\w.]+)`", table)
    assert len(names) > 10
    for name in names:
        assert pydoc.locate(name) is not None, name


def test_the_tree_in_readme_lists_every_file() -> None:
    """`folder/a.py, b.py   what they are`; of packages' own files only that which names the methods."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    listed = []
    for names in re.findall(r"^([\w/]+\.py(?:, \w+\.py)*)  ", tree, re.MULTILINE):
        first, *others = names.split(", ")
        listed += [first, *(str(Path(first).with_name(name)) for name in others)]
    files = {path.relative_to(ROOT).as_posix() for path in FILES} - {"backbone/__init__.py"}
    assert sorted(listed) == sorted(files)
