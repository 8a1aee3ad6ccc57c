"""Closed-form classifiers and the drift of their class statistics, against independent computations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.ranpac import FINER, FIT, HELD, RIDGES, RanPACHead
from models.vit import closed_form
from models.vit.closed_form import STRENGTHS, ClosedFormHead, PrototypeHead, fit_drift
from models.vit.gaussians import AlignedHead, FeCAMHead
from utils.inc_net import IncrementalHead
from utils.training.random import rng

WIDTH = 6


def classes_of_features(classes: range, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian clusters around one centre a class, shuffled: features (n, d) and labels."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(7).normal(size=(50, WIDTH))
    labels = rng.permutation(np.repeat(list(classes), per_class))
    features = centres[labels] + rng.normal(size=(len(labels), WIDTH))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def brute_force(head: RanPACHead, hidden: list[Tensor], labels: list[Tensor]) -> tuple[float, Tensor, Tensor]:
    """lambda, and W of both parts and of the one that fits, by singular values of the random features."""
    one_hot = [F.one_hot(part, len(head.counts)).double() for part in labels]

    def weights(x: Tensor, y: Tensor, ridge: float) -> Tensor:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        return vt.T @ ((s / (s.square() + ridge))[:, None] * (u.T @ y))

    def error(ridge: float) -> float:
        fitted = weights(hidden[FIT], one_hot[FIT], ridge)
        return float((hidden[HELD] @ fitted - one_hot[HELD]).square().sum())

    best = min(RIDGES, key=error)
    best = min([best, *(best * factor for factor in FINER)], key=error)
    both = weights(torch.cat(hidden), torch.cat(one_hot), best)
    return best, both, weights(hidden[FIT], one_hot[FIT], best)


# Problem: random features, images of each class, share of wrong labels, factor of the features.
CHOICES = {
    "more images than random features": (40, [30, 30, 30], 0.3, 1.0),
    "more random features than images, in blocks of unequal size": (150, [30, 30, 30], 0.3, 1.0),
    "classes of unequal size": (100, [60, 20, 7, 3], 0.3, 1.0),
    "labels that mean nothing: the largest lambda": (100, [30, 30], 1.0, 300.0),
    "large numbers": (100, [30, 30, 30], 0.3, 1e4),
    "small numbers": (100, [30, 30, 30], 0.3, 1e-3),
}


@pytest.mark.parametrize("problem", CHOICES)
def test_lambda_and_weights_are_those_of_brute_force(problem: str) -> None:
    """In both of two tasks, also for the part that fits alone, by which calibration scores."""
    dim, sizes, wrong, factor = CHOICES[problem]
    head, known = RanPACHead(WIDTH, seed=3, dim=dim), 0
    hidden, labels = [[], []], [[], []]
    for task in range(2):
        features, targets = classes_of_features(range(known, known + len(sizes)), max(sizes), seed=task)
        kept = torch.cat([(targets == known + c).nonzero()[:n, 0] for c, n in enumerate(sizes)])
        features, targets, known = factor * features[kept], targets[kept], known + len(sizes)
        mixed = torch.rand(len(targets), generator=rng("test wrong", task)) < wrong
        targets[mixed] = targets[mixed][torch.randperm(int(mixed.sum()), generator=rng("test mixed", task))]
        head.add(features, targets)
        held = head.unseen_rows(len(features), known)
        rest = torch.from_numpy(np.setdiff1d(np.arange(len(features)), held.numpy()))
        for part, rows in ((FIT, rest), (HELD, held)):
            hidden[part].append(head.random_features(features[rows].double()))
            labels[part].append(targets[rows])
        ridge, both, fitted = brute_force(head, [*map(torch.cat, hidden)], [*map(torch.cat, labels)])
        assert head.ridge == ridge
        torch.testing.assert_close(head.weights, both, rtol=1e-6, atol=1e-6 * float(both.abs().max()))
        hidden_held = head.random_features(features[held].double())
        torch.testing.assert_close(head(features[held]), (hidden_held @ both).float())
        unseen = head.unseen_scores(features[held], targets[held])
        torch.testing.assert_close(unseen, (hidden_held @ fitted).float())


def test_where_no_candidate_can_be_solved_lambda_grows_on() -> None:
    features = torch.full((20, WIDTH), 1e14)
    head = RanPACHead(WIDTH, seed=3, dim=30)
    head.add(features, torch.arange(20) % 4)
    assert max(RIDGES) < head.ridge < 1e20 and torch.isfinite(head(features)).all()
    assert torch.isfinite(head.unseen_scores(features, torch.arange(20) % 4)).all()


def test_choosing_lambda_takes_one_factorization_whatever_the_number_of_candidates() -> None:
    """Of matrices as large as the sums, a task factorizes one for its classifier, and calibration none."""
    dim, found = 200, []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.linalg.cholesky_ex, torch.linalg.eigh) and args[0].shape[-1] == dim:
                found.append(function.__name__)
            return function(*args, **(kwargs or {}))

    features, labels = classes_of_features(range(4), 40)
    head = RanPACHead(WIDTH, seed=3, dim=dim)
    with Counted():
        head.add(features, labels)
        head.unseen_scores(features, labels)
    assert len(found) == 1


REPEATED = {  # features and labels
    "one image repeated in every class": (torch.full((20, WIDTH), 3.0), torch.arange(20) % 4),
    "an image of each class, repeated": (
        1e6 * torch.randn(3, WIDTH, generator=rng("test images")).repeat(10, 1),
        torch.arange(30) % 3,
    ),
    "one image a class": (torch.randn(4, WIDTH, generator=rng("test images")), torch.arange(4)),
    "one image": (torch.full((1, WIDTH), 2.0), torch.zeros(1, dtype=torch.int64)),
    "nothing but zeros": (torch.zeros(8, WIDTH), torch.arange(8) % 2),
    "tiny numbers, classes of unequal size": (
        F.pad(1e-3 * torch.eye(6, WIDTH - 1), (0, 1)),
        torch.tensor([0, 0, 0, 1, 1, 2]),
    ),
}
WIDE = "ranpac, more random features than images"
HEADS: dict[str, Callable[[IncrementalHead], ClosedFormHead]] = {  # an aligned one starts from trained rows
    "cosine": lambda rows: PrototypeHead(WIDTH),
    "fecam": lambda rows: FeCAMHead(WIDTH),
    "aligned": lambda rows: AlignedHead(WIDTH, rows, seed=3, samples=64, epochs=3, lr=0.05, restart=False),
    "ranpac": lambda rows: RanPACHead(WIDTH, seed=3, dim=20),
    WIDE: lambda rows: RanPACHead(WIDTH, seed=3, dim=300),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("what", REPEATED)
def test_repeated_and_single_images_are_classified_and_followed(what: str, name: str) -> None:
    """Singular sums, constant features, fewer images than parts: scores are numbers, also once moved."""
    features, labels = REPEATED[what]
    classes, rows = len(labels.unique()), IncrementalHead(WIDTH)
    head = HEADS[name](rows)
    rows.grow(classes)
    head.add(features, labels)
    assert torch.isfinite(head(features)).all()
    if what == "an image of each class, repeated" and name != "aligned":
        assert torch.equal(head(features).argmax(dim=1), labels)
    assert 0 <= head.compensate_drift(features, features + 1) <= 1
    rows.grow(classes)
    head.add(2 * features + 1, labels + classes)
    assert torch.isfinite(head(features + 1)).all()


def test_images_that_are_all_alike_are_taken_to_have_moved_alike_and_still_ones_not_at_all() -> None:
    before, (features, _) = torch.ones(5, WIDTH), classes_of_features(range(3), 4)
    drift, still = fit_drift(before, before + 2), fit_drift(features, features)
    moved = torch.full((1, WIDTH), 2.0).double()
    torch.testing.assert_close(drift.apply(torch.zeros(1, WIDTH).double()), moved)
    assert torch.equal(still.apply(features.double()), features.double())
    assert drift.explained == pytest.approx(1) and still.explained == 1
    assert fit_drift(before[:1], before[:1] + 2).explained == 0  # one image says nothing about another


def test_the_projection_belongs_to_the_seed() -> None:
    same, other = RanPACHead(WIDTH, seed=3, dim=8), RanPACHead(WIDTH, seed=4, dim=8)
    assert torch.equal(same.projection, RanPACHead(WIDTH, seed=3, dim=8).projection)
    assert not torch.equal(same.projection, other.projection)
    assert "projection" not in same.state_dict()


def test_a_checkpoint_of_ranpac_holds_one_triangle_of_its_sums() -> None:
    """Half of them, and not a bit is lost; a checkpoint with whole matrices is still read."""
    one = RanPACHead(WIDTH, seed=3, dim=40)
    one.add(*classes_of_features(range(3), 8))
    before, _ = classes_of_features(range(3, 5), 8)
    one.compensate_drift(before, 1.1 * before + 0.3)
    state = one.state_dict()
    assert state["gram"].numel() == 40 * 41 and state["gram"].dtype == torch.float64
    for saved in (state, state | {"gram": one.gram}):
        other = RanPACHead(WIDTH, seed=3, dim=40)
        other.load_state_dict(saved)
        assert torch.equal(other.gram, one.gram)


# --- drift --------------------------------------------------------------------------------------------------


def test_without_evidence_of_a_map_all_features_move_alike() -> None:
    """Movement that has nothing to do with where a feature was: the map stays near the mean movement."""
    rng = torch.Generator().manual_seed(1)
    before = torch.randn(30, WIDTH, generator=rng)
    after = before + 5 + torch.randn(30, WIDTH, generator=rng)
    drift = fit_drift(before, after)
    assert (drift.jacobian - torch.eye(WIDTH)).norm() < 0.2
    centre = before.double().mean(dim=0)
    torch.testing.assert_close(drift.apply(centre), after.double().mean(dim=0))


def test_the_chosen_map_has_the_smallest_error_when_each_image_is_left_out_in_turn() -> None:
    """The closed form against refitting without each row, for every strength of the ridge."""
    generator = torch.Generator().manual_seed(2)
    before, turn, noise = (
        scale * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        for rows, scale in ((12, 1), (3, 0.5), (12, 0.3))
    )
    movement = before @ turn + noise
    x = before - before.mean(dim=0)
    design = F.pad(x, (0, 1), value=1.0)  # and the intercept, which has no penalty
    errors, maps = [], []
    for strength in STRENGTHS:
        penalty = (
            strength * torch.linalg.matrix_norm(x, 2) ** 2 * torch.tensor([1.0, 1, 1, 0]).double().diag()
        )

        def solved(rows: Tensor, penalty: Tensor = penalty) -> Tensor:
            return torch.linalg.solve(
                design[rows].T @ design[rows] + penalty, design[rows].T @ movement[rows]
            )

        rows = torch.arange(12)
        left_out = torch.stack([movement[i] - design[i] @ solved(rows[rows != i]) for i in rows])
        errors.append(float(left_out.square().sum()))
        maps.append(solved(rows)[:3])
    drift, best = fit_drift(before, before + movement), errors.index(min(errors))
    torch.testing.assert_close(drift.jacobian, torch.eye(3, dtype=torch.float64) + maps[best])
    assert drift.explained == pytest.approx(1 - errors[best] / float(movement.square().sum()))


def test_sums_follow_an_affine_movement_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """G and Q carried along are those of the moved random features of the images that are gone."""
    monkeypatch.setattr(closed_form, "STRENGTHS", [1e-12])
    old, old_labels = classes_of_features(range(3), 10)
    head = RanPACHead(WIDTH, seed=3, dim=4)
    head.add(old, old_labels)
    rng = torch.Generator().manual_seed(1)
    jacobian = torch.eye(4, dtype=torch.float64) + 0.2 * torch.randn(4, 4, generator=rng, dtype=torch.float64)
    shift = torch.randn(4, generator=rng, dtype=torch.float64)
    hidden = head.random_features(old.double()) @ jacobian + shift
    new = torch.rand(50, 4, generator=rng, dtype=torch.float64)
    head.random_features = lambda features: features  # the newest task's, given in that space
    head.compensate_drift(new, new @ jacobian + shift)
    torch.testing.assert_close(head.gram.sum(dim=0), hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    wanted = hidden.T @ torch.eye(3).double()[old_labels]
    torch.testing.assert_close(head.cross.sum(dim=0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [3, 30])
def test_sums_turn_as_the_jacobian_says(images: int) -> None:
    """With few images, whose map has narrow factors, and with many."""
    rng = torch.Generator().manual_seed(1)
    before, movement, form = (
        torch.randn(rows, WIDTH, generator=rng, dtype=torch.float64) for rows in (images, images, WIDTH)
    )
    drift, form = fit_drift(before, before + movement), form @ form.T
    jacobian = drift.jacobian
    torch.testing.assert_close(drift.map_sums(form), jacobian.T @ form)
    torch.testing.assert_close(drift.map_form(form), jacobian.T @ form @ jacobian)
    torch.testing.assert_close(drift.apply(before), before @ jacobian + drift.shift)


@pytest.mark.parametrize(
    ("name", "turned", "shift", "gain"),
    [
        ("cosine", 0.1, torch.tensor([2.0, -2.0] * (WIDTH // 2)), 0.2),
        (WIDE, 0.05, 0.2, 0),
    ],
)
def test_old_classes_are_told_apart_once_features_have_moved(
    name: str, turned: float, shift: Tensor | float, gain: float
) -> None:
    """Where statistics follow a map that is fitted on the new classes alone; not where class means stay."""
    old, old_labels = classes_of_features(range(5), 30)
    new, new_labels = classes_of_features(range(5, 10), 60)
    turn = torch.eye(WIDTH) + turned * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    accuracy = {}
    for follows in (True, False):
        head = HEADS[name](IncrementalHead(WIDTH))
        head.add(old, old_labels)
        if follows:
            head.compensate_drift(new, new @ turn + shift)
        head.add(new @ turn + shift, new_labels)
        accuracy[follows] = float((head(old @ turn + shift).argmax(dim=1) == old_labels).float().mean())
    assert accuracy[True] > 0.9 and accuracy[True] >= accuracy[False] + gain
