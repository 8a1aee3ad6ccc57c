"""Closed-form classifiers and the drift of their class statistics, against independent computations."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.ranpac import FINER, FIT, HELD, RIDGES, RanPACHead
from models.vit import closed_form
from models.vit.closed_form import STRENGTHS, ClosedFormHead, PrototypeHead, fit_drift
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


REPEATED = {
    "one image repeated in every class": (torch.full((20, WIDTH), 3.0), torch.arange(20) % 4),
    "an image of each class, repeated": (
        1e6 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).repeat(10, 1),
        torch.arange(30) % 3,
    ),
    "one image a class": (torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(4)),
    "one image": (torch.full((1, WIDTH), 2.0), torch.zeros(1, dtype=torch.int64)),
    "nothing but zeros": (torch.zeros(8, WIDTH), torch.arange(8) % 2),
}


def new_head(kind: type[ClosedFormHead], dim: int) -> ClosedFormHead:
    return kind(WIDTH) if kind is PrototypeHead else kind(WIDTH, seed=3, dim=dim)


@pytest.mark.parametrize("dim", [20, 300])
@pytest.mark.parametrize("kind", [PrototypeHead, RanPACHead])
@pytest.mark.parametrize("what", REPEATED)
def test_repeated_and_single_images_are_classified_and_followed(what: str, kind: type, dim: int) -> None:
    """Singular sums, constant features, fewer images than parts: scores are numbers, also once moved."""
    features, labels = REPEATED[what]
    head = new_head(kind, dim)
    head.add(features, labels)
    assert torch.isfinite(head(features)).all()
    if what == "an image of each class, repeated":
        assert torch.equal(head(features).argmax(dim=1), labels)
    explained = head.compensate_drift(features, features + 1)
    assert 0 <= explained <= 1
    head.add(2 * features + 1, labels + len(labels.unique()))
    assert torch.isfinite(head(features + 1)).all()


def test_images_that_are_all_alike_are_taken_to_have_moved_alike() -> None:
    before = torch.ones(5, WIDTH)
    drift = fit_drift(before, before + 2)
    torch.testing.assert_close(
        drift.apply(torch.zeros(1, WIDTH).double()), torch.full((1, WIDTH), 2.0).double()
    )
    assert drift.explained == pytest.approx(1)
    assert fit_drift(before[:1], before[:1] + 2).explained == 0  # one image says nothing about another


def test_the_projection_belongs_to_the_seed() -> None:
    same, other = RanPACHead(WIDTH, seed=3, dim=8), RanPACHead(WIDTH, seed=4, dim=8)
    assert torch.equal(same.projection, RanPACHead(WIDTH, seed=3, dim=8).projection)
    assert not torch.equal(same.projection, other.projection)
    assert "projection" not in same.state_dict()


@pytest.mark.parametrize("kind", [PrototypeHead, RanPACHead])
def test_a_head_loaded_from_its_state_is_the_same_and_goes_on_the_same(kind: type) -> None:
    one = new_head(kind, 16)
    one.add(*classes_of_features(range(3), 8))
    before, _ = classes_of_features(range(3, 5), 8)
    one.compensate_drift(before, 1.1 * before + 0.3)
    other = new_head(kind, 16)
    other.load_state_dict(one.state_dict())
    for head in (one, other):
        head.add(*classes_of_features(range(3, 5), 8))
    queries = torch.randn(5, WIDTH)
    assert torch.equal(one(queries), other(queries))
    assert one(queries).shape == (5, 5)
    loaded = new_head(kind, 16)
    loaded.load_state_dict(one.state_dict())  # stopped before its calibration
    images = classes_of_features(range(3, 5), 8)
    assert torch.equal(loaded.unseen_scores(*images), one.unseen_scores(*images))


def test_a_checkpoint_of_ranpac_holds_one_triangle_of_its_sums() -> None:
    """Half of them, and not a bit is lost; a checkpoint with whole matrices is still read."""
    one = new_head(RanPACHead, 40)
    one.add(*classes_of_features(range(3), 8))
    before, _ = classes_of_features(range(3, 5), 8)
    one.compensate_drift(before, 1.1 * before + 0.3)
    state = one.state_dict()
    assert state["gram"].numel() == 40 * 41 and state["gram"].dtype == torch.float64
    for saved in (state, state | {"gram": one.gram}):
        other = new_head(RanPACHead, 40)
        other.load_state_dict(saved)
        assert torch.equal(other.gram, one.gram)


# --- drift --------------------------------------------------------------------------------------------------


def test_an_affine_movement_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "STRENGTHS", [1e-12])  # all but no ridge: exact
    rng = torch.Generator().manual_seed(1)
    before = torch.randn(200, WIDTH, generator=rng, dtype=torch.float64) + 2
    matrix = torch.eye(WIDTH, dtype=torch.float64) + 0.3 * torch.randn(
        WIDTH, WIDTH, generator=rng, dtype=torch.float64
    )
    shift = torch.randn(WIDTH, generator=rng, dtype=torch.float64)
    drift = fit_drift(before, before @ matrix + shift)
    unseen = torch.randn(10, WIDTH, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(drift.apply(unseen), unseen @ matrix + shift, atol=1e-6, rtol=1e-6)
    assert drift.explained > 0.999


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
    rng = torch.Generator().manual_seed(2)
    before = torch.randn(12, 3, generator=rng, dtype=torch.float64)
    after = before + before @ torch.randn(3, 3, generator=rng, dtype=torch.float64) * 0.5
    after = after + 0.3 * torch.randn(12, 3, generator=rng, dtype=torch.float64)
    x, movement = before - before.mean(dim=0), after - before
    ones = torch.ones(12, 1, dtype=torch.float64)
    design = torch.cat([x, ones], dim=1)
    errors, maps = [], []
    for strength in STRENGTHS:
        penalty = (
            strength * torch.linalg.matrix_norm(x, 2) ** 2 * torch.diag(torch.tensor([1.0, 1, 1, 0])).double()
        )
        error = 0.0
        for i in range(12):
            rest = torch.arange(12) != i
            solution = torch.linalg.solve(
                design[rest].T @ design[rest] + penalty, design[rest].T @ movement[rest]
            )
            error += float((movement[i] - design[i] @ solution).square().sum())
        errors.append(error)
        maps.append(torch.linalg.solve(design.T @ design + penalty, design.T @ movement)[:3])
    drift, best = fit_drift(before, after), errors.index(min(errors))
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
    torch.testing.assert_close(drift.turned(form), jacobian.T @ form)
    torch.testing.assert_close(drift.turned_form(form), jacobian.T @ form @ jacobian)
    torch.testing.assert_close(drift.apply(before), before @ jacobian + drift.shift)


def test_nothing_moved_changes_nothing() -> None:
    features, _ = classes_of_features(range(3), 4)
    drift = fit_drift(features, features)
    assert torch.equal(drift.apply(features.double()), features.double())
    assert drift.explained == 1


def test_class_means_that_follow_classify_moved_features() -> None:
    """Features shift and turn a bit: old classes are told apart if their means follow, not if they stay."""
    old, old_labels = classes_of_features(range(5), 30)
    new, new_labels = classes_of_features(range(5, 10), 60)
    turn = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    shift = torch.tensor([2.0, -2.0] * (WIDTH // 2))
    accuracy = {}
    for follows in (True, False):
        head = PrototypeHead(WIDTH)
        head.add(old, old_labels)
        if follows:
            head.compensate_drift(new, new @ turn + shift)
        head.add(new @ turn + shift, new_labels)
        accuracy[follows] = float((head(old @ turn + shift).argmax(dim=1) == old_labels).float().mean())
    assert accuracy[True] > 0.9 and accuracy[True] > accuracy[False] + 0.2


def test_random_features_that_move_a_little_are_followed_without_loss() -> None:
    """The map is fitted on the new classes alone and must not throw the old ones about."""
    old, old_labels = classes_of_features(range(5), 30)
    new, new_labels = classes_of_features(range(5, 10), 60)
    head = RanPACHead(WIDTH, seed=3, dim=200)
    head.add(old, old_labels)
    turn = torch.eye(WIDTH) + 0.05 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    head.compensate_drift(new, new @ turn + 0.2)
    head.add(new @ turn + 0.2, new_labels)
    assert float((head(old @ turn + 0.2).argmax(dim=1) == old_labels).float().mean()) > 0.9
