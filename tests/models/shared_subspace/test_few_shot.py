"""Few-shot adaptation: every task starts from the same network, adapters learn, rows say how fast."""

import copy

import pytest
import torch

from models.shared_subspace.few_shot import few_shot_row, few_shot_task
from models.shared_subspace.learner import TrainingPhase
from tests.models.shared_subspace.conftest import Make


def test_every_task_has_another_composition_and_starts_from_the_same_network(make: Make) -> None:
    learner = make(few_shot_lr=0.1)
    before = copy.deepcopy(learner.model.state_dict())
    learner.adapt()
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
    rows = learner.method_state["few_shot"]
    tasks = [few_shot_task(learner.tasks, learner.config, number) for number in (0, 1)]
    assert [row["composition"] for row in rows] == [task.composition for task in tasks]
    assert len({task.composition for task in tasks}) == 2
    for task, row in zip(tasks, rows, strict=True):
        assert len(row["looks"]) == 3 and row["all_steps"] == 4 and row["seconds"] > 0
        assert row["before"] == row["looks"][0] == learner.evaluator.accuracy(task.query)["iou"]
        assert row["after"] == row["looks"][-1]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_adapters_learn_a_task_from_its_samples(method: str, make: Make) -> None:
    steps = {"few_shot_steps": 60, "few_shot_every": 60}
    learner = make(few_shot_method=method, few_shot_samples=32, few_shot_lr=0.05, **steps)
    learner.run_phase(TrainingPhase(learner))
    learner.adapt()
    row = learner.method_state["few_shot"][1]  # the first composition erases nearly all
    assert row["after"] > row["before"] + 10


@pytest.mark.parametrize(
    ("values", "steps", "seconds"),
    [
        ([95.0, 0.0], 0, 0.0),
        ([10.0, 20.0, 91.0, 95.0], 4, 2.0),
        ([10.0, 20.0, 30.0, 90.0], 5, 3.0),
        ([10.0, 20.0, 30.0], None, 2.0),
    ],
)
def test_steps_and_seconds_to_the_target(
    values: list[float], steps: int | None, seconds: float, make: Make
) -> None:
    learner = make(few_shot_steps=5, few_shot_every=2)
    history = {"iou": values, "seconds": [float(i) for i in range(len(values))]}
    row = few_shot_row(few_shot_task(learner.tasks, learner.config, 0), history, learner.config)
    assert (row["steps"], row["seconds"]) == (steps, seconds)
    assert (row["before"], row["after"], row["looks"]) == (values[0], values[-1], values)


@pytest.mark.parametrize(("every", "tests"), [(2, 4), (3, 3), (9, 2)])
def test_the_last_step_is_tested(every: int, tests: int, make: Make) -> None:
    learner = make(few_shot_steps=5, few_shot_every=every, few_shot_tasks=1)
    learner.adapt()
    (row,) = learner.method_state["few_shot"]
    assert len(row["looks"]) == tests
