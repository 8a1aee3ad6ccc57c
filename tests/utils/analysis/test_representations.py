"""utils.analysis.representations: known drift, known angles, and probes that lose what moves."""

import math
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.drawn import assert_readable
from utils.analysis.representations import (
    ANALYSES,
    GATE_ANALYSES,
    AnalysisInputs,
    branch_rows,
    chance_angle,
    chosen_images,
    halves,
)
from utils.errors import UserError
from utils.plotting import STYLE
from utils.training.random import rng


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed))


def basis(*columns: int, width: int = 12) -> Tensor:
    """Some axes of a space."""
    return torch.eye(width, dtype=torch.float64)[:, list(columns)]


def known(tasks: int = 3, n: int = 40) -> AnalysisInputs:
    """Block 0 never moves; block 1 is rotated by task 1 and replaced by task 2. Four clear classes."""
    labels = torch.arange(n) % 4
    start = normal(n, 12) + 8 * torch.eye(12)[labels]
    turned = start @ torch.linalg.qr(normal(12, 12, seed=1))[0]
    tokens = torch.stack([torch.stack([start, moved]) for moved in (start, turned, normal(n, 12, seed=2))])
    turns = [(basis(0, 1), basis(2, 3)), (basis(0, 1), basis(0, 3)), (basis(), basis(0, 3))]
    spaces = [{(1, 0): {"fast": fast, "slow": slow}} for fast, slow in turns[:tasks]]
    return AnalysisInputs(tokens[:tasks], labels, spaces, 1993, "run · seed 1993", labels // 2, [{}] * tasks)


def test_cka_sees_a_replaced_block_and_no_rotation() -> None:
    values = np.array(ANALYSES["cka"](known()).numbers["cka"])
    assert values[0] == pytest.approx(np.ones((3, 3)))
    assert values[1, 0, 1] == pytest.approx(1, abs=1e-6) and abs(values[1, 0, 2]) < 0.3


def test_subspaces_see_the_rotation_too() -> None:
    found = ANALYSES["grassmann"](known())
    values = np.array(found.numbers["principal"]["rms_degrees"])
    assert values[0] == pytest.approx(np.zeros((3, 3)), abs=1e-6)
    assert values[1, 0, 1] > 10 and values[1, 1, 0] == values[1, 0, 1]
    first = found.tables["grassmann"][3]
    assert first == {"task": 1, "block": 1, "with_first": values[1, 0, 1], "with_before": values[1, 0, 1]}


def test_the_angle_by_chance_is_of_as_many_directions_as_few_images_have() -> None:
    """Images less their mean span one direction less than they are."""
    inputs = known(n=6)
    apart = replace(inputs, tokens=torch.stack([normal(2, 6, 12, seed=seed) for seed in range(40)]))
    found = ANALYSES["grassmann"](replace(apart, spaces=[{}] * 40)).numbers["principal"]
    others = np.array(found["rms_degrees"])[0, 0, 1:]
    assert found["rank"] == 5 and found["chance_degrees"] == pytest.approx(others.mean(), abs=2)


def test_angles_of_known_branches() -> None:
    rows = branch_rows(known())
    assert [row["between"] for row in rows] == [pytest.approx(90), pytest.approx(90 / math.sqrt(2)), None]
    assert [row["smallest"] for row in rows] == [pytest.approx(90), pytest.approx(0, abs=1e-6), None]
    assert rows[0]["distance"] == pytest.approx(math.pi / math.sqrt(2))
    assert [row["fast_moved"] for row in rows] == [None, pytest.approx(0, abs=1e-6), None]
    slow_moved = [None, pytest.approx(90 / math.sqrt(2)), pytest.approx(0, abs=1e-6)]
    assert [row["slow_moved"] for row in rows] == slow_moved
    assert [row["chance"] is None for row in rows] == [False, False, True]


def test_a_branch_whose_output_is_always_zero_is_a_sentence() -> None:
    spaces = [{(1, 0): {"fast": basis(), "slow": basis(2)}}] * 3
    found = ANALYSES["grassmann"](replace(known(), spaces=spaces))
    assert "zero whenever a task ends" in found.text
    assert found.numbers["branches"][0]["between"] is None


def test_random_subspaces_are_nearly_orthogonal_in_wide_spaces() -> None:
    assert chance_angle(400, 1, 1, rng("test", 0)) > 85
    assert 25 < chance_angle(2, 1, 1, rng("test", 0)) < 65
    assert chance_angle(5, 5, 2, rng("test", 0)) == pytest.approx(0, abs=1e-6)


def test_probes_read_what_is_there_and_lose_it_when_the_network_moves() -> None:
    found = ANALYSES["probes"](known(n=200))
    values = np.array(found.numbers["accuracy"])
    assert (values[0] > 95).all() and values[1, 0, 0] > 95 and values[1, 1, 1] > 95
    assert values[1, 0, 1] < 80 and values[1, 2, 2] < 50 and found.numbers["chance"] == 25
    assert found.tables["probes"][-1]["accuracy"] == values[1, 2, 2]
    assert found.numbers["fitted_on"] == found.numbers["tested_on"] == 100


@pytest.mark.parametrize("name", ANALYSES)
def test_a_run_of_one_task_has_readable_figures(name: str) -> None:
    with mpl.rc_context(STYLE):
        for draw in ANALYSES[name](known(tasks=1)).figures.values():
            assert_readable(draw())


def test_halves_share_no_image_and_hold_every_class() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4 + [2])
    fit, test = halves(labels, rng("test", 0))
    assert sorted([*fit.tolist(), *test.tolist()]) == list(range(10))
    assert labels[fit].bincount().tolist() == [3, 2, 1] and labels[test].bincount().tolist() == [2, 2]


def test_a_smaller_choice_of_images_is_part_of_a_larger_one(make_sema) -> None:
    data = make_sema(max_tasks=2, max_test_per_class=None).data
    few, many = (chosen_images(data, 1, n) for n in (3, 6))
    assert len(few) == 12 and len(many) == 24 and set(few) <= set(many)
    assert torch.equal(data.targets(few, "test"), torch.arange(4).repeat_interleave(3))
    assert not np.array_equal(few, chosen_images(data, 2, 3))
    with pytest.raises(UserError, match="larger max_test_per_class"):
        chosen_images(make_sema(max_tasks=2, max_test_per_class=1).data, 1, 6)


def related(weights: list[dict[int, float]]) -> AnalysisInputs:
    """Tasks 0, 1 and 2 of ten images; the images of 0 and 2 are alike, those of 1 are their opposites."""
    tasks = torch.arange(30) // 10
    tokens = torch.tensor([[1.0, 0.2], [-1.0, 0.0], [1.0, -0.2]])[tasks] + 0.01 * normal(30, 2)
    return replace(known(), tokens=tokens.expand(3, 1, 30, 2), labels=tasks, tasks=tasks, weights=weights)


@pytest.mark.parametrize(
    ("like", "unlike", "rank"), [(0.6, 0.1, 1.0), (0.1, 0.6, -0.5)], ids=["follow", "oppose"]
)
def test_weights_of_a_gate_are_ranked_beside_the_similarity_of_tasks(
    like: float, unlike: float, rank: float
) -> None:
    """Ranks of similarity (0 and 2 before 0 and 1, 1 and 2 before that) and of weights, by hand."""
    weights = [{0: 1.0}, {0: 0.2, 1: 0.8}, {0: like, 1: unlike, 2: 0.3}]
    found = GATE_ANALYSES["gate"](related(weights))
    pairs = {(row["task"], row["adapter"]): row for row in found.numbers["pairs"]}
    assert set(pairs) == {(1, 0), (2, 0), (2, 1)} and pairs[2, 0]["share"] == pytest.approx(3 * like)
    assert pairs[2, 0]["similarity"] > 0.5 > -0.5 > pairs[1, 0]["similarity"]
    ranks = [np.argsort(np.argsort([pairs[p][key] for p in pairs])) for key in ("similarity", "share")]
    by_hand = 1 - 6 * np.square(np.subtract(*ranks)).sum() / (3 * 8)
    assert found.numbers["rank_correlation"] == pytest.approx(by_hand)
    assert np.sign(by_hand) == np.sign(rank)
    with mpl.rc_context(STYLE):
        assert_readable(found.figures["gate"]())


def test_without_a_gate_or_with_equal_weights_there_is_no_correlation() -> None:
    found = GATE_ANALYSES["gate"](known())
    assert found.numbers["rank_correlation"] is None and not found.figures and "no gate" in found.text
    equal = GATE_ANALYSES["gate"](related([{0: 1.0}, {0: 0.5, 1: 0.5}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}]))
    assert equal.numbers["rank_correlation"] is None and equal.figures and "no rank" in equal.text
