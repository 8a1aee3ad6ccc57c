"""Evaluation on grids: accuracy, representations, zero-shot rows, metrics, and the inputs of the analyses."""

from dataclasses import dataclass

import pytest
import torch

from models.shared_subspace.analysis import ANALYSES, AnalysisInputs, analysis_inputs
from models.shared_subspace.evaluation import SPLIT_NAMES, Evaluator, log_lines, run_metrics, zero_shot
from models.shared_subspace.learner import SharedSubspace, TrainingPhase
from models.shared_subspace.tasks import GridSamples
from tests.models.shared_subspace.conftest import Make
from utils.errors import UserError
from utils.training.random import rng


@dataclass(frozen=True)
class FixedEvaluator(Evaluator):
    """A network that gives its input or its target back; its only layer holds labels and inputs."""

    attribute: str = "target"

    def predict(self, samples: GridSamples) -> torch.Tensor:
        return getattr(samples, self.attribute).long()

    def representations(self, samples: GridSamples) -> dict[str, torch.Tensor]:
        return {"h": torch.cat([samples.primitives.float(), samples.input.flatten(1).float()], dim=1)}


def test_colours_are_not_chosen_among_scores_that_are_not_finite(make: Make) -> None:
    learner = make()
    assert learner.evaluator.accuracy(learner.validation)["iou"] >= 0
    next(learner.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="scores of grids are not finite"):
        learner.evaluator.accuracy(learner.validation)


def test_a_perfect_model_has_no_error_and_a_copying_one_the_iou_of_the_input(make: Make) -> None:
    learner = make()
    perfect, copying = (FixedEvaluator(learner.model, learner.config, name) for name in ("target", "input"))
    assert perfect.accuracy(learner.validation) == {"iou": 100.0, "cells": 100.0, "solved": 100.0}
    for row in zero_shot(copying, learner.tasks).values():
        assert row["iou"] == row["copied"] < 100


def test_representations_and_predictions_are_those_of_each_sample(make: Make) -> None:
    """In batches of any size, as the model gives them one by one."""
    learner = make(eval_batch_size=5)
    layers = learner.evaluator.representations(learner.validation)
    colours = learner.evaluator.predict(learner.validation)
    assert {name: tuple(found.shape) for name, found in layers.items()} == {
        "layer 1": (16, 4 * 4 * 8), "h": (16, 12), "z": (16, 16),
    }  # fmt: skip
    assert colours.shape == (16, 8, 8) and colours.dtype == torch.int64
    sample = learner.validation.select([13])
    with torch.no_grad():
        output = learner.model(sample.input, sample.program)
    torch.testing.assert_close(layers["h"][13:14], output.hidden)
    torch.testing.assert_close(layers["z"][13:14], output.latents)
    assert torch.equal(colours[13:14], output.logits.argmax(dim=1))


def test_metrics_are_means_of_the_rows() -> None:
    rows = [
        {"before": 10.0, "after": 50.0, "steps": None, "all_steps": 100},
        {"before": 30.0, "after": 95.0, "steps": 20, "all_steps": 100},
    ]
    evaluation = {
        "zero_shot": {name: {"iou": 1.0, "solved": 2.0} for name in SPLIT_NAMES},
        "few_shot": rows,
        "analysis": {"grassmann_shared": 0.5, "grassmann_other": None},
    }
    metrics = run_metrics(evaluation)
    assert metrics["few_shot_before"] == 20 and metrics["few_shot_after"] == 72.5
    assert metrics["few_shot_steps"] == 60 and metrics["few_shot_reached"] == 50
    assert metrics["unseen_iou"] == 1 and metrics["held_out_solved"] == 2
    assert metrics["grassmann_shared"] == 0.5 and metrics["grassmann_other"] is None
    assert "few_shot_steps" not in run_metrics(evaluation | {"few_shot": []})


def test_the_log_has_a_dash_where_no_pair_of_tasks_is_of_a_kind() -> None:
    metrics = {"grassmann_shared": 0.5, "grassmann_other": None, "grassmann_chance": 1.25}
    evaluation = {"zero_shot": {"unseen": {"iou": 1.0, "solved": 2.0}}, "analysis": metrics}
    assert any("0.500" in line and ", - between others, 1.250" in line for line in log_lines(evaluation))


# --- inputs of the analyses ---------------------------------------------------------------------------------


def fixed_inputs(learner: SharedSubspace, rank: int = 2) -> AnalysisInputs:
    config = learner.config.model_copy(update={"sharing_rank": rank})
    return analysis_inputs(FixedEvaluator(learner.model, config), learner.tasks)


def test_rows_of_layers_are_those_of_their_task_and_grid(make: Make) -> None:
    """Row (g, i) is grid i of task g: own grids of each task, or the same of all."""
    learner = make()
    inputs = fixed_inputs(learner)
    assert torch.equal(inputs.tasks, learner.tasks.splits["train"].labels)
    own, same = inputs.by_task["h"], inputs.same_grids["h"]
    for layer in (own, same):
        assert layer.shape == (len(inputs.tasks), 64, 5 + 64)
        assert torch.equal(layer[:, :, :5].bool(), inputs.tasks[:, None].expand(-1, 64, -1))
    assert torch.equal(same[:, :, 5:], same[:1, :, 5:].expand(len(inputs.tasks), -1, -1))
    assert not torch.equal(own[0, :, 5:], own[1, :, 5:]) and len(same[0].unique(dim=0)) > 32


def test_tasks_have_enough_samples_for_subspaces_of_any_dimension(make: Make) -> None:
    metrics = ANALYSES["grassmann"](fixed_inputs(make(), rank=64)).numbers["metrics"]
    assert metrics["grassmann_shared"] is not None


def grids_of(grids: torch.Tensor) -> set[bytes]:
    """Grids (N, 8, 8) as they can be looked up, without those of a single rectangle, which can coincide."""
    return {bytes(grid) for grid in grids.numpy().astype("u1") if len(set(grid.ravel().tolist())) > 2}


def test_sets_of_samples_have_their_compositions_and_no_grid_in_common(make: Make) -> None:
    """Training, validation, tests and every set of the analyses."""
    learner = make()
    inputs = fixed_inputs(learner)
    known = {name: set(map(tuple, split.labels.tolist())) for name, split in learner.tasks.splits.items()}
    sets = {"fitted": inputs.fitted, **inputs.splits}
    assert list(inputs.splits) == list(SPLIT_NAMES)
    for name, outputs in sets.items():
        labels = outputs.samples.primitives
        assert len(labels) == len(outputs.colours) == len(outputs.programs) == len(outputs.layers["h"])
        assert set(map(tuple, labels.tolist())) <= known["train" if name == "fitted" else name]
        for label, program in zip(labels[:8], outputs.programs, strict=False):
            assert {inputs.primitives[i] for i in label.nonzero().flatten()} == set(program.split(", "))
    grids = [grids_of(outputs.samples.input) for outputs in sets.values()]
    grids.append(grids_of(torch.cat([batch.input for batch in TrainingPhase(learner).batches(0, 0)])))
    grids.append(grids_of(learner.validation.input))
    tested = (learner.tasks.draw(name, 200, rng("grid test", 1, name)) for name in SPLIT_NAMES)
    grids += [grids_of(samples.input) for samples in tested]
    for i, first in enumerate(grids):
        assert all(len(first & second) <= 0.02 * len(first) for second in grids[:i])
