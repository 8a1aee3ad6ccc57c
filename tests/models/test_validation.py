"""Runs that are measured on held-out training images, and test images that are read only when asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as evaluation
import main
from models import SCHEMAS
from models.saved.learner import load_learner, task_checkpoints
from tests.conftest import TINY, command, folder_of
from tests.utils.sweeps.test_spec import problems
from utils.config.loading import config_from_dict
from utils.data.synthetic import synthetic_arrays
from utils.errors import UserError
from utils.reports.results import FinishedRun, Results
from utils.reports.sentences import facts, reading_notes
from utils.runs.folder import TEST_RESULT
from utils.runs.manifest import Provenance
from utils.runs.run_log import read_metrics

SHARE = {"validation_share": 0.2, "max_tasks": 2}


def train(logs: Path, **changes: Any) -> Path:
    """The folder of a finished run on the generated images, whose file holds no usable test images."""
    names, arrays = synthetic_arrays()
    data = logs / "set.npz"
    np.savez(data, **arrays | {"x_test": np.zeros(3), "class_names": np.array(names)})
    values = TINY | SHARE | {"dataset": str(data), "expansion": "never", **changes}
    assert main.main(command("smoke.json", logs, **values)) == 0
    return folder_of(logs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("validation"))


def mend(folder: Path) -> None:
    """Put the test images where `train` left them out."""
    names, arrays = synthetic_arrays()
    path = Path(json.loads((folder / "config.json").read_text())["dataset"])
    np.savez(path, **arrays, class_names=np.array(names))


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_every_number_of_the_record_says_that_it_is_of_validation_images(run: Path) -> None:
    result, log = result_of(run), run.with_name(f"{run.name}.log").read_text()
    named = [key for key in result["metrics"] if key != "expansions"]
    assert named and all(key.startswith("validation_") for key in named)
    assert not {"accuracy", "curve"} & result.keys() and len(result["validation_curve"]) == 2
    assert (result["calibration"]["fitted_on"], result["calibration"]["images"]) == ("validation", 32)
    assert not (run / "accuracy.csv").exists() and (run / "validation_accuracy.csv").read_text()
    events = [event for event in read_metrics(run) if event["event"] == "task"]
    assert not any({"accuracy", "total"} & event.keys() for event in events)
    measured = [line for line in log.splitlines() if "accuracy" in line.lower() and "Train_accy" not in line]
    assert len(measured) > 4 and all("validation" in line.lower() for line in measured)
    assert "validation 32 images, 8 per class; test images are not read" in log
    assert "eval.py --run" in log and "--test" in log  # how it goes on


def test_test_images_are_read_when_they_are_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "result.json").read_bytes()
    assert evaluation.main(["--run", str(run), "--test"]) == 2 and "x_test" in capsys.readouterr().err
    assert not (run / TEST_RESULT).exists()
    mend(run)
    assert evaluation.main(["--run", str(run), "--test"]) == 0
    tested = json.loads((run / TEST_RESULT).read_text())
    assert (run / "result.json").read_bytes() == before and "test images" in capsys.readouterr().out
    learner, rows = load_learner(task_checkpoints(run)[-1]), tested["accuracy"]
    for task, percent in enumerate(rows[-1]):
        classes = learner.data.task_classes(task)
        images, targets = next(learner.data.batches(classes, source="test", batch_size=99))
        with torch.no_grad():
            found = learner.classify(learner.features(images)).argmax(1)
        assert percent == pytest.approx(100 * float((found == targets).float().mean()))
    assert tested["metrics"]["final"] == pytest.approx(tested["curve"][-1]) and len(rows) == 2


def test_a_checkpoint_belongs_to_its_validation_images(tmp_path: Path) -> None:
    checkpoint = task_checkpoints(train(tmp_path, max_tasks=1, func_epoch=0, rd_epoch=0))[-1]
    learner, (names, arrays) = load_learner(checkpoint), synthetic_arrays()
    arrays["x_train"][learner.data.indices(learner.data.task_classes(0), "validation")[0]] ^= 1
    np.savez(tmp_path / "set.npz", **arrays, class_names=np.array(names))
    with pytest.raises(UserError, match="validation images of task 0, which it has read, have changed"):
        load_learner(checkpoint)


def test_cells_measured_on_validation_and_on_test_images_are_not_one_sweep(tmp_path: Path) -> None:
    (fault,) = problems(tmp_path, cells={"a": {}, "b": {"validation_share": 0.1}})
    assert 'validation_final: cell "b"' in fault and "different metrics" in fault


def test_a_report_ranks_by_validation_numbers_and_says_so() -> None:
    values = {"model_name": "simplecil", "dataset": "synthetic", "init_cls": 2, "increment": 2}
    config = config_from_dict(values | {"validation_share": 0.1}, SCHEMAS, "test").config

    def finished(final: float) -> FinishedRun:
        metrics = {spec.key: final for spec in config.metrics if not spec.per_task}
        parts = {"metrics": metrics, "validation_curve": [final], "parameters": {}, "weights": {}, "cost": {}}
        return FinishedRun(Path("run"), config, {"seed": 1, **parts}, Provenance({}), {})

    results = Results({"a": {1: finished(50.0)}, "b": {1: finished(60.0)}}, config.metrics)
    assert results.best(results.main.key) == {"b"}
    assert ("Best mean validation A_N", "b, 60.00 (n = 1)") in facts(results, {})
    assert any("No test image was read" in note for note in reading_notes(results))
