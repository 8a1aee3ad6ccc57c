"""Tests of `utils.sweeps.spec`: the table of a sweep file, its names, and every mistake at once before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

import main
from models import SCHEMAS
from tests.conftest import ROOT
from utils.config.loading import ConfigError
from utils.sweeps.spec import LONGEST_SLUG, Sweep, load_sweep, slug_of

SMOKE = str(ROOT / "exps/smoke.json")


def write(folder: Path, name: str = "table.json", **values: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"base": SMOKE, **values}), encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, **values: Any) -> Sweep:
    return load_sweep(write(folder, **values), overrides, SCHEMAS)


def problems(folder: Path, *overrides: str, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, **values)
    return caught.value.problems


def names(sweep: Sweep) -> list[str]:
    return [cell.name for cell in sweep.cells]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_cells_are_the_named_ones_in_their_order(tmp_path: Path) -> None:
    sweep = load(
        tmp_path, cells={"nested": {}, "matched adapter": {"ffn_adapter_type": "adaptmlp", "ffn_num": 8}}
    )
    assert names(sweep) == ["nested", "matched adapter"]
    assert [cell.slug for cell in sweep.cells] == ["nested", "matched-adapter"]
    assert [cell.config.ffn_adapter_type for cell in sweep.cells] == ["nested_lora", "adaptmlp"]
    assert [cell.config.prefix for cell in sweep.cells] == ["nested", "matched-adapter"]


def test_a_grid_alone_is_its_cross_product(tmp_path: Path) -> None:
    sweep = load(tmp_path, grid={"nested_lora_rank": [4, 8], "nested_lora_freeze": ["task", "never"]})
    assert names(sweep) == [
        "nested_lora_rank=4, nested_lora_freeze=task",
        "nested_lora_rank=4, nested_lora_freeze=never",
        "nested_lora_rank=8, nested_lora_freeze=task",
        "nested_lora_rank=8, nested_lora_freeze=never",
    ]
    points = [(cell.config.nested_lora_rank, cell.config.nested_lora_freeze) for cell in sweep.cells]
    assert points == [(4, "task"), (4, "never"), (8, "task"), (8, "never")]


def test_cells_are_crossed_with_the_grid(tmp_path: Path) -> None:
    sweep = load(tmp_path, cells={"a": {}, "b": {"rd_dim": 8}}, grid={"func_epoch": [1, 2]})
    assert names(sweep) == ["a, func_epoch=1", "a, func_epoch=2", "b, func_epoch=1", "b, func_epoch=2"]
    assert [cell.slug for cell in sweep.cells][0] == "a-func_epoch=1"
    assert [(cell.config.rd_dim, cell.config.func_epoch) for cell in sweep.cells] == [
        (16, 1),
        (16, 2),
        (8, 1),
        (8, 2),
    ]


def test_what_is_laid_over_what(tmp_path: Path) -> None:
    """The base, "set", the cell, the grid, --set: each over the one before."""
    given = {"set": {"rd_dim": 1, "rd_epoch": 1, "func_epoch": 1, "batch_size": 1}}
    own = {"rd_epoch": 2, "func_epoch": 2, "batch_size": 2}
    sweep = load(
        tmp_path, "batch_size=4", **given, cells={"a": own}, grid={"func_epoch": [3], "batch_size": [3]}
    )
    config = sweep.cells[0].config
    assert (config.buffer_size, config.rd_dim, config.rd_epoch, config.func_epoch, config.batch_size) == (
        64,
        1,
        2,
        3,
        4,
    )


def test_a_cell_may_have_a_base_of_its_own_relative_to_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"base": SMOKE, "rd_dim": 5, "logs_root": "elsewhere"}))
    sweep = load(tmp_path, cells={"own": {"base": "other.json"}, "plain": {}})
    assert [cell.config.rd_dim for cell in sweep.cells] == [5, 16]
    assert sweep.folder == Path("logs/sweeps/table")  # of the sweep's base
    assert {cell.config.logs_root for cell in sweep.cells} == {"logs/sweeps/table/runs"}


def test_seeds_and_the_rest_of_the_file(tmp_path: Path) -> None:
    sweep = load(
        tmp_path, "logs_root=there", seeds=[3, 1], cells={"a": {}}, baseline="a", threads=2, memory_gb=4
    )
    assert (sweep.seeds, sweep.baseline, sweep.threads, sweep.memory_gb) == ((3, 1), "a", 2, 4.0)
    assert sweep.folder == Path("there/sweeps/table")
    assert sweep.cells[0].resolved(1)["seed"] == [1]
    assert sweep.command == f"python main.py --sweep {tmp_path}/table.json --set logs_root=there"
    assert load(tmp_path, cells={"a": {}}).seeds == (1993,)


def test_a_cell_says_which_sweep_it_is_of_unless_it_says_something_else(tmp_path: Path) -> None:
    sweep = load(tmp_path, cells={"a": {}, "b": {"description": "mine", "rd_dim": 3}})
    assert [cell.config.description for cell in sweep.cells] == ['cell "a" of the sweep table.json', "mine"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("nested", "nested"),
        ("a, nested_lora_rank=4", "a-nested_lora_rank=4"),
        ("../a\\b: c", "a-b-c"),
        ("低ランク", "低ランク"),
    ],
)
def test_slugs_can_stand_in_a_path(name: str, slug: str) -> None:
    assert slug_of(name) == slug


@pytest.mark.parametrize("name", ["?", "!", "x" * 300, "低" * 100])
def test_a_slug_of_nothing_or_too_long_has_a_digest(name: str) -> None:
    slug = slug_of(name)
    assert 0 < len(slug.encode()) <= LONGEST_SLUG and "/" not in slug
    assert slug_of(name + "!") != slug


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_all_problems_of_all_cells_come_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {
        "good": {},
        "bad": {"nested_lora_rnk": 8, "batch_size": "many"},
        "lost": {"base": "nowhere.json"},
    }
    path = write(tmp_path, cells=cells, set={"rd_dim": 0}, descripton="x", baseline="godo")
    assert main.main(["--sweep", str(path), "--set", f"logs_root={tmp_path}/logs"]) == 2
    message = capsys.readouterr().err
    for line in (
        'descripton = "x": unknown key; did you mean description?',
        'baseline = "godo": no such cell; did you mean "good"?; allowed: "good", "bad", "lost"',
        "every cell: rd_dim = 0 (set): too small; allowed: an integer >= 1",
        'cell "bad": nested_lora_rnk = 8 (cell): unknown key; did you mean nested_lora_rank?',
        'cell "bad": batch_size = "many" (cell): a wrong type (text); allowed: an integer >= 1',
        f'cell "lost": {tmp_path}/nowhere.json does not exist',
    ):
        assert f"  - {line}" in message
    assert "6 problems" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_lines_own_changes_are_called_so(tmp_path: Path) -> None:
    told = "rd_dm = 3 (--set): unknown key; did you mean rd_dim?"
    assert problems(tmp_path, "rd_dm=3", cells={"a": {}, "b": {"rd_dim": 3}}) == [f"every cell: {told}"]


def test_keys_listed_for_an_unlike_key_stand_below_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, cells={"a": {"xyzzy": 1}, "b": {"xyzzy": 2}})
    assert str(caught.value).count("Valid keys: ") == 1 and "nested_lora_rank" in caught.value.footer


@pytest.mark.parametrize("key", ["seed", "prefix", "logs_root"])
def test_keys_the_sweep_sets_itself_are_refused(tmp_path: Path, key: str) -> None:
    value: Any = [1] if key == "seed" else "x"
    found = problems(tmp_path, set={key: value}, cells={"a": {key: value}}, grid={key: [value]})
    assert [problem.split(",")[0] for problem in found] == [
        f"{place}: {key} cannot be set" for place in ("set", "grid", 'cell "a"')
    ]


@pytest.mark.parametrize("override", ["seed=7", "prefix=x"])
def test_neither_are_they_taken_from_the_command_line(tmp_path: Path, override: str) -> None:
    (problem,) = problems(tmp_path, override, cells={"a": {}})
    assert problem.startswith(f"--set {override.partition('=')[0]}: not with --sweep")


def test_a_base_is_the_sweeps_or_a_cells(tmp_path: Path) -> None:
    found = problems(tmp_path, set={"base": SMOKE}, grid={"base": [SMOKE]}, cells={"a": {"base": 5}})
    assert [problem.partition(" cannot")[0] for problem in found[:2]] == ["set: base", "grid: base"]
    assert len(found) == 3 and "base = 5: a wrong type (an integer)" in found[2]
    assert "base = a\0b: holds a NUL character" in problems(tmp_path, base="a\0b", cells={"a": {}})[0]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "cells, grid: both are missing"),
        ({"cells": {}, "grid": {}}, "cells, grid: both are missing"),
        ({"grid": {"rd_dim": []}}, "grid, rd_dim: no values"),
        ({"grid": {"rd_dim": 4}}, 'grid = {"rd_dim": 4}: a wrong type (an integer)'),
        ({"cells": {"a": 4}}, 'cells = {"a": 4}: a wrong type (an integer); allowed: an object of names'),
        ({"cells": {" ": {}}}, "cells: a name is empty"),
        ({"cells": {"a": {}}, "seeds": []}, "seeds = []: empty"),
        ({"cells": {"a": {}}, "seeds": [1, 1]}, "seeds = [1, 1]: holds 1 more than once"),
        ({"cells": {"a": {}}, "threads": 0}, "threads = 0: too small"),
        ({"cells": {"a": {}}, "memory_gb": 0}, "memory_gb = 0: too small"),
        ({"cells": {"a": {}, "b": {}}}, 'cells "a" and "b": the same configuration'),
        ({"cells": {"a": {}, "b": {"description": "other"}}}, 'cells "a" and "b": the same configuration'),
        (
            {"grid": {"rd_dim": [3, 3]}},
            'cells "rd_dim=3" and "rd_dim=3": the files of both would be named rd_dim=3',
        ),
        (
            {"cells": {"a b": {}, "A-b": {"rd_dim": 3}}},
            'cells "a b" and "A-b": the files of both would be named A-b',
        ),
        ({"cells": {"\ud800": {}}}, 'cell "\\ud800": its name holds half a surrogate pair'),
        ({"grid": {"weights": ["\ud800"]}}, 'cell "weights=\\ud800": its name holds half a surrogate pair'),
        ({"cells": {"a\0": {}}}, 'cell "a\\u0000": its name holds a NUL character'),
        ({"cells": {"a": {}}, "hypotheses": {"\ud800": {}}}, 'hypothesis "\\ud800": its name holds half'),
        (
            {"grid": {key: list(range(1000)) for key in ("rd_dim", "ffn_num", "rd_epoch")}},
            "1000000000 cells; allowed:",
        ),
        ({"cells": {"a": {}}, "base": None}, "base = null: a wrong type (null)"),
    ],
)
def test_tables_that_cannot_be_run(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    assert told in "\n".join(problems(tmp_path, **values))


def test_experiments_of_different_kinds_are_no_table(tmp_path: Path) -> None:
    grids = str(ROOT / "exps/shared_subspace_small.json")
    cells = {"classes": {}, "grids": {"base": grids}, "more": {"base": grids, "alpha": 0.0}}
    hypothesis = {"says": "?", "cell": "grids", "metric": "final", "expected": "higher", "against": "more"}
    found = problems(tmp_path, cells=cells, hypotheses={"H1": hypothesis})
    assert len(found) == 2
    assert 'final: "classes"; unseen_iou: "grids", "more"' in found[0] and "a sweep of its own" in found[0]
    assert found[1].startswith('hypothesis "H1": metric = "final": no such metric')
    of_one_kind = {name: cells[name] for name in ("grids", "more")}
    assert names(load(tmp_path, cells=of_one_kind, hypotheses={"H1": {**hypothesis, "metric": "unseen_iou"}}))


def test_a_cell_that_differs_in_keys_without_effect_is_its_own_baseline(tmp_path: Path) -> None:
    plain = {"ffn_adapter_type": "adaptmlp"}
    cells = {"plain": plain, "rank 2": {**plain, "nested_lora_rank": 2}, "wide": {**plain, "ffn_num": 8}}
    (problem,) = problems(tmp_path, cells=cells, baseline="plain")
    assert 'cells "plain" and "rank 2": the same configuration' in problem and "nested_lora_rank" in problem


def test_two_cells_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(
        f'{{"base": {json.dumps(SMOKE)}, "cells": {{"a": {{"rd_dim": 3}}, "a": {{"rd_dim": 4}}}}}}'
    )
    with pytest.raises(ConfigError, match="a: written twice"):
        load_sweep(path, [], SCHEMAS)


def test_a_file_that_is_no_sweep(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, told in ((None, "does not exist"), ("{", "not valid JSON"), ("{}", "base: missing")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=told) as caught:
            load_sweep(path, [], SCHEMAS)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--jobs 2", "--jobs, --engine, --ray-address and --report go with --sweep"),
        ("--engine ray", "--jobs, --engine, --ray-address and --report go with --sweep"),
        ("--report", "--jobs, --engine, --ray-address and --report go with --sweep"),
        ("--sweep x.json --config y.json", "it takes no --config or --resume"),
        ("--sweep x.json --resume y", "it takes no --config or --resume"),
        ("--sweep x.json --jobs 0", "--jobs 0: at least 1"),
        ("--sweep x.json --engine slurm", "invalid choice: 'slurm' (choose from 'local', 'ray')"),
        ("--sweep x.json --ray-address auto", "--ray-address goes with --engine ray"),
        ("--sweep x.json --report --jobs 2", "--report starts no run"),
        ("--sweep x.json --report --overwrite", "--report starts no run"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main.main(arguments.split())
    assert exit_info.value.code == 2 and told in capsys.readouterr().err.partition("error: ")[2]


def test_a_sweep_is_not_started_by_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        main.main(["--sweep", "x.json"])
    assert "without torchrun" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Shipped sweeps


@pytest.mark.parametrize("path", sorted((ROOT / "exps/sweeps").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_sweep_loads_and_states_its_command(path: Path) -> None:
    sweep = load_sweep(path, [], SCHEMAS)
    assert sweep.description.startswith(f"python main.py --sweep exps/sweeps/{path.name} ")
    assert "expected" in sweep.description
    assert sweep.folder == Path("logs/sweeps") / path.stem


def test_the_smoke_sweep_is_shipped() -> None:
    sweep = load_sweep(ROOT / "exps/sweeps/smoke.json", [], SCHEMAS)
    assert (len(sweep.cells), len(sweep.seeds)) == (2, 2)
