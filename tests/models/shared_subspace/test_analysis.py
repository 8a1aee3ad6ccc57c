"""Analyses of a network on grids: numbers on small inputs whose answer is known, their files and figures."""

import csv
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

from models.shared_subspace.analysis import (
    ANALYSES,
    AnalysisInputs,
    ModelOutputs,
    metrics_of,
    task_means,
)
from models.shared_subspace.primitives import PRIMITIVES
from models.shared_subspace.tasks import GridSamples
from tests.drawn import assert_readable
from tests.utils.analysis.test_similarity import linear_cka
from utils.analysis.results import AnalysisResult, write_results
from utils.plotting import STYLE

NAMES = ["rotate", "shift", "fall"]
TASKS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)  # the first two share "rotate"
SPLITS = ("train", "held_out", "unseen")
TURN = 0.4  # radians


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(labels: Tensor, layers: Mapping[str, Tensor], names: Sequence[str] = NAMES) -> ModelOutputs:
    """Samples with these labels (n, P); every second one is predicted right, the others but for one cell."""
    grids = torch.randint(0, 4, (2, len(labels), 8, 8), generator=torch.Generator().manual_seed(5))
    colours = grids[1].clone()
    colours[1::2, 0, 0] = (colours[1::2, 0, 0] + 1) % 4
    programs = [", ".join(names[index] for index in label.nonzero().flatten()) for label in labels]
    return ModelOutputs(GridSamples(*grids, labels.long(), labels.bool()), layers, colours, programs)


def random_labels(count: int, primitives: int, seed: int = 0) -> Tensor:
    """One or two of the primitives, (count, P)."""
    drawn = torch.randint(0, primitives, (count, 2), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(count, primitives).scatter_(1, drawn, 1.0)


def subspaces() -> Tensor:
    """Of the three tasks, (3, 40, 6): the first, one turned by `TURN` from it, and an orthogonal one."""
    e = torch.eye(6)
    turned = math.cos(TURN) * e[1] + math.sin(TURN) * e[2]
    bases = (e[:2], torch.stack([e[0], turned]), e[4:])
    return torch.stack([normal(40, 2, seed=seed) @ basis + 3.0 for seed, basis in enumerate(bases)])


def make_inputs(sparse: bool = True, tested: int = 200, **changes: Any) -> AnalysisInputs:
    """Layers h, z and one before them; h and z of samples hold their labels, "layer 1" nothing of them."""

    def of_labels(count: int, seed: int) -> ModelOutputs:
        labels = random_labels(count, 3, seed)
        dead, noise = torch.zeros(count), normal(count, 2, seed=9)
        z = torch.stack([dead, 1 - labels[:, 2], *noise.T, 2 * labels[:, 1]], dim=1)  # 1: not fall, 4: shift
        layers = {"layer 1": normal(count, 5, seed=seed), "h": labels @ normal(3, 6)}
        return outputs(labels, layers | ({"z": z} if sparse else {}))

    names = ["layer 1", "h", *(["z"] if sparse else [])]
    inputs = AnalysisInputs(
        primitives=NAMES,
        tasks=TASKS,
        by_task={name: subspaces() for name in names},
        same_grids={name: normal(3, 12, 4 + i, seed=10 + i) for i, name in enumerate(names)},
        fitted=of_labels(400, 1),
        splits={split: of_labels(tested, 2 + i) for i, split in enumerate(SPLITS)},
        rank=2,
        seed=1993,
        title="tiny · seed 1993",
    )
    return replace(inputs, **changes)


def captions(found: AnalysisResult, name: str) -> list[str]:
    """Titles of the panels of a figure."""
    with mpl.rc_context(STYLE):
        titles = [" ".join(axes.get_title().split()) for axes in found.figures[name]().axes]
    return [title for title in titles if title]


# --- between tasks ------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("tasks", "pair", "means", "shared", "other"),
    [
        (TASKS, 2.0, (1.0, 3.0), [1.0, NAN, NAN], [3.0, 4.0, 3.0]),  # one task has "shift", one has "fall"
        (TASKS, NAN, (1.0, 4.0), [1.0, NAN, NAN], [4.0, 4.0, 4.0]),
        (torch.tensor([[1, 1], [1, 0], [0, 1]]), 2.0, (1.5, 4.0), [1.0, 2.0], [4.0, 4.0]),
    ],
    ids=["three tasks", "a pair without a value", "a pair that shares another primitive is in neither mean"],
)
def test_means_over_pairs_of_tasks(
    tasks: Tensor, pair: float, means: tuple[float, float], shared: list[float], other: list[float]
) -> None:
    values = np.array([[9.0, 1.0, pair], [1.0, 9.0, 4.0], [pair, 4.0, 9.0]])
    pairs, by_primitive = task_means(values, tasks)
    assert tuple(pairs) == means
    np.testing.assert_array_equal(by_primitive, [shared, other])


def test_cka_is_that_of_the_same_grids_under_every_two_tasks() -> None:
    inputs = make_inputs()
    found = ANALYSES["cka"](inputs)
    words = ["rotate", "rotate + shift", "fall"]
    expected = {
        (layer, words[i], words[j]): linear_cka(vectors[i], vectors[j])
        for layer, vectors in inputs.same_grids.items()
        for i, j in combinations(range(3), 2)
    }
    rows = {(row["layer"], row["first"], row["second"]): row["cka"] for row in found.tables["cka"]}
    assert found.numbers["tasks"] == words and rows == pytest.approx(expected)
    h = [value for (layer, *_), value in expected.items() if layer == "h"]
    assert found.numbers["metrics"] == pytest.approx({"cka_shared": h[0], "cka_other": (h[1] + h[2]) / 2})
    assert found.numbers["shared_by_primitive"]["h"] == [pytest.approx(h[0]), None, None]
    assert f"{h[0]:.3f}" in found.text


def test_distances_of_known_subspaces() -> None:
    found = ANALYSES["grassmann"](make_inputs())
    orthogonal = math.pi / math.sqrt(2)  # two right angles
    rows = [row["grassmann"] for row in found.tables["grassmann"][:3]]
    assert rows == pytest.approx([TURN, orthogonal, orthogonal], abs=1e-5)
    assert list(found.numbers["means"]["h"].values()) == pytest.approx([TURN, orthogonal], abs=1e-5)
    # one direction, the same in the first two tasks: nothing is left of the turn of the second
    stretched = subspaces() * torch.tensor([10.0, 1, 1, 1, 1, 1])
    metrics = ANALYSES["grassmann"](make_inputs(by_task={"h": stretched}, rank=1)).numbers["metrics"]
    assert metrics["grassmann_shared"] < 0.1 < metrics["grassmann_other"]


def test_chance_is_the_distance_of_random_subspaces() -> None:
    def chance(width: int, rank: int, seed: int = 1) -> float:
        inputs = make_inputs(by_task={"h": normal(3, 40, width)}, rank=rank, seed=seed)
        return ANALYSES["grassmann"](inputs).numbers["metrics"]["grassmann_chance"]

    assert 1 < chance(6, 2) < math.pi / math.sqrt(2)
    assert chance(4, 4) == pytest.approx(0, abs=1e-6)  # the whole space
    assert chance(6, 2) == chance(6, 2) != chance(6, 2, seed=2)


# --- probes, units, samples ---------------------------------------------------------------------------------


def test_probes_read_what_a_layer_holds_and_nothing_from_noise() -> None:
    inputs = make_inputs()
    unseen = inputs.splits["unseen"]
    shuffled = replace(unseen, layers={name: vectors.flip(0) for name, vectors in unseen.layers.items()})
    found = ANALYSES["probes"](replace(inputs, splits=inputs.splits | {"unseen": shuffled}))
    scores, chance = found.numbers["average_precision"], found.numbers["chance"]
    assert found.numbers["fitted_on"] == 400
    assert scores["h"]["train"] == scores["h"]["held_out"] == pytest.approx(100)
    assert scores["h"]["unseen"] == pytest.approx(chance["unseen"], abs=10)  # other samples' labels
    for split in SPLITS:
        labels = inputs.splits[split].samples.primitives
        assert chance[split] == pytest.approx(100 * labels.float().mean().item(), abs=1e-4)
        assert scores["layer 1"][split] == pytest.approx(chance[split], abs=10)
    assert found.numbers["metrics"] == {f"probe_{split}": scores["h"][split] for split in SPLITS}


def test_a_unit_that_is_a_primitive_is_found() -> None:
    """Of z, unit 4 is "shift" and unit 1 is "not fall"."""
    inputs = make_inputs()
    found = ANALYSES["units"](inputs)
    numbers, metrics = found.numbers["z"], found.numbers["metrics"]
    assert numbers["units"] == 5 and numbers["dead"] == 1 and numbers["best_unit"][1:] == [4, 1]
    assert numbers["best"][1:] == [pytest.approx(1), pytest.approx(-1)] and 0 < numbers["threshold"][0] < 0.3
    assert metrics["unit_alignment"] == pytest.approx(np.abs(numbers["best"]).mean())
    assert metrics["unit_chance"] == pytest.approx(np.mean(numbers["threshold"]))
    assert metrics["unit_aligned"] in (pytest.approx(200 / 3), 100)
    rows, frequency = found.tables["units_z"], inputs.fitted.samples.primitives[:, 1].float().mean().item()
    assert [row["unit"] for row in rows] == list(range(5)) and list(rows[0])[3:] == NAMES
    assert rows[4]["shift"] == pytest.approx(1) and rows[1]["fall"] == pytest.approx(-1)
    assert [rows[4][name] for name in ("mean", "active_share")] == pytest.approx([2 * frequency, frequency])
    (line,) = [line for line in found.text.splitlines() if line.startswith("shift, z4")]
    assert line.split()[2] == "1.00"


@pytest.mark.parametrize("sparse", [True, False])
def test_the_samples_shown_are_those_that_most_activate_the_unit_of_highest_correlation(sparse: bool) -> None:
    found = ANALYSES["units"](make_inputs(sparse=sparse))
    layer = "z" if sparse else "h"
    assert found.tables.keys() == ({"units_h", "units_z"} if sparse else {"units_h"})
    rows = found.tables[f"units_{layer}"]
    shown = captions(found, "unit_samples")
    assert len(shown) == 12
    for name in NAMES:
        unit = max(rows, key=lambda row: row[name])["unit"]  # not z1, which is -1 times "fall"
        own = [caption.split(": ")[1] for caption in shown if caption.startswith(f"{name}, {layer}{unit}: ")]
        assert len(own) == 4 and (name != "shift" or all("shift" in words for words in own))


def test_samples_are_the_first_of_each_split_with_their_errors_crossed() -> None:
    inputs = make_inputs()
    found = ANALYSES["samples"](inputs)
    assert found.numbers["solved"] == dict.fromkeys(SPLITS, 0.5)
    programs = [words for split in SPLITS for words in inputs.splits[split].programs[:8]]
    assert captions(found, "samples") == programs
    axes = found.figures["samples"]().axes
    crossed = [one for one in axes if one.lines and len(one.lines[0].get_xdata())]
    assert len(crossed) == 12  # every second is wrong


# --- what is missing ----------------------------------------------------------------------------------------

PAIRS = ("cka", "grassmann")  # measures between tasks


def quietly(inputs: AnalysisInputs, folder: Path, names: Sequence[str] = PAIRS) -> dict[str, float | None]:
    """The metrics of analyses, written and drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: ANALYSES[name](inputs) for name in names}
        write_results(folder, found)
    return metrics_of(found)


@pytest.mark.parametrize(
    ("tasks", "missing"),
    [
        (torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]), [False, True]),
        (torch.eye(3), [True, False]),
        (TASKS[:1], [True, True]),
    ],
    ids=["all share something", "none share anything", "a single task"],
)
def test_pairs_that_do_not_occur_have_no_number(tasks: Tensor, missing: list[bool], tmp_path: Path) -> None:
    layers = {"h": subspaces()[: len(tasks)]}
    metrics = quietly(make_inputs(tasks=tasks.bool(), by_task=layers, same_grids=layers), tmp_path)
    for name in PAIRS:
        assert [metrics[f"{name}_{kind}"] is None for kind in ("shared", "other")] == missing
        assert (tmp_path / f"{name}.csv").exists() == (len(tasks) > 1)  # no table without a row


def test_layers_that_do_not_vary_have_no_number(tmp_path: Path) -> None:
    """A code that is always zero, and a layer that is the same for all samples."""

    def constant(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**layers, "layer 1": torch.ones_like(layers["layer 1"]), "z": torch.zeros_like(layers["z"])}

    inputs = make_inputs()
    inputs = replace(
        inputs,
        by_task=constant(inputs.by_task),
        same_grids=constant(inputs.same_grids),
        fitted=replace(inputs.fitted, layers=constant(inputs.fitted.layers)),
        splits={split: replace(own, layers=constant(own.layers)) for split, own in inputs.splits.items()},
    )
    metrics = quietly(inputs, tmp_path, (*PAIRS, "probes", "units"))
    assert metrics["unit_alignment"] == metrics["unit_aligned"] == 0
    for name in PAIRS:
        means = json.loads((tmp_path / f"{name}.json").read_text())["means"]
        assert means["layer 1"] == means["z"] == {"shared": None, "other": None}
        assert None not in means["h"].values()
        with open(tmp_path / f"{name}.csv") as file:
            assert [row[name] == "" for row in csv.DictReader(file)] == 3 * [True] + 3 * [False] + 3 * [True]
    units = json.loads((tmp_path / "units.json").read_text())["z"]
    assert units["dead"] == 5 and units["purity"] is None and units["p"] == [1.0] * 3
    probes = json.loads((tmp_path / "probes.json").read_text())
    assert probes["average_precision"]["z"] == pytest.approx(probes["chance"])


# --- as a whole ---------------------------------------------------------------------------------------------


def test_every_file_is_written(tmp_path: Path) -> None:
    inputs = make_inputs(tested=3)
    found = {name: analyse(inputs) for name, analyse in ANALYSES.items()}
    paths = write_results(tmp_path / "analysis", found)
    assert sorted(paths) == sorted((tmp_path / "analysis").iterdir())
    for name, own in found.items():
        assert json.loads((tmp_path / "analysis" / f"{name}.json").read_text()) == own.numbers
    counts = {stem: len(rows) for own in found.values() for stem, rows in own.tables.items()}
    assert counts == {"cka": 9, "grassmann": 9, "probes": 12, "units_h": 6, "units_z": 5}
    pictures = {path.stem for path in paths if path.suffix == ".png"}
    assert pictures == {*counts, "unit_samples", "samples"}


@pytest.mark.parametrize("name", ANALYSES)
def test_no_text_of_a_figure_overlaps_another_or_leaves_the_picture(name: str) -> None:
    """All primitives, as in the published configurations."""
    names, layers = list(PRIMITIVES), ("layer 1", "layer 2", "layer 3", "h", "z")
    pairs = torch.eye(len(names)) + torch.eye(len(names)).roll(1, dims=0)
    tasks = torch.cat([torch.eye(len(names)), pairs[:4]]).bool()
    between = {name: normal(len(tasks), 6, 8, seed=i) for i, name in enumerate(layers)}

    def of_labels(count: int, seed: int) -> ModelOutputs:
        vectors = {name: normal(count, 60, seed=seed) for name in layers}
        return outputs(random_labels(count, len(names), seed), vectors, names)

    inputs = make_inputs(
        primitives=names,
        tasks=tasks,
        by_task=between,
        same_grids=between,
        fitted=of_labels(100, 0),
        splits={split: of_labels(4, i) for i, split in enumerate(SPLITS)},
        title="a_rather_long_prefix_of_a_run_on_grids · transformer · seed 1993",
    )
    with mpl.rc_context(STYLE):
        for draw in ANALYSES[name](inputs).figures.values():
            assert_readable(draw())
