"""The shared-subspace experiment as a learner: what a step does, what is kept, few-shot adaptation."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import SCHEMAS
from models.base import Position
from models.shared_subspace import analysis as grid_analysis
from models.shared_subspace.evaluation import GridScores, metrics_of
from models.shared_subspace.few_shot import adapt_to, adapt_to_all, chosen_compositions
from models.shared_subspace.learner import SharedSubspace
from models.shared_subspace.tasks import GridSamples
from tests.conftest import TINY_GRIDS
from trainer import assemble, make_learner
from utils.config.loading import config_from_dict
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.runs.run_log import RunLog, read_metrics
from utils.training.random import rng

Make = Callable[..., SharedSubspace]


@pytest.fixture
def make(open_log: Callable[[RunConfig], RunLog]) -> Make:
    """A learner at the start of its task; the next one closes its record."""

    def learner(**changes: Any) -> SharedSubspace:
        config = config_from_dict(TINY_GRIDS | changes, SCHEMAS, "test").config
        made = make_learner(assemble(config, seed=1), open_log(config))
        made.begin_task(0)
        return made

    return learner


def first_batch(learner: SharedSubspace) -> Any:
    return next(iter(learner._batches(0, 0)))


def gradients(learner: SharedSubspace) -> list[torch.Tensor]:
    """Of one step's loss, before it is clipped."""
    phase = learner.training_phase()
    for part in phase.parts(first_batch(learner)):
        result = phase.observe(part)
        (result.loss * result.samples).backward()
    phase.optimizer.divide_gradients(learner.config.batch_size)
    return [tensor.clone() for tensor in phase.optimizer.gradients()]


def test_colours_are_not_chosen_among_scores_that_are_not_numbers(make: Make) -> None:
    learner = make()
    samples = learner.tasks.draw("train", 4, rng("test", 1))
    assert learner.accuracy(samples)["iou"] >= 0
    next(learner.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="scores of grids are not finite"):
        learner.accuracy(samples)


@pytest.mark.parametrize(
    "changes", [{}, {"encoder": "gru", "decoder": "deconvolution", "task_loss": "iou"}], ids=str
)
def test_five_steps_of_a_small_batch(changes: dict[str, Any], make: Make) -> None:
    """Two groups of two: everything learns, nothing is left undefined, the record has every term."""
    learner = make(batch_size=4, group_size=2, sharing_rank=1, epochs=1, **changes)
    before = {name: tensor.clone() for name, tensor in learner.model.named_parameters()}
    assert learner.train() == "best"
    moved = {
        name for name, tensor in learner.model.named_parameters() if not torch.equal(tensor, before[name])
    }
    assert moved == set(before)
    assert all(torch.isfinite(tensor).all() for tensor in learner.checkpoint_tensors().values())
    (event,) = [event for event in read_metrics(learner.log.folder) if event["event"] == "epoch"]
    terms = {
        "loss",
        "prediction",
        "sharing",
        "reconstruction",
        "l1",
        "activity",
        "silent",
        "explained",
        "naming",
    }
    assert terms | {"gradient", "alpha", "validation_iou", "fallbacks", "seconds"} <= event.keys()
    assert set(event["seconds"]) == {"step", "data"} and learner.progress.steps == 5


def test_the_loss_is_the_weighted_sum_of_its_terms(make: Make) -> None:
    learner = make(alpha=0.3, beta=0.7, gamma=0.9, sharing_rank=2)
    batch = first_batch(learner)
    result = learner._observe(batch)
    output = learner.model(batch.input, batch.program)
    error = (output.rebuilt - output.hidden).square().mean()
    l1 = output.sparse.abs().sum(dim=1).mean()
    expected = (
        F.cross_entropy(output.logits, batch.target)
        + 0.3 * learner.sharing(output.hidden, batch.primitives).loss
        + 0.7 * (error + learner.model.autoencoder.l1_weight * l1)
        + 0.9 * F.binary_cross_entropy_with_logits(output.named, batch.primitives)
    )
    torch.testing.assert_close(result.loss, expected)
    assert result.samples == 12
    sums = learner.progress.memory["sums"]
    assert sums["sharing"] == pytest.approx(
        learner.sharing(output.hidden, batch.primitives).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("key", "term"), [("alpha", "sharing"), ("beta", "reconstruction"), ("gamma", "naming")]
)
def test_a_term_without_weight_leaves_no_trace(key: str, term: str, make: Make) -> None:
    learner = make(batch_size=16, **{key: 0})
    with_term = make(batch_size=16, **{key: 0.5})
    batch = first_batch(learner)
    losses = [one._observe(batch).loss.item() for one in (learner, with_term)]
    assert losses[0] < losses[1]
    assert (term in learner.progress.memory["sums"]) == (key == "beta")  # the code is measured all the same


def test_weights_follow_their_points(make: Make) -> None:
    learner = make(alpha=[[0, 0], [0.4, 1]], gamma=[[0, 0.5], [1, 0]])
    seen = []
    for steps in (0, 3, 6, 15):
        learner.progress.steps = steps
        seen.append(learner.weights())
    assert [alpha for alpha, _, _ in seen] == pytest.approx([0, 0.5, 1, 1])
    assert [gamma for _, _, gamma in seen] == pytest.approx([0.5, 0.4, 0.3, 0])


def test_a_step_in_parts_is_the_same_step(make: Make) -> None:
    """Without the sharing loss, which compares the groups of a part."""
    whole, parts = (gradients(make(alpha=0, batch_size=16, grad_accumulation=n)) for n in (1, 3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))
    learner = make(batch_size=16, grad_accumulation=3)
    assert [len(part) for part in learner._parts(first_batch(learner))] == [8, 4, 4]  # whole groups


def test_long_gradients_are_shortened(make: Make) -> None:
    learner = make(clip_norm=0.001)
    phase = learner.training_phase()
    for parameter in learner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    phase.before_step(1)
    norm = torch.stack([parameter.grad.norm() for parameter in learner.model.parameters()]).norm().item()
    assert norm == pytest.approx(0.001, rel=1e-3)
    count = sum(parameter.numel() for parameter in learner.model.parameters())
    assert learner.progress.memory["sums"]["gradient"] == pytest.approx(math.sqrt(count), rel=1e-4)


def test_batches_are_groups_and_the_same_from_any_start(make: Make) -> None:
    learner = make()
    whole, rest = list(learner._batches(1, 0)), list(learner._batches(1, 3))
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a.target, b.target) for a, b in zip(whole[3:], rest, strict=True))
    for batch in whole:
        assert all(len(group.unique(dim=0)) == 1 for group in batch.primitives.split(4))
    assert not torch.equal(next(iter(learner._batches(2, 0))).input, whole[0].input)


def test_the_weights_of_the_best_validation_are_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make()
    values, states = iter([30.0, 50.0, 40.0]), []

    def accuracy(samples: Any) -> dict[str, float]:
        states.append(copy.deepcopy(learner.model.state_dict()))
        return {"iou": next(values), "cells": 0.0, "solved": 0.0}

    monkeypatch.setattr(learner, "accuracy", accuracy)
    learner.train()
    assert learner.progress.memory["best_iou"] == 50.0
    assert not torch.equal(learner.model.names.weight, states[1]["names.weight"])
    assert learner.return_to_best() == "few_shot"
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in learner.model.state_dict().items())
    assert learner.best == {}


def test_the_l1_weight_is_steered_once_a_step(make: Make) -> None:
    learner = make(epochs=1, grad_accumulation=3, sparse_activity=0.01)
    before = learner.model.autoencoder.l1_weight.item()
    learner.train()
    learner_steps = (
        math.log(learner.model.autoencoder.l1_weight.item() / before) / learner.model.autoencoder.RATE
    )
    assert learner_steps == pytest.approx(5, rel=1e-4)  # far above the target: a full step up each time


def test_without_an_autoencoder_the_rest_trains(make: Make) -> None:
    learner = make(sparse_units=0, epochs=1)
    learner.train()
    assert set(learner.layers(learner._validation)) == {"layer 1", "h"}
    assert "reconstruction" not in read_metrics(learner.log.folder)[-1]


def test_mixed_precision_is_near_and_losses_are_wide(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the loss is float32 and close to that in fp32, and a step moves everything to finite values."""
    monkeypatch.setattr("trainer.resolve_precision", lambda precision, device: (precision, None))
    exact, mixed = make(), make(precision="bf16")
    assert mixed.config.precision == "bf16"
    losses = [learner._observe(first_batch(learner)).loss for learner in (exact, mixed)]
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
    mixed.take_step(mixed.training_phase(), Position(), first_batch(mixed))
    assert all(torch.isfinite(tensor).all() for tensor in mixed.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot


def test_adaptation_starts_from_the_same_network_each_time(make: Make) -> None:
    learner = make(few_shot_lr=0.1)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    rows = [adapt_to(learner, number) for number in (0, 1)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
    assert [row["composition"] for row in rows] == [
        learner.tasks.describe(c) for c in chosen_compositions(learner)[:2]
    ]
    assert rows[0]["composition"] != rows[1]["composition"]
    for row in rows:
        assert (
            len(row["looks"]) == 3 and row["looks"][0] == row["before"] and row["looks"][-1] == row["after"]
        )
        assert row["all_steps"] == 4 and row["seconds"] > 0


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_adapters_learn_a_task_from_its_samples(method: str, make: Make) -> None:
    """On support and query alike the fitted adapters do better than none, and only they moved."""
    learner = make(
        few_shot_method=method, few_shot_steps=60, few_shot_every=60, few_shot_samples=32, few_shot_lr=0.05
    )
    learner.run_phase(learner.training_phase())
    learner.progress.memory["few_shot"] = []
    row = adapt_to(learner, 1)  # the first composition erases: hardly anything is left to learn
    assert row["after"] > row["before"]


@pytest.mark.parametrize(
    ("looks", "steps"), [([95.0], 0), ([10.0, 20.0, 91.0], 4), ([10.0, 20.0, 30.0], None)]
)
def test_steps_to_the_target(
    looks: list[float], steps: int | None, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make()
    values = iter(looks + 2 * [0.0])
    monkeypatch.setattr(learner, "accuracy", lambda samples: {"iou": next(values)})
    assert adapt_to(learner, 0)["steps"] == steps


def test_the_log_announces_few_shot_once_and_names_every_composition(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make()
    with caplog.at_level("INFO", logger="nested_lora"):
        adapt_to_all(learner)
    assert sum("1 epochs of 4 steps" in message for message in caplog.messages) == 1
    lines = [message for message in caplog.messages if message.startswith("few_shot Task 0, Epoch 1/1")]
    rows = learner.progress.memory["few_shot"]
    assert len(lines) == len(rows) == 2
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), start=1):
        words = f"{number} of 2: {row['composition']}: IoU {row['before']:.2f} -> {row['after']:.2f}"
        assert f"({words})" in line


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def test_metrics_are_means_of_the_rows() -> None:
    rows = [
        {"before": 10.0, "after": 50.0, "steps": None, "all_steps": 100},
        {"before": 30.0, "after": 95.0, "steps": 20, "all_steps": 100},
    ]
    zero_shot = {name: {"iou": 1.0, "solved": 2.0} for name in ("train", "held_out", "unseen")}
    measured = {
        "zero_shot": zero_shot,
        "few_shot": rows,
        "analysis": {"grassmann_shared": 0.5, "grassmann_other": None},
    }
    metrics = metrics_of(measured)
    assert metrics["few_shot_before"] == 20 and metrics["few_shot_after"] == 72.5
    assert metrics["few_shot_steps"] == 60 and metrics["few_shot_reached"] == 50
    assert metrics["unseen_iou"] == 1 and metrics["held_out_solved"] == 2
    assert metrics["grassmann_shared"] == 0.5 and metrics["grassmann_other"] is None
    assert "few_shot_steps" not in metrics_of(measured | {"few_shot": []})


def test_measures_read_the_same_samples_each_time_and_not_those_of_training(make: Make) -> None:
    learner = make()
    assert GridScores.measure(learner) == GridScores.measure(learner)
    for name, analyse in grid_analysis.ANALYSES.items():
        found, other = analyse(learner.material()), analyse(learner.material())
        assert (found.numbers, found.tables, found.text) == (other.numbers, other.tables, other.text), name
    trained = {bytes(grid) for batch in learner._batches(0, 0) for grid in batch.input.numpy().astype("u1")}
    validated = {bytes(grid) for grid in learner._validation.input.numpy()}
    assert len(trained & validated) < len(validated) / 2  # single rectangles can coincide


def test_a_perfect_model_has_no_error_and_a_copying_one_the_ious_of_copying(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make()
    monkeypatch.setattr(grid_analysis, "ANALYSES", {})
    monkeypatch.setattr(learner, "predict", lambda samples: samples.target.long())
    assert learner.accuracy(learner._validation) == {"iou": 100.0, "cells": 100.0, "solved": 100.0}
    monkeypatch.setattr(learner, "predict", lambda samples: samples.input.long())
    for line in GridScores.measure(learner)["zero_shot"].values():
        assert line["iou"] == line["copied"]


def test_layers_and_predictions_are_those_of_each_sample(make: Make) -> None:
    """In batches of any size, as the model gives them one by one."""
    learner = make(eval_batch_size=5)
    layers, colours = learner.layers(learner._validation), learner.predict(learner._validation)
    assert {name: tuple(found.shape) for name, found in layers.items()} == {
        "layer 1": (16, 4 * 4 * 8), "h": (16, 12), "z": (16, 16),
    }  # fmt: skip
    assert colours.shape == (16, 8, 8) and colours.dtype == torch.int64
    batch = learner._validation.batch(slice(13, 14))
    with torch.no_grad():
        output = learner.model(batch.input, batch.program)
    torch.testing.assert_close(layers["h"][13:14], output.hidden)
    torch.testing.assert_close(layers["z"][13:14], output.sparse)
    assert torch.equal(colours[13:14], output.logits.argmax(dim=1))


def test_layers_of_mixed_precision_are_wide(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.resolve_precision", lambda precision, device: (precision, None))
    learner = make(precision="bf16")
    for vectors in learner.layers(learner._validation).values():
        assert vectors.dtype == torch.float32 and not vectors.requires_grad and torch.isfinite(vectors).all()


def bytes_of(grids: torch.Tensor) -> set[bytes]:
    """Grids (N, 8, 8) as they can be looked up; those of a single rectangle, which can coincide, are left out."""
    return {bytes(grid) for grid in grids.numpy().astype("u1") if len(set(grid.ravel().tolist())) > 2}


def test_what_is_analysed_is_new_and_in_its_place(make: Make) -> None:
    """No grid of training, validation, tests or of another set; tasks in the order of their labels."""
    learner = make()
    material = learner.material()
    labels = learner.tasks.splits["train"].labels
    assert torch.equal(material.tasks, labels) and material.rank == 2 and material.seed == learner.seed
    for layers in (material.own, material.same):
        assert {name: tuple(found.shape) for name, found in layers.items()} == {
            "layer 1": (len(labels), 64, 128), "h": (len(labels), 64, 12), "z": (len(labels), 64, 16),
        }  # fmt: skip
    assert list(material.splits) == ["train", "held_out", "unseen"]
    sets = [material.fitted, *material.splits.values()]
    for looked in sets:
        assert {len(found) for found in (looked.colours, looked.programs, *looked.layers.values())} == {
            len(looked.samples)
        }
        for row in (0, 7):
            names = {
                material.primitives[p] for p in looked.samples.primitives[row].nonzero().flatten().tolist()
            }
            assert set(looked.programs[row].split(", ")) == names
    assert {looked.samples.primitives.sum(dim=1).max().item() for looked in sets} == {2, 3}
    known = set(map(tuple, learner.tasks.splits["held_out"].labels.tolist()))
    trained = set(map(tuple, labels.tolist()))
    assert not known & trained
    assert set(map(tuple, material.fitted.samples.primitives.bool().tolist())) <= trained
    assert set(map(tuple, material.splits["held_out"].samples.primitives.bool().tolist())) <= known
    grids = [bytes_of(looked.samples.input) for looked in sets]
    grids.append(bytes_of(torch.cat([batch.input for batch in learner._batches(0, 0)])))
    grids.append(bytes_of(learner._validation.input))
    for split in material.splits:
        grids.append(bytes_of(learner.tasks.draw(split, 200, rng("grid test", learner.seed, split)).input))
    for i, first in enumerate(grids):
        for second in grids[:i]:
            assert len(first & second) <= 0.02 * len(first)


def test_the_layers_of_tasks_are_those_of_their_samples(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row (g, i) is grid i of task g, which `layers` is made to tell: own grids of each task, the same of all."""
    learner = make()

    def layers(samples: GridSamples) -> dict[str, torch.Tensor]:
        return {"h": torch.cat([samples.primitives.float(), samples.input.flatten(1).float()], dim=1)}

    monkeypatch.setattr(learner, "layers", layers)
    material = learner.material()
    for found in (material.own["h"], material.same["h"]):
        assert torch.equal(found[:, :, :5].bool(), material.tasks[:, None].expand(-1, 64, -1))
    assert torch.equal(
        material.same["h"][:, :, 5:], material.same["h"][:1, :, 5:].expand(len(material.tasks), -1, -1)
    )
    assert not torch.equal(material.own["h"][0, :, 5:], material.own["h"][1, :, 5:])
    assert len(material.same["h"][0].unique(dim=0)) > 32


def test_the_log_has_a_dash_where_no_pair_of_tasks_is_of_a_kind(make: Make) -> None:
    """Three primitives two at a time: every two tasks have one in common."""
    learner = make(
        primitives=["rotate", "fall", "erase"],
        train_lengths=[2],
        held_out_pairs=1,
        few_shot_tasks=0,
        test_compositions=4,
    )
    assert learner.analyse() == "done"
    scores = GridScores()
    scores.add(scores.measure(learner))
    (line,) = [line for line in scores.lines(learner.summary()) if line.startswith("Subspaces")]
    assert ", - between others, " in line
    assert scores.result(learner.summary())["metrics"]["grassmann_other"] is None


def test_several_processes_are_refused(tmp_path: Path) -> None:
    from utils.training.distributed import World

    config = config_from_dict(TINY_GRIDS, SCHEMAS, "test").config
    with pytest.raises(UserError, match="trains in one process, and there are 2"):
        assemble(config, 1, World(rank=0, size=2))
