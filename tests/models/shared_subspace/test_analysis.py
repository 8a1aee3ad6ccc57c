"""What a network on grids represents: every analysis on small material whose answer is known, its files and figures."""

import csv
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from models.shared_subspace.analysis import ANALYSES, GridMaterial, Looked, pair_means, primitive_means
from models.shared_subspace.analysis import metrics_of as metrics_of_analyses
from models.shared_subspace.evaluation import metrics_of
from models.shared_subspace.metrics import GRIDS
from models.shared_subspace.primitives import PRIMITIVES
from models.shared_subspace.tasks import GridBatch
from tests.drawn import assert_readable
from utils.analysis.results import value_table, write_results
from utils.plotting import STYLE
from utils.training.random import rng

NAMES = ["rotate", "shift", "fall"]
TASKS = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)  # the first two share "rotate"
SPLITS = ("train", "held_out", "unseen")
TURN = 0.4  # radians


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed))


def looked_at(labels: Tensor, layers: Mapping[str, Tensor], names: Sequence[str] = NAMES) -> Looked:
    """Samples with these labels (n, P); every second one is predicted right, the others have one wrong cell."""
    grids = torch.randint(0, 4, (2, len(labels), 8, 8), generator=rng("test", 5))
    colours = grids[1].clone()
    colours[1::2, 0, 0] = (colours[1::2, 0, 0] + 1) % 4
    words = [", ".join(names[p] for p in label.nonzero().flatten()) for label in labels]
    return Looked(GridBatch(grids[0], grids[1], labels.long(), labels.float()), layers, colours, words)


def random_labels(count: int, primitives: int, seed: int = 0) -> Tensor:
    """One or two of the primitives, (count, P) bool."""
    drawn = torch.randint(0, primitives, (count, 2), generator=rng("test", seed))
    return torch.zeros(count, primitives, dtype=torch.bool).scatter_(1, drawn, True)


def flat(*columns: Sequence[float], seed: int = 0) -> Tensor:
    """Samples (40, 6) that vary in the span of these columns alone, away from the origin."""
    return normal(40, len(columns), seed=seed) @ torch.tensor(columns) + 3.0


def subspaces() -> Tensor:
    """Of the three tasks, (3, 40, 6): the second has the first's turned by `TURN`, the third what is left of space."""
    e = torch.eye(6).tolist()
    turned = [0.0, math.cos(TURN), math.sin(TURN), 0.0, 0.0, 0.0]
    return torch.stack([flat(e[0], e[1]), flat(e[0], turned, seed=1), flat(e[4], e[5], seed=2)])


def material(sparse: bool = True, tested: int = 200, **changes: Any) -> GridMaterial:
    """Layers h, z and one before them; h of samples holds their labels, z as well, "layer 1" nothing of them."""

    def layers(labels: Tensor, seed: int) -> dict[str, Tensor]:
        found = {"layer 1": normal(len(labels), 5, seed=seed), "h": labels @ normal(3, 6) + 0.0}
        return found | ({"z": code(labels)} if sparse else {})

    def code(labels: Tensor) -> Tensor:
        """A dead unit, a unit that says "not fall", noise, and one that is "shift"."""
        noise = normal(len(labels), 2, seed=9)
        return torch.stack([torch.zeros(len(labels)), 1 - labels[:, 2], *noise.T, 2 * labels[:, 1]], dim=1)

    def looked(count: int, seed: int) -> Looked:
        labels = random_labels(count, 3, seed).float()
        return looked_at(labels, layers(labels, seed))

    names = ["layer 1", "h", *(["z"] if sparse else [])]
    shapes = {name: normal(3, 12, 4 + i, seed=10 + i) for i, name in enumerate(names)}
    values = {
        "primitives": NAMES,
        "tasks": TASKS,
        "own": {name: subspaces() for name in names},
        "same": shapes,
        "fitted": looked(400, 1),
        "splits": {split: looked(tested, 2 + i) for i, split in enumerate(SPLITS)},
        "rank": 2,
        "seed": 1993,
        "about": "tiny · seed 1993",
    }
    return GridMaterial(**values | changes)


# --- means over pairs -------------------------------------------------------------------------------------------------

VALUES = np.array(
    [[9.0, 1.0, 2.0], [1.0, 9.0, 4.0], [2.0, 4.0, 9.0]]
)  # what a task has with itself never counts


def test_means_over_pairs_of_tasks() -> None:
    assert pair_means(VALUES, TASKS) == (1.0, 3.0)
    shared, other = primitive_means(VALUES, TASKS)
    np.testing.assert_array_equal(
        shared, [1.0, math.nan, math.nan]
    )  # a single task has "shift", one has "fall"
    np.testing.assert_array_equal(other, [3.0, 4.0, 3.0])


def test_pairs_without_a_value_do_not_count() -> None:
    values = VALUES.copy()
    values[0, 2] = values[2, 0] = math.nan
    assert pair_means(values, TASKS) == (1.0, 4.0)
    np.testing.assert_array_equal(primitive_means(values, TASKS)[1], [4.0, 4.0, 4.0])


def test_a_pair_that_shares_another_primitive_is_in_neither_mean() -> None:
    """Of "shift": the tasks rotate + shift and rotate share something else."""
    tasks = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    shared, other = primitive_means(VALUES, tasks)
    assert shared.tolist() == [1.0, 2.0] and other.tolist() == [4.0, 4.0]
    assert pair_means(VALUES, tasks) == (1.5, 4.0)


# --- CKA --------------------------------------------------------------------------------------------------------------


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA by the n x n matrices of the unbiased estimator."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, ll, n = a @ a.T, b @ b.T, len(a)
        np.fill_diagonal(k, 0)
        np.fill_diagonal(ll, 0)
        rest = k.sum() * ll.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(axis=0) @ ll.sum(axis=0))
        return (np.trace(k @ ll) + rest) / (n * (n - 3))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def test_cka_is_that_of_the_same_grids_under_every_two_tasks() -> None:
    whole = material()
    found = ANALYSES["cka"](whole)
    expected = {
        layer: {
            (i, j): plain_cka(*(vectors[t].double().numpy() for t in (i, j)))
            for i, j in combinations(range(3), 2)
        }
        for layer, vectors in whole.same.items()
    }
    rows = {(row["layer"], row["first"], row["second"]): row["cka"] for row in found.tables["cka"]}
    words = ["rotate", "rotate + shift", "fall"]
    assert found.numbers["tasks"] == words
    assert rows == {
        (layer, words[i], words[j]): pytest.approx(value)
        for layer, values in expected.items()
        for (i, j), value in values.items()
    }
    h = expected["h"]
    assert found.numbers["metrics"] == {
        "cka_shared": pytest.approx(h[0, 1]), "cka_other": pytest.approx((h[0, 2] + h[1, 2]) / 2),
    }  # fmt: skip
    assert found.numbers["shared_by_primitive"]["h"] == [pytest.approx(h[0, 1]), None, None]
    assert found.numbers["other_by_primitive"]["z"][1] == pytest.approx(expected["z"][1, 2])
    assert f"{h[0, 1]:.3f}" in found.text


def test_cka_sees_no_rotation_and_no_scale() -> None:
    start = normal(40, 6)
    turned = 7 * start @ torch.linalg.qr(normal(6, 6, seed=1))[0] + 2
    same = torch.stack([start, turned, normal(40, 6, seed=2)])
    metrics = ANALYSES["cka"](material(same={"h": same})).numbers["metrics"]
    assert metrics["cka_shared"] == pytest.approx(1, abs=1e-6) and abs(metrics["cka_other"]) < 0.2


# --- Grassmann distance -----------------------------------------------------------------------------------------------


def test_distances_of_known_subspaces() -> None:
    found = ANALYSES["grassmann"](material())
    right = math.pi / math.sqrt(2)  # two right angles
    assert [row["grassmann"] for row in found.tables["grassmann"][:3]] == [
        pytest.approx(TURN, abs=1e-5), pytest.approx(right, abs=1e-5), pytest.approx(right, abs=1e-5),
    ]  # fmt: skip
    metrics = found.numbers["metrics"]
    assert metrics["grassmann_shared"] == pytest.approx(TURN, abs=1e-5)
    assert metrics["grassmann_other"] == pytest.approx(right, abs=1e-5)
    assert found.numbers["means"]["h"] == {
        "shared": metrics["grassmann_shared"], "other": metrics["grassmann_other"],
    }  # fmt: skip


def test_a_rank_takes_the_strongest_directions() -> None:
    """The first direction is the same in the first two tasks: nothing is left of the turn of the second."""
    stretched = subspaces() * torch.tensor([10.0, 1, 1, 1, 1, 1])
    metrics = ANALYSES["grassmann"](material(own={"h": stretched}, rank=1)).numbers["metrics"]
    assert metrics["grassmann_shared"] < 0.1 < metrics["grassmann_other"]


def test_chance_is_the_distance_of_random_subspaces() -> None:
    def chance(width: int, rank: int, seed: int = 1) -> float:
        layers = {"h": normal(3, 40, width)}
        return ANALYSES["grassmann"](material(own=layers, rank=rank, seed=seed)).numbers["metrics"][
            "grassmann_chance"
        ]

    random = np.random.default_rng(0)
    pairs = [[np.linalg.qr(random.normal(size=(6, 2)))[0] for _ in range(2)] for _ in range(400)]
    cosines = [np.linalg.svd(a.T @ b, compute_uv=False).clip(max=1) for a, b in pairs]
    assert chance(6, 2) == pytest.approx(np.mean([np.linalg.norm(np.arccos(c)) for c in cosines]), abs=0.25)
    assert chance(4, 4) == pytest.approx(0, abs=1e-6)  # the whole space
    assert chance(6, 2) == chance(6, 2) != chance(6, 2, seed=2)


# --- probes -----------------------------------------------------------------------------------------------------------


def test_probes_read_what_a_layer_holds_and_nothing_from_noise() -> None:
    whole = material()
    shuffled = whole.splits["unseen"]
    elsewhere = {name: vectors.flip(0) for name, vectors in shuffled.layers.items()}
    unseen = Looked(shuffled.samples, elsewhere, shuffled.colours, shuffled.programs)
    found = ANALYSES["probes"](material(splits={**whole.splits, "unseen": unseen}))
    scores, chance = found.numbers["average_precision"], found.numbers["chance"]
    assert found.numbers["fitted_on"] == 400
    assert scores["h"]["train"] == scores["h"]["held_out"] == pytest.approx(100)
    for split in SPLITS:
        labels = whole.splits[split].samples.primitives
        assert chance[split] == pytest.approx(100 * labels.mean().item(), abs=1e-4)
        assert scores["layer 1"][split] == pytest.approx(chance[split], abs=10)
    assert scores["h"]["unseen"] == pytest.approx(chance["unseen"], abs=10)  # other samples' labels
    assert found.numbers["metrics"] == {f"probe_{split}": scores["h"][split] for split in SPLITS}
    rows = {(row["layer"], row["split"]): row["average_precision"] for row in found.tables["probes"]}
    assert rows == {(layer, split): scores[layer][split] for layer in scores for split in SPLITS} | {
        ("chance", split): chance[split] for split in SPLITS
    }


# --- units ------------------------------------------------------------------------------------------------------------


def test_a_unit_that_is_a_primitive_is_found() -> None:
    whole = material()
    found = ANALYSES["units"](whole)
    z, labels = whole.fitted.layers["z"].numpy(), whole.fitted.samples.primitives.numpy()
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.corrcoef(z.T, labels.T)[:5, 5:])
    numbers = found.numbers["z"]
    assert numbers["units"] == 5 and numbers["dead"] == 1
    assert numbers["best_unit"][1:] == [4, 1] and numbers["best"] == pytest.approx(
        r[np.abs(r).argmax(axis=0), range(3)]
    )
    assert (
        numbers["best"][1:] == [pytest.approx(1), pytest.approx(-1)]
        and numbers["p"][1:] == [pytest.approx(1 / 201)] * 2
    )
    assert 0 < numbers["threshold"][0] < 0.3
    metrics = found.numbers["metrics"]
    assert metrics["unit_alignment"] == pytest.approx(np.abs(r).max(axis=0).mean())
    assert metrics["unit_chance"] == pytest.approx(np.mean(numbers["threshold"]))
    assert metrics["unit_aligned"] == pytest.approx(
        100 * np.mean(np.abs(numbers["best"]) > np.array(numbers["threshold"]))
    )
    rows = found.tables["units_z"]
    assert [row["unit"] for row in rows] == list(range(5)) and list(rows[0])[3:] == NAMES
    np.testing.assert_allclose([[row[name] for name in NAMES] for row in rows], r, atol=1e-6)
    assert rows[4]["active_share"] == pytest.approx(labels[:, 1].mean()) and rows[0]["active_share"] == 0
    assert rows[4]["mean"] == pytest.approx(2 * labels[:, 1].mean())
    assert len(found.tables["units_h"]) == 6 and "shift                  4    1.00" in found.text


def test_the_samples_shown_are_those_that_drive_the_best_unit() -> None:
    """The unit that is high where there is a primitive; one that is low there is driven by what lacks it."""
    with mpl.rc_context(STYLE):
        figure = ANALYSES["units"](material()).figures["unit_samples"]()
    captions = [" ".join(axes.get_title().split()) for axes in figure.axes if axes.get_title()]
    assert len(captions) == 12
    own = [caption.split(": ")[1] for caption in captions if caption.startswith("shift, z4: ")]
    assert len(own) == 4 and all("shift" in words for words in own)
    assert not any(caption.startswith("fall, z1: ") for caption in captions)  # r of z1 is -1


def test_without_a_sparse_code_there_is_h_alone() -> None:
    found = ANALYSES["units"](material(sparse=False))
    assert set(found.numbers) == {"h", "metrics"} and set(found.tables) == {"units_h"}
    assert set(found.figures) == {"units_h", "unit_samples"}
    assert set(found.numbers["metrics"]) == {"hidden_alignment", "hidden_chance", "hidden_aligned"}
    with mpl.rc_context(STYLE):
        titles = [axes.get_title() for axes in found.figures["unit_samples"]().axes]
    rows = found.tables["units_h"]
    best = [max(rows, key=lambda row: row[name])["unit"] for name in NAMES]
    assert all(
        any(f"{name}, h{unit}:" in title for title in titles) for name, unit in zip(NAMES, best, strict=True)
    )


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_the_first_of_each_split_and_how_many_are_solved() -> None:
    whole = material()
    found = ANALYSES["samples"](whole)
    assert found.numbers["solved"] == dict.fromkeys(SPLITS, 0.5)
    with mpl.rc_context(STYLE):
        figure = found.figures["samples"]()
    captions = [" ".join(axes.get_title().split()) for axes in figure.axes if axes.get_title()]
    assert captions == [words for split in SPLITS for words in whole.splits[split].programs[:8]]
    crossed = [axes for axes in figure.axes if axes.lines and len(axes.lines[0].get_xdata())]
    assert len(crossed) == 12  # every second prediction


# --- what is missing --------------------------------------------------------------------------------------------------


PAIRS = ("cka", "grassmann")  # what is measured between tasks


def quietly(whole: GridMaterial, folder: Path, names: Sequence[str] = PAIRS) -> dict[str, float | None]:
    """The metrics of analyses, written and drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: ANALYSES[name](whole) for name in names}
        write_results(folder, found)
    return metrics_of_analyses(found)


def test_tasks_that_all_share_something_have_no_other_pairs(tmp_path: Path) -> None:
    tasks = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    metrics = quietly(material(tasks=tasks), tmp_path)
    assert metrics["cka_other"] is None and metrics["grassmann_other"] is None
    assert metrics["cka_shared"] is not None and metrics["grassmann_shared"] is not None
    assert json.loads((tmp_path / "cka.json").read_text())["other_by_primitive"]["h"] == [None] * 3


def test_tasks_that_share_nothing_have_no_shared_pairs(tmp_path: Path) -> None:
    metrics = quietly(material(tasks=torch.eye(3, dtype=torch.bool)), tmp_path)
    assert metrics["cka_shared"] is None and metrics["grassmann_shared"] is None
    assert metrics["grassmann_other"] is not None


def test_a_single_task_has_no_pair_and_no_table_of_pairs(tmp_path: Path) -> None:
    whole = material()
    layers = {kind: {name: v[:1] for name, v in getattr(whole, kind).items()} for kind in ("own", "same")}
    metrics = quietly(material(tasks=TASKS[:1], **layers), tmp_path)
    assert metrics["grassmann_shared"] is metrics["grassmann_other"] is None
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"cka.json", "cka.png", "grassmann.json", "grassmann.png"}


def test_layers_that_do_not_vary_have_no_number(tmp_path: Path) -> None:
    """A code that is always silent, and a layer that is the same for all samples."""
    whole = material()

    def still(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**layers, "layer 1": torch.ones_like(layers["layer 1"]), "z": torch.zeros_like(layers["z"])}

    def still_looked(looked: Looked) -> Looked:
        return Looked(looked.samples, still(looked.layers), looked.colours, looked.programs)

    splits = {split: still_looked(looked) for split, looked in whole.splits.items()}
    fitted = still_looked(whole.fitted)
    unvaried = material(own=still(whole.own), same=still(whole.same), fitted=fitted, splits=splits)
    metrics = quietly(unvaried, tmp_path, (*PAIRS, "probes", "units"))
    assert (
        metrics["unit_alignment"] == metrics["unit_aligned"] == 0 and metrics["grassmann_shared"] is not None
    )
    for name in PAIRS:
        means = json.loads((tmp_path / f"{name}.json").read_text())["means"]
        assert (
            means["layer 1"] == means["z"] == {"shared": None, "other": None}
            and None not in means["h"].values()
        )
        with open(tmp_path / f"{name}.csv") as file:
            assert [row[name] == "" for row in csv.DictReader(file)] == 3 * [True] + 3 * [False] + 3 * [True]
    units = json.loads((tmp_path / "units.json").read_text())["z"]
    assert units["dead"] == 5 and units["purity"] is None and units["p"] == [1.0] * 3
    probes = json.loads((tmp_path / "probes.json").read_text())
    assert probes["average_precision"]["z"] == pytest.approx(probes["chance"])


# --- as a whole -------------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_numbers_that_there_are() -> None:
    found = {name: analyse(material()) for name, analyse in ANALYSES.items()}
    row = {"before": 1.0, "after": 2.0, "steps": 3, "all_steps": 4}
    zero_shot = {split: {"iou": 1.0, "solved": 2.0} for split in SPLITS}
    metrics = metrics_of({"zero_shot": zero_shot, "few_shot": [row], "analysis": metrics_of_analyses(found)})
    assert {spec.key for spec in GRIDS} <= set(metrics)


def test_every_file_is_written_and_tables_are_complete(tmp_path: Path) -> None:
    whole = material(tested=3)
    found = {name: analyse(whole) for name, analyse in ANALYSES.items()}
    paths = write_results(tmp_path / "analysis", found)
    assert sorted(paths) == sorted((tmp_path / "analysis").iterdir())
    assert {path.name for path in paths} == {
        "cka.json", "cka.csv", "cka.png", "grassmann.json", "grassmann.csv", "grassmann.png", "probes.json",
        "probes.csv", "probes.png", "units.json", "units_h.csv", "units_h.png", "units_z.csv", "units_z.png",
        "unit_samples.png", "samples.json", "samples.png",
    }  # fmt: skip
    for name, findings in found.items():
        assert json.loads((tmp_path / "analysis" / f"{name}.json").read_text()) == findings.numbers
        for stem, rows in findings.tables.items():
            with open(tmp_path / "analysis" / f"{stem}.csv") as file:
                written = list(csv.DictReader(file))
            assert written == [{key: str(value) for key, value in row.items()} for row in rows]
    counts = {stem: len(rows) for findings in found.values() for stem, rows in findings.tables.items()}
    assert counts == {"cka": 9, "grassmann": 9, "probes": 12, "units_h": 6, "units_z": 5}
    for path in paths:
        if path.suffix == ".png":
            assert imread(path)[..., :3].std() > 0.05  # not a blank sheet


def test_the_same_material_gives_the_same_findings() -> None:
    for analyse in ANALYSES.values():
        first, again = analyse(material()), analyse(material())
        assert (first.numbers, first.tables, first.text) == (again.numbers, again.tables, again.text)


def test_tables_fold_and_leave_empty_what_is_missing() -> None:
    values = np.array([[0.25, math.nan], [1.0, 2.0]])
    lines = value_table("title", ["h", "z"], ["shared primitive", "nothing shared"], values, 2).splitlines()
    assert [line.split() for line in lines[2:]] == [["h", "0.25"], ["z", "1.00", "2.00"]]
    assert len({len(line) for line in lines[1:2] + lines[3:]}) == 1
    wide = value_table("title", ["h"], [f"column {i}" for i in range(30)], np.ones((1, 30)), 2).splitlines()
    assert max(map(len, wide)) <= 100 and sum(line.count("1.00") for line in wide) == 30


def large(primitives: int) -> GridMaterial:
    """As many primitives as the published configurations have, their names the longest there are."""
    names = sorted(PRIMITIVES, key=len)[-primitives:]
    pairs = torch.eye(primitives) + torch.eye(primitives).roll(1, dims=0)
    tasks = torch.cat([torch.eye(primitives), pairs[:4]]).bool()
    layers = ("layer 1", "layer 2", "layer 3", "h", "z")

    def looked(count: int, seed: int) -> Looked:
        labels = random_labels(count, primitives, seed)
        return looked_at(labels, {name: normal(count, 60, seed=seed) for name in layers}, names)

    between = {name: normal(len(tasks), 6, 8, seed=i) for i, name in enumerate(layers)}
    return material(
        primitives=names,
        tasks=tasks,
        own=between,
        same=between,
        fitted=looked(100, 0),
        splits={split: looked(4, i) for i, split in enumerate(SPLITS)},
        about="a_rather_long_prefix_of_a_run_on_grids · transformer · seed 1993",
    )


@pytest.mark.parametrize("primitives", [8, 14])
@pytest.mark.parametrize("name", ANALYSES)
def test_no_text_of_a_figure_overlaps_another_or_leaves_the_picture(name: str, primitives: int) -> None:
    with mpl.rc_context(STYLE):
        for draw in ANALYSES[name](large(primitives)).figures.values():
            assert_readable(draw())
