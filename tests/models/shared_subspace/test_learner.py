"""The shared-subspace experiment as a learner: what a training step does, what is recorded and kept."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import SCHEMAS
from models.base import RunContext
from models.saved.learner import make_learner
from models.shared_subspace.learner import SharedSubspace, TrainingPhase
from models.shared_subspace.tasks import GridSamples
from tests.conftest import TINY_GRIDS, events
from tests.models.shared_subspace.conftest import Make
from utils.config.loading import config_from_dict
from utils.errors import UserError
from utils.training.distributed import DistributedContext
from utils.training.phase import PhaseProgress


def first_batch(learner: SharedSubspace) -> GridSamples:
    return next(iter(TrainingPhase(learner).batches(0, 0)))


def gradients(learner: SharedSubspace) -> list[torch.Tensor]:
    """Of one step's loss, before it is clipped."""
    phase = TrainingPhase(learner)
    for part in phase.micro_batches(first_batch(learner)):
        result = phase.loss(part)
        (result.loss * result.samples).backward()
    phase.optimizer.divide_gradients(learner.config.batch_size)
    return phase.optimizer.gradients()


def train(learner: SharedSubspace) -> dict[str, Any]:
    """Run the training phase; the event of its last epoch."""
    learner.run_phase(TrainingPhase(learner))
    return events(learner, "epoch")[-1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder": "gru", "decoder": "deconvolution", "task_loss": "iou"}, {"sparse_units": 0}],
    ids=str,
)
def test_five_steps_of_a_small_batch(changes: dict[str, Any], make: Make) -> None:
    """Two groups of two: everything moves, nothing is left undefined, the record has every term."""
    learner = make(batch_size=4, group_size=2, sharing_rank=1, epochs=1, **changes)
    before = copy.deepcopy(dict(learner.model.named_parameters()))
    event = train(learner)
    assert not [name for name, p in learner.model.named_parameters() if torch.equal(p, before[name])]
    assert all(torch.isfinite(tensor).all() for tensor in learner.learned_tensors().values())
    terms = {"loss", "prediction", "sharing", "auxiliary", "gradient", "fallbacks", "validation_iou", "alpha"}
    sparse = {"reconstruction", "l1", "active_fraction", "dead_fraction", "explained"}
    assert terms <= event.keys() and sparse & event.keys() == (set() if "sparse_units" in changes else sparse)
    assert set(event["seconds"]) == {"step", "data"} and learner.progress.steps == 5


@pytest.mark.parametrize("weights", [(0.3, 0.7, 0.9), (0, 0.7, 0.9), (0.3, 0, 0.9), (0.3, 0.7, 0)], ids=str)
def test_the_loss_is_the_weighted_sum_of_its_terms(weights: tuple[float, ...], make: Make) -> None:
    """A term without weight is not made; the sparse code is measured all the same."""
    alpha, beta, gamma = weights
    learner = make(alpha=alpha, beta=beta, gamma=gamma)
    batch = first_batch(learner)
    result = TrainingPhase(learner).loss(batch)
    output = learner.model(batch.input, batch.program)
    sharing = learner.sharing(output.hidden, batch.primitives).loss
    error = (output.reconstruction - output.hidden).square().mean()
    l1 = output.latents.abs().sum(dim=1).mean()
    expected = (
        F.cross_entropy(output.logits, batch.target.long())
        + alpha * sharing
        + beta * (error + learner.model.autoencoder.l1_weight * l1)
        + gamma * F.binary_cross_entropy_with_logits(output.primitive_logits, batch.primitives.float())
    )
    torch.testing.assert_close(result.loss, expected)
    assert result.samples == 12
    made = {"sharing": bool(alpha), "reconstruction": True, "auxiliary": bool(gamma)}
    assert {term: term in learner.method_state["sums"] for term in made} == made


@pytest.mark.parametrize("parts", [1, 3])
def test_the_record_has_the_mean_of_a_term_over_the_steps_that_had_it(parts: int, make: Make) -> None:
    """Two of the epoch's five steps have a sharing loss; parts of a step count by their samples."""
    learner, seen = make(epochs=1, alpha=[[0.5, 0], [0.55, 1]], batch_size=24, grad_accumulation=parts), []
    learner.sharing.register_forward_hook(
        lambda module, given, terms: seen.append((terms.loss.item(), len(given[0])))
    )
    event = train(learner)
    assert sum(samples for _, samples in seen) == 2 * 24
    mean = sum(loss * samples for loss, samples in seen) / (2 * 24)
    assert event["sharing"] == pytest.approx(mean, rel=1e-5)


def test_weights_are_straight_lines_between_points(make: Make) -> None:
    learner = make(alpha=[[0.2, 0], [0.4, 1]], beta=0.3, gamma=[[0, 0.5], [1, 0]])
    seen = []
    for steps in (0, 3, 4.5, 6, 15):
        learner.progress.steps = steps
        seen.append(TrainingPhase(learner).term_weights())
    assert [weights["alpha"] for weights in seen] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [weights["beta"] for weights in seen] == [0.3] * 5
    assert [weights["gamma"] for weights in seen] == pytest.approx([0.5, 0.4, 0.35, 0.3, 0])


def test_a_step_in_parts_is_the_same_step(make: Make) -> None:
    """Without the sharing loss, which compares the groups of a part."""
    whole, parts = (gradients(make(alpha=0, batch_size=16, grad_accumulation=n)) for n in (1, 3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))
    learner = make(alpha=0, batch_size=16, grad_accumulation=3)
    parts = TrainingPhase(learner).micro_batches(first_batch(learner))
    assert [len(part) for part in parts] == [8, 4, 4]  # whole groups


def test_runs_whose_steps_are_cut_into_other_parts_are_other_experiments(make: Make) -> None:
    """The sharing loss compares the groups of a part, so a step in parts has another gradient."""
    whole, parts = (make(alpha=1, batch_size=16, grad_accumulation=n) for n in (1, 2))
    assert not all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(whole), gradients(parts), strict=True)
    )
    assert whole.config.differing(parts.config) == {"grad_accumulation": (1, 2)}


def test_long_gradients_are_shortened(make: Make) -> None:
    learner = make(clip_norm=0.001)
    parameters = list(learner.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    TrainingPhase(learner).before_step(1)
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item()
    assert norm == pytest.approx(0.001, rel=1e-3)
    count = sum(parameter.numel() for parameter in parameters)
    assert learner.method_state["sums"]["gradient"][0] == pytest.approx(math.sqrt(count), rel=1e-4)


def test_batches_are_groups_and_the_same_from_any_start(make: Make) -> None:
    phase = TrainingPhase(make())
    whole, rest, other = (list(phase.batches(epoch, start)) for epoch, start in ((1, 0), (1, 3), (2, 0)))
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a.target, b.target) for a, b in zip(whole[3:], rest, strict=True))
    for batch in whole:
        assert all(len(group.unique(dim=0)) == 1 for group in batch.primitives.split(4))
    assert not torch.equal(other[0].input, whole[0].input)


def test_the_weights_of_the_best_validation_are_loaded(make: Make) -> None:
    learner = make()
    values, states = iter([30.0, 50.0, 40.0]), []

    class Recorder:
        def accuracy(self, samples: GridSamples) -> dict[str, float]:
            states.append(copy.deepcopy(learner.model.state_dict()))
            return {"iou": next(values)}

    learner.evaluator = Recorder()
    train(learner)
    assert learner.method_state["best_iou"] == 50.0
    assert not torch.equal(learner.model.primitive_head.weight, states[1]["primitive_head.weight"])
    learner.load_best()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in learner.model.state_dict().items())
    assert learner.method_tensors == {}


def test_the_l1_weight_is_updated_once_per_step(make: Make) -> None:
    learner = make(epochs=1, alpha=0, grad_accumulation=3, sparse_activity=0.01)
    autoencoder = learner.model.autoencoder
    before = autoencoder.l1_weight.item()
    train(learner)
    updates = math.log(autoencoder.l1_weight.item() / before) / autoencoder.RATE
    assert updates == pytest.approx(5, rel=1e-4)  # far above the target: a full step up each time


def test_the_l1_weight_waits_for_a_positive_beta(make: Make) -> None:
    """Raised while nothing penalises activity, it would then kill every unit at once."""
    learner = make(epochs=1, beta=[[0.5, 0], [0.6, 1]], sparse_activity=0.01)  # positive in 2 of 5 steps
    autoencoder = learner.model.autoencoder
    before = autoencoder.l1_weight.item()
    train(learner)
    updates = math.log(autoencoder.l1_weight.item() / before) / autoencoder.RATE
    assert updates == pytest.approx(2, rel=1e-4)


def test_mixed_precision_is_near_and_losses_and_layers_are_float32(make: Make) -> None:
    exact, mixed = make(), make(precision="bf16")
    losses = [TrainingPhase(one).loss(first_batch(one)).loss for one in (exact, mixed)]
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
    mixed.take_step(TrainingPhase(mixed), PhaseProgress(), first_batch(mixed))
    assert all(torch.isfinite(tensor).all() for tensor in mixed.model.parameters())
    for vectors in mixed.evaluator.representations(mixed.validation).values():
        assert vectors.dtype == torch.float32 and not vectors.requires_grad and torch.isfinite(vectors).all()


@pytest.mark.parametrize(("weight", "part"), [("beta", "autoencoder"), ("gamma", "primitive_head")])
def test_a_part_without_a_loss_is_stored_and_not_trained(weight: str, part: str, make: Make) -> None:
    learner = make(**{weight: 0}, weight_decay=0.0, epochs=1)
    counts, before = learner.parameter_counts(), copy.deepcopy(dict(learner.model.named_parameters()))
    train(learner)
    moved = [p.numel() for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])]
    assert counts["trained"] == sum(moved) == counts["stored"] - counts[part] < counts["stored"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"train_lengths": [1], "test_length": 2}, ["sharing loss is always 0"]),
        ({"train_lengths": [1], "test_length": 2, "alpha": 0}, []),
        ({"train_lengths": [2], "primitives": ["rotate", "shift", "fall"]}, ["always 0", "has shift"]),
    ],
    ids=str,
)
def test_what_training_lacks_is_a_warning(changes: dict[str, Any], words: list[str], make: Make) -> None:
    warnings = make(few_shot_tasks=0, **changes).context.warnings
    assert len(warnings) == len(words)
    assert all(part in warning for part, warning in zip(words, warnings, strict=True))


def test_warnings_of_a_seed_are_not_repeated_by_the_next() -> None:
    values = TINY_GRIDS | {"train_lengths": [1], "test_length": 2}
    config = config_from_dict(values, SCHEMAS, "test").config
    context = RunContext(torch.device("cpu"))
    learners = [make_learner(config.model_copy(update={"seed": seed}), context) for seed in (1, 2)]
    assert [len(learner.context.warnings) for learner in learners] == [1, 1]


def test_several_processes_are_refused() -> None:
    config = config_from_dict(TINY_GRIDS, SCHEMAS, "test").config
    with pytest.raises(UserError, match="trains in one process, and there are 2"):
        SharedSubspace(config, RunContext(torch.device("cpu"), distributed=DistributedContext(0, 2)))
