"""Heads on a Gaussian of each class, against scipy and numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor
from torch.nn import functional as F

from models.vit.gaussians import AlignedHead, FeCAMHead, cholesky, normalised
from utils.inc_net import IncrementalHead

WIDTH = 5


def features_of(classes: range, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters of their own shapes, shuffled: features (n, d) and labels."""
    rng = np.random.default_rng(seed)
    shapes = np.random.default_rng(5).normal(size=(20, WIDTH, WIDTH))
    centres = 4 * np.random.default_rng(7).normal(size=(20, WIDTH))
    labels = rng.permutation(np.repeat(list(classes), per_class))
    features = centres[labels] + np.einsum(
        "nij,nj->ni", shapes[labels], rng.normal(size=(len(labels), WIDTH))
    )
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def trained_rows(sizes: list[int]) -> IncrementalHead:
    torch.manual_seed(0)
    rows = IncrementalHead(WIDTH)
    for classes in sizes:
        rows.grow(classes)
    return rows


def aligned(rows: IncrementalHead, epochs: int = 3, restart: bool = False, samples: int = 64) -> AlignedHead:
    return AlignedHead(WIDTH, rows, seed=3, samples=samples, epochs=epochs, lr=0.05, restart=restart)


@pytest.mark.parametrize(("alpha1", "alpha2"), [(1, 1), (1, 0), (10, 5)])
def test_fecam_is_the_mahalanobis_distance_of_shrunk_correlations(alpha1: float, alpha2: float) -> None:
    """One class after the other by numpy and scipy, with loops over the entries of a covariance."""
    features, labels = features_of(range(4), 9)
    head = FeCAMHead(WIDTH, alpha1, alpha2)
    for task in (0, 2):
        chosen = (labels >= task) & (labels < task + 2)
        head.add(features[chosen], labels[chosen])
    queries = np.random.default_rng(1).normal(size=(6, WIDTH)).astype(np.float32)
    for c in range(4):
        rows = features[labels == c].double().numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        covariance = np.cov(rows.T)
        off = [covariance[i, j] for i in range(WIDTH) for j in range(WIDTH) if i != j]
        wanted = covariance.copy()
        for i in range(WIDTH):
            for j in range(WIDTH):
                wanted[i, j] += alpha1 * np.trace(covariance) / WIDTH if i == j else alpha2 * np.mean(off)
        deviations = np.sqrt(np.diag(wanted))
        inverse = np.linalg.inv(wanted / deviations[:, None] / deviations[None, :])
        distances = [mahalanobis(x / np.linalg.norm(x), rows.mean(axis=0), inverse) ** 2 for x in queries]
        scores = head(torch.from_numpy(queries))[:, c].numpy()
        np.testing.assert_allclose(-scores, distances, rtol=1e-3)


@pytest.mark.parametrize("images", [1, 11, 13])
def test_one_image_however_often_repeated_leaves_distances_as_they_are(images: int) -> None:
    image, queries = features_of(range(1), 1)[0], features_of(range(1), 6, seed=3)[0]
    head = FeCAMHead(WIDTH)
    head.add(image.repeat(images, 1), torch.zeros(images, dtype=torch.int64))
    plain = (F.normalize(queries, dim=1) - F.normalize(image, dim=1)).square().sum(dim=1)
    torch.testing.assert_close(head(queries)[:, 0], -plain, rtol=1e-4, atol=1e-5)


def test_classes_with_one_mean_are_told_apart_by_their_correlations() -> None:
    """Two directions go together in one class and apart in the other: class means cannot see that."""
    rng = np.random.default_rng(0)

    def drawn(sign: int) -> np.ndarray:
        noise = rng.normal(size=(400, WIDTH))
        noise[:, 2] = sign * noise[:, 1] + 0.1 * noise[:, 2]
        return np.array([20.0, 0, 0, 0, 0]) + noise

    train, test = (torch.tensor(np.concatenate([drawn(1), drawn(-1)])) for _ in range(2))
    labels = torch.arange(2).repeat_interleave(400)
    head = FeCAMHead(WIDTH)
    head.add(train, labels)
    assert (head(test).argmax(dim=1) == labels).float().mean() > 0.8


def test_alignment_starts_from_the_trained_rows_and_lowers_its_loss() -> None:
    features, labels = features_of(range(4), 12)
    rows = trained_rows([4])
    still, head = aligned(rows, epochs=0), aligned(rows, epochs=1)
    for each in (still, head):
        each.add(features, labels)
    torch.testing.assert_close(still(features), rows(features).detach())
    loss = {
        name: float(F.cross_entropy(normalised(scores, torch.ones(4)), labels))
        for name, scores in (("before", rows(features).detach()), ("after", head(features)))
    }
    assert loss["after"] < loss["before"]


def test_logits_are_divided_by_the_mean_norm_of_the_tasks() -> None:
    logits = torch.tensor([[3.0, 4.0, 6.0, 8.0, 0.0]])
    expected = logits / ((5 + 10) / 2) / 0.1
    torch.testing.assert_close(normalised(logits, torch.tensor([1, 1, 2, 2, 2])), expected)


def test_drawn_features_have_the_mean_and_covariance_of_their_class() -> None:
    """The mean of a class of task t of T is scaled by 0.9 + 0.1 t / T."""
    rows = trained_rows([2, 2])
    head = aligned(rows, epochs=0, samples=40000)
    for task in (0, 2):
        head.add(*features_of(range(task, task + 2), 200))
    generator = torch.Generator().manual_seed(0)
    for label, share in ((0, 0.95), (3, 1.0)):
        drawn = head.drawn(label, generator).double()
        covariance = head.covariance(label)
        spread = covariance.diagonal().sqrt().max()
        assert (drawn.mean(dim=0) - share * head.means[label]).abs().max() < 0.03 * spread
        assert (torch.cov(drawn.T) - covariance).abs().max() < 0.05 * spread**2


@pytest.mark.parametrize("seed", range(3))
def test_a_class_with_two_images_has_a_factor_whatever_rounding_does(seed: int) -> None:
    """Stored triangles are float32: 128 features of very different spread make them indefinite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 128, generator=generator, dtype=torch.float64) * torch.logspace(0, 3, 128).double()
    covariance = torch.cov(rows.T).float().double()
    factor, size = cholesky(covariance), covariance.diagonal().mean()
    assert (factor @ factor.T - covariance).abs().max() < 1e-4 * size
    assert torch.linalg.eigvalsh(covariance).min() < -1e-6 * size  # else this tests nothing


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_covariance_that_is_not_finite_ends(value: float) -> None:
    assert cholesky(torch.full((3, 3), value, dtype=torch.float64)).shape == (3, 3)


def test_older_rows_go_on_from_where_they_are_or_from_what_was_trained() -> None:
    rows, heads = trained_rows([2]), []
    for restart in (False, True):
        heads.append(aligned(rows, restart=restart))
        heads[-1].add(*features_of(range(2), 30))
    assert torch.equal(heads[0].weight, heads[1].weight)
    rows.grow(2)
    for head in heads:
        head.epochs = 0
        head.add(*features_of(range(2, 4), 30))
    torch.testing.assert_close(heads[1].weight[:2], rows.tasks[0].weight.detach().double())
    assert not torch.allclose(heads[0].weight[:2], heads[1].weight[:2], atol=1e-3)
    assert torch.equal(heads[0].weight[2:], heads[1].weight[2:])


def test_alignment_mends_rows_that_were_trained_apart() -> None:
    """Each task's rows tell its own classes apart only; aligned ones tell all apart."""
    rows, head = IncrementalHead(WIDTH), None
    for first in (0, 3, 6):
        rows.grow(3)
        head = head or aligned(rows, epochs=20)
        features, labels = features_of(range(first, first + 3), 60)
        optimizer = torch.optim.Adam(rows.trainable(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(rows.newest(features), labels - first).backward()
            optimizer.step()
        head.add(features, labels)
    features, labels = features_of(range(9), 60, seed=1)
    right = {
        name: float((s(features).argmax(1) == labels).float().mean())
        for name, s in (("fc", rows), ("ca", head))
    }
    assert right["ca"] > right["fc"] + 0.05


@pytest.mark.parametrize("kind", ["fecam", "aligned"])
def test_statistics_follow_an_affine_movement(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.vit.closed_form.STRENGTHS", [1e-12])
    head = FeCAMHead(WIDTH) if kind == "fecam" else aligned(trained_rows([3]))
    features, labels = features_of(range(3), 20)
    head.add(features, labels)
    generator = torch.Generator().manual_seed(1)
    turn, shift = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator), 1.5
    if kind == "fecam":  # it looks at directions: those move linearly when features are rotated
        turn, shift = torch.linalg.qr(turn).Q, 0.0
    new = torch.randn(60, WIDTH, generator=generator)
    head.compensate_drift(new, new @ turn + shift)
    for label in range(3):
        moved = features[labels == label] @ turn + shift
        moved = F.normalize(moved, dim=1) if kind == "fecam" else moved
        torch.testing.assert_close(head.means[label].float(), moved.mean(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head.covariance(label).float(), torch.cov(moved.T), rtol=1e-3, atol=1e-3)
