"""Tests of `utils.config.experiments`: what a file is, also a broken one."""

import json
import os
from pathlib import Path

import pytest

import main
from models import SCHEMAS
from utils.config import experiments
from utils.config.experiments import kind_of, shipped_file, shipped_files
from utils.config.loading import load_config


def test_broken_files_of_a_user_spoil_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "exps").mkdir()
    contents = {
        "cut": '{"model_name": "ranpac"',
        "list": '{"model_name": ["ranpac"], "description": "mine"}',
        "number": '{"model_name": "ranpac", "dataset": 3}',
        "typo": '{"model_name": "ranpca"}',
        "whole": '{"model_name": "ranpac", "dataset": "cub"}',
    }
    for name, content in contents.items():
        (tmp_path / "exps" / f"{name}.json").write_text(content)
    files = {Path(file.path).stem: file for file in shipped_files(SCHEMAS)}
    assert files.keys() == contents.keys() and files["list"].description == "mine"
    assert [name for name, file in files.items() if file.method] == ["number", "whole"]
    assert shipped_file("ranpac", "cub", SCHEMAS) == Path("exps/whole.json")


def test_a_file_of_neither_kind_is_what_its_base_is(tmp_path: Path) -> None:
    contents = {
        "table": {"cells": {}}, "again": {"base": "table.json", "seeds": [7]},
        "run": {"rd_dim": 8}, "other": {"description": "x", "base": "run.json"},
        "third": {"base": "again.json"}, "circle": {"base": "circle.json"}, "lost": {"base": 5},
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    kinds = {name: kind_of(tmp_path / f"{name}.json", SCHEMAS) for name in contents}
    assert {name for name, kind in kinds.items() if kind == "sweep"} == {"table", "again", "third"}
    assert (kinds["other"], kinds["circle"], kinds["lost"]) == ("config", "", "")


@pytest.mark.parametrize("override", [[], ["--set", "model_name=[1]"]], ids=["file", "override"])
def test_a_method_that_is_no_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: list[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_name": "sema" if override else ["sema"]}))
    assert main.main([str(path), *override]) == 2
    assert "no such method" in capsys.readouterr().err


def test_a_pipe_is_read_once_by_its_loader() -> None:
    """As `python main.py <(make_config)` gives one."""
    reader, writer = os.pipe()
    os.write(writer, b'{"rd_dim": 8}')
    os.close(writer)
    path = Path(f"/dev/fd/{reader}")
    assert kind_of(path, SCHEMAS) == "" and load_config(path, [], SCHEMAS).config.rd_dim == 8
    os.close(reader)
