"""Tests of `utils.sweeps.spec`: the table of a sweep file, its names, and every mistake at once."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import main
from models import SCHEMAS
from tests.conftest import ROOT, SWEEPS
from utils.config.loading import ConfigError
from utils.sweeps.spec import MAX_SLUG, Sweep, load_sweep, slug_of

SMOKE = str(ROOT / "exps/smoke.json")


def write(folder: Path, **values: Any) -> Path:
    path = folder / "table.json"
    path.write_text(json.dumps({"base": SMOKE, **values}), encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, **values: Any) -> Sweep:
    return load_sweep(write(folder, **values), overrides, SCHEMAS)


def problems(folder: Path, *overrides: str, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, **values)
    return caught.value.problems


def cells(sweep: Sweep, *keys: str) -> dict[str, tuple]:
    """Cell name -> values of these keys of its config."""
    return {cell.name: tuple(getattr(cell.config, key) for key in keys) for cell in sweep.cells}


# ------------------------------------------------------------------------------------------------------------
# The table


NAMED = {"a": {}, "b c": {"rd_dim": 8}}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"cells": NAMED}, {"a": (16, 3), "b c": (8, 3)}),
        ({"grid": {"rd_dim": [4, 8]}}, {"rd_dim=4": (4, 3), "rd_dim=8": (8, 3)}),
        (
            {"grid": {"rd_dim": [4, 8], "func_epoch": [1, 2]}},
            {f"rd_dim={dim}, func_epoch={epochs}": (dim, epochs) for dim in (4, 8) for epochs in (1, 2)},
        ),
        (
            {"cells": NAMED, "grid": {"func_epoch": [1, 2]}},
            {f"{name}, func_epoch={n}": (dim, n) for name, dim in (("a", 16), ("b c", 8)) for n in (1, 2)},
        ),
    ],
)
def test_rows_are_cells_crossed_with_the_grid(
    tmp_path: Path, table: dict[str, Any], expected: dict[str, tuple[int, int]]
) -> None:
    sweep = load(tmp_path, **table)
    assert list(cells(sweep, "rd_dim", "func_epoch").items()) == list(expected.items())
    assert [cell.slug for cell in sweep.cells] == [slug_of(name) for name in expected]


def test_order_of_what_changes_a_config(tmp_path: Path) -> None:
    """The base, "set", the cell, the grid, --set: each over the one before."""
    given = {"set": {"rd_dim": 1, "rd_epoch": 1, "func_epoch": 1, "batch_size": 1}}
    own = {"rd_epoch": 2, "func_epoch": 2, "batch_size": 2}
    grid = {"func_epoch": [3], "batch_size": [3]}
    sweep = load(tmp_path, "batch_size=4", **given, cells={"a": own}, grid=grid)
    (values,) = cells(sweep, "buffer_size", "rd_dim", "rd_epoch", "func_epoch", "batch_size").values()
    assert values == (64, 1, 2, 3, 4)


def test_a_cell_may_have_a_base_of_its_own_relative_to_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"base": SMOKE, "rd_dim": 5, "logs_root": "elsewhere"}))
    sweep = load(tmp_path, cells={"own": {"base": "other.json"}, "plain": {}})
    runs = "logs/sweeps/table/runs"  # below the logs_root of the sweep's base
    assert cells(sweep, "rd_dim", "logs_root") == {"own": (5, runs), "plain": (16, runs)}
    assert sweep.folder == Path("logs/sweeps/table")


def test_a_sweep_repeats_another_on_other_data(tmp_path: Path) -> None:
    """All cells of the base, in their order, with what is changed over it; a folder of its own."""
    (tmp_path / "other.json").write_text(json.dumps({"base": SMOKE, "rd_dim": 5}))
    own = {"base": "other.json", "rd_epoch": 7, "increment": 1}
    table = {"set": {"func_epoch": 2, "init_cls": 3}, "cells": {"a": own, "b": {}}, "seeds": [1, 2]}
    path = write(tmp_path, **table, baseline="b", description="theirs", next={"more": "python main.py"})
    (tmp_path / "below").mkdir()
    repeated = tmp_path / "below/again.json"
    changed = {"set": {"init_cls": 4, "increment": 4}, "cells": {"a": {"increment": 2}}}
    repeated.write_text(json.dumps({"base": "../table.json", **changed}))
    sweep = load_sweep(repeated, [], SCHEMAS)
    keys = ("rd_dim", "rd_epoch", "func_epoch", "init_cls", "increment")
    assert cells(sweep, *keys) == {"a": (5, 7, 2, 4, 2), "b": (16, 3, 2, 4, 4)}
    assert (sweep.file.seeds, sweep.file.baseline, sweep.file.next) == ([1, 2], "b", {})
    assert (sweep.folder, sweep.file.description) == (Path("logs/sweeps/again"), "")
    path.write_text(json.dumps({"base": str(repeated), **table, "sed": 1}))  # a circle, and a mistake
    with pytest.raises(ConfigError) as caught:
        load_sweep(repeated, [], SCHEMAS)
    told = " ".join(caught.value.problems)
    assert "repeats it" in told and "sed = 1: unknown key" in told


def test_seeds_and_the_rest_of_the_file(tmp_path: Path) -> None:
    rest = {"seeds": [3, 1], "baseline": "a", "threads": 2, "memory_gb": 4}
    sweep = load(
        tmp_path, "logs_root=there", cells={"a": {}, "b": {"description": "mine", "rd_dim": 3}}, **rest
    )
    assert {key: getattr(sweep.file, key) for key in rest} == rest
    assert sweep.folder == Path("there/sweeps/table")
    assert sweep.cells[0].with_seed(1).seed == 1
    assert sweep.command == f"python main.py --sweep {tmp_path}/table.json --set logs_root=there"
    assert cells(sweep, "description") == {"a": ('cell "a" of the sweep table.json',), "b": ("mine",)}
    assert load(tmp_path, cells={"a": {}}).file.seeds == [1993]


def test_slugs_can_stand_in_a_path() -> None:
    """One of nothing, or too long, has a digest."""
    names = ["nested", "a, nested_lora_rank=4", "../a\\b: c", "低ランク"]
    assert [slug_of(name) for name in names] == ["nested", "a-nested_lora_rank=4", "a-b-c", "低ランク"]
    for name in ("?", "!", "x" * 300, "低" * 100):
        slug = slug_of(name)
        assert 0 < len(slug.encode()) <= MAX_SLUG and "/" not in slug
        assert slug_of(name + "!") != slug


# ------------------------------------------------------------------------------------------------------------
# Mistakes


def test_all_problems_of_all_cells_come_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = {
        "good": {},
        "bad": {"nested_lora_rnk": 8, "batch_size": "many"},
        "lost": {"base": "nowhere.json"},
        "worse": {"batch_size": "many"},
    }
    path = write(tmp_path, cells=mistakes, set={"rd_dim": 0}, descripton="x", baseline="godo")
    assert main.main(["--sweep", str(path), "--set", f"logs_root={tmp_path}/logs", "--set", "rd_dm=3"]) == 2
    message = capsys.readouterr().err
    for place, *told in (
        ("descripton", "unknown key", "did you mean description?"),
        ("baseline", "no such cell", 'did you mean "good"?'),
        ("every cell: rd_dim = 0 (set)", "allowed: an integer >= 1"),
        ("every cell: rd_dm = 3 (--set)", "unknown key"),
        ('cell "bad": nested_lora_rnk = 8 (cell)', "did you mean nested_lora_rank?"),
        ('cells "bad", "worse": batch_size = "many" (cell)', "a wrong type"),
        ('cell "lost": ', f"{tmp_path}/nowhere.json does not exist"),
    ):
        (line,) = [line for line in message.splitlines() if line.startswith(f"  - {place}")]
        assert all(words in line for words in told)
    assert "7 problems" in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "places"),
    [
        ("seed", ["set", "grid", 'cell "a"', "--set"]),
        ("prefix", ["set", "grid", 'cell "a"', "--set"]),
        ("logs_root", ["set", "grid", 'cell "a"']),
        ("base", ["set", "grid"]),
    ],
)
def test_keys_that_the_sweep_sets_itself_are_refused(tmp_path: Path, key: str, places: list[str]) -> None:
    value: Any = {"seed": 1, "base": SMOKE}.get(key, "x")
    overrides = [f"{key}={value}"] if key != "base" else []
    found = problems(tmp_path, *overrides, set={key: value}, cells={"a": {key: value}}, grid={key: [value]})
    assert [problem.split(",")[0] for problem in found] == [
        f"{place}: {key} cannot be set in a sweep" for place in places
    ]


SAME = 'cells "a", "b": the same configuration'
PLAIN = {"ffn_adapter_type": "adaptmlp"}
ALIKE = {"a": PLAIN, "b": PLAIN | {"nested_lora_rank": 2}, "wide": PLAIN | {"ffn_num": 8}}
MANY = {"good": {}, **{str(number): {"xyzzy": number // 6} for number in range(7)}}
HALF = "half a surrogate pair"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "cells, grid: both are missing"),
        ({"cells": {}, "grid": {}}, "cells, grid: both are missing"),
        ({"cells": NAMED, "finding": "a"}, 'finding = "a": there is no baseline'),
        ({"cells": NAMED, "finding": "a", "baseline": "a"}, 'finding = "a": the baseline itself'),
        ({"grid": {"rd_dim": []}}, 'grid = {"rd_dim": []}: empty'),
        ({"grid": {"rd_dim": 4}}, 'grid = {"rd_dim": 4}: a wrong type (an integer)'),
        ({"cells": {"a": 4}}, 'cells = {"a": 4}: a wrong type (an integer); allowed: an object of names'),
        ({"cells": {" ": {}}}, "cells: a name is empty"),
        ({"cells": {"a": {}}, "hypotheses": ["H1"]}, 'hypotheses = ["H1"]: a wrong type (a list)'),
        ({"cells": {"a": {}}, "seeds": []}, "seeds = []: empty"),
        ({"cells": {"a": {}}, "seeds": [1, 1]}, "seeds = [1, 1]: holds 1 more than once"),
        ({"cells": {"a": {}}, "memory_gb": 0}, "memory_gb = 0: too small"),
        ({"cells": {"a": {}, "b": {}}}, SAME),
        ({"cells": {"a": {}, "b": {"description": "other"}}}, SAME),
        ({"cells": ALIKE}, f"{SAME}, but for keys that change nothing here (nested_lora_consolidation"),
        (
            {"cells": MANY},
            '"3" and 2 more: xyzzy = 0 (cell): unknown key; python main.py --list keys --method sema',
        ),
        ({"grid": {"rd_dim": [3, 3]}}, 'cells "rd_dim=3", "rd_dim=3": their files would'),
        ({"cells": {"a b": {}, "A-b": {"rd_dim": 3}}}, 'cells "a b", "A-b": their files would'),
        ({"cells": {"\ud800": {}}}, f'the name "\\ud800" holds {HALF}'),
        ({"cells": {"a\0": {}}}, 'the name "a\\u0000" holds a NUL character'),
        ({"grid": {"weights": ["\ud800"]}}, f'weights = "\\ud800" (grid): holds {HALF}'),
        ({"cells": {"a": {}}, "hypotheses": {"\ud800": {}}}, f'the name "\\ud800" holds {HALF}'),
        ({"grid": dict.fromkeys(("rd_dim", "ffn_num", "rd_epoch"), [*range(1000)])}, "1000000000 cells"),
        ({"cells": {"a": {}}, "base": None}, "base = null: a wrong type (null)"),
        ({"cells": {"a": {"base": 5}}}, 'cell "a": base = 5: a wrong type (an integer)'),
        ({"cells": {"a": {}}, "base": "a\0b"}, 'base = "a\\u0000b": holds a NUL character'),
    ],
)
def test_tables_that_cannot_be_run(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    assert told in "\n".join(problems(tmp_path, **values))


def test_experiments_of_different_kinds_are_no_table(tmp_path: Path) -> None:
    grids = str(ROOT / "exps/shared_subspace_small.json")
    mixed = {"classes": {}, "grids": {"base": grids}, "more": {"base": grids, "alpha": 0.0}}
    hypothesis = {"says": "?", "cell": "grids", "metric": "final", "expected": "higher", "against": "more"}
    kinds, metric = problems(tmp_path, cells=mixed, hypotheses={"H1": hypothesis})
    assert 'cell "classes"' in kinds and 'cells "grids", "more"' in kinds and "a sweep of its own" in kinds
    assert metric.startswith('hypothesis "H1": metric = "final": no such metric')
    of_one_kind = {name: mixed[name] for name in ("grids", "more")}
    fitting = {"H1": {**hypothesis, "metric": "unseen_iou"}}
    assert list(cells(load(tmp_path, cells=of_one_kind, hypotheses=fitting))) == ["grids", "more"]


@pytest.mark.parametrize(("content", "told"), [(None, "does not exist"), ("{}", "base: missing")])
def test_files_that_are_no_sweep(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        load_sweep(path, [], SCHEMAS)
    assert len(caught.value.problems) == 1


# ------------------------------------------------------------------------------------------------------------
# Shipped sweeps


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_loads_and_states_its_command(path: Path) -> None:
    sweep = load_sweep(path, [], SCHEMAS)
    default = path == ROOT / main.DEFAULT
    command = "python main.py" if default else f"python main.py --sweep {path.relative_to(ROOT)}"
    command = command.replace("--sweep", "--benchmark --sweep") if path.stem == "costs" else command
    assert sweep.file.description.startswith(f"{command}  (")
    assert "expected" in sweep.file.description
    assert sweep.folder == Path("logs/sweeps") / path.stem
    assert path.stem != "smoke" or (len(sweep.cells), len(sweep.file.seeds)) == (2, 2)
    configs = [f"cells/{cell.slug}_{seed}.json" for cell in sweep.cells for seed in sweep.file.seeds]
    for told in sweep.file.next.values():
        program, script, *words = shlex.split(told)
        options = main.parse(words)
        assert (program, script) == ("python", "main.py")
        files = [option for option in (options.config, options.sweep) if option]
        assert all(
            str(file).removeprefix("{folder}/") in configs or (ROOT / file).is_file() for file in files
        )
