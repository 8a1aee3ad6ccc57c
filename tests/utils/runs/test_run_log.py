"""utils.runs.run_log: nothing of a run's record is overwritten, torn or shared between seeds."""

import csv
import json
import logging
import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm

from utils.console import attach_console
from utils.errors import Interrupted, UserError
from utils.plotting import titled_figure
from utils.runs.metric_views import scalars
from utils.runs.metrics import AccuracyMatrix
from utils.runs.run_log import RunLog, read_metrics
from utils.runs.tables import matrix_frame

logger = logging.getLogger("nested_lora")


@pytest.fixture(autouse=True)
def no_handler_stays():
    before = list(logger.handlers)
    yield
    assert logger.handlers == before


def create(folder, overwrite=False, **config):
    return RunLog.create(folder, config=config, overwrite=overwrite)


def drawn(folder) -> dict[str, list[tuple[int, float]]]:
    """tag -> [(step, value)] of a TensorBoard folder."""
    events = EventAccumulator(str(folder / "tb")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- folder and text log ---


def test_create_writes_config_and_a_log_beside_the_folder(tmp_path, capsys):
    with create(tmp_path / "a" / "run_1.tag", lr=0.1) as run:
        logger.info("hello %d", 7)
    assert json.loads((run.folder / "config.json").read_text()) == {"lr": 0.1}
    assert run.log_path == tmp_path / "a" / "run_1.tag.log"
    line = run.log_path.read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]+  hello 7\n", line)
    assert capsys.readouterr().out == line.split(" ", 1)[1]  # the console's clock has no date
    logger.warning("after the run")
    assert run.log_path.read_text() == line


def test_an_existing_run_is_never_overwritten(tmp_path):
    with create(tmp_path / "run", lr=1) as first:
        first.metric("epoch", loss=1.0)
        first.result({"seed": 1})
    with create(tmp_path / "run", lr=2) as second:
        pass
    (tmp_path / "run_3.log").write_text("a text log without its folder")
    with create(tmp_path / "run", lr=3) as third:
        pass
    assert [run.folder.name for run in (first, second, third)] == ["run", "run_2", "run_4"]
    assert [run.log_path.name for run in (first, second, third)] == ["run.log", "run_2.log", "run_4.log"]
    assert (tmp_path / "run_3.log").read_text() == "a text log without its folder"
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 1}
    assert len(read_metrics(tmp_path / "run")) == 1
    log = third.log_path.read_text()
    assert f"python main.py --resume {tmp_path / 'run_2'}" in log  # unfinished
    assert not re.search(rf"--resume {tmp_path / 'run'}\n", log)  # finished


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("the loss is not finite"), ["ERROR: the loss is not finite"]),
        (OSError(28, "No space left on device", "x"), ["ERROR: x: No space left", "free some space"]),
        (RuntimeError("a bug"), ["Traceback", "RuntimeError: a bug"]),
        (Interrupted(), []),
    ],
)
def test_the_text_log_ends_with_what_a_run_failed_of(tmp_path, capsys, error, words):
    """The console has it from the command, on standard error."""
    with pytest.raises(type(error)), create(tmp_path / "run") as run:
        run.metric("epoch", loss=1.0)
        raise error
    log = run.log_path.read_text()
    assert all(word in log for word in words) and ("ERROR" in log) == bool(words)
    assert "ERROR" not in capsys.readouterr().out


def test_a_place_that_is_taken_or_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not overwritten"):
        create(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()
    with pytest.raises(UserError, match="cannot create .*a file stands where a folder is needed"):
        create(tmp_path / "thesis" / "chapter.txt" / "run")


def test_console_is_attached_once_and_keeps_progress_bars_whole(tmp_path, capsys):
    console = attach_console()
    try:
        assert attach_console() is None
        with create(tmp_path / "run"), tqdm(total=2, leave=False) as bar:
            bar.update()
            logger.info("between")
        logger.info("still shown")
    finally:
        logger.removeHandler(console)
    out, err = capsys.readouterr()
    assert out.count("  between\n") == 1 and out.endswith("  still shown\n") and "1/2" in err


# --- events ---


def test_lines_and_files_are_plain_json(tmp_path):
    lr = {"fast": np.float32(0.5), 9: -np.inf}
    accuracy, total = np.array([1.0, np.inf]), torch.tensor(0.25)
    with create(tmp_path / "run") as run:
        run.metric("epoch", loss=float("nan"), lr=lr, block=None, ok=np.bool_(True))
        run.metric("task", accuracy=accuracy, total=total, n=np.int64(3), classes=range(2))
        run.manifest({"device": "cpu", "path": tmp_path})
        run.result({"final": 1.0, "bad": float("inf")})
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()  # readable while the run is open
    epoch, task = map(json.loads, lines)
    lrs = {"fast": 0.5, "9": None}
    assert epoch == {"event": "epoch", "loss": None, "lr": lrs, "block": None, "ok": True}
    assert task == {"event": "task", "accuracy": [1.0, None], "total": 0.25, "n": 3, "classes": [0, 1]}
    assert json.loads((run.folder / "result.json").read_text()) == {"final": 1.0, "bad": None}
    assert json.loads((run.folder / "manifest.json").read_text()) == {"device": "cpu", "path": str(tmp_path)}


def test_every_torn_last_line_is_left_out(tmp_path):
    with create(tmp_path / "run") as run:
        for i in range(3):
            run.metric("epoch", epoch=i)
    path = run.folder / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        finished = whole[:size].count(b"\n")
        assert [event["epoch"] for event in read_metrics(run.folder)] == list(range(finished))


def test_reopen_continues_exactly_where_the_checkpoint_was(tmp_path):
    with create(tmp_path / "run") as run:
        assert run.metrics_bytes == 0
        logger.info("before")
        run.metric("epoch", phase="func", loss=1.0)
        run.metric("epoch", phase="func", loss=0.5)
        offset = run.metrics_bytes
        run.metric("epoch", phase="func", loss=99.0)
        run.metric("growth", block=9, adapters=2, z=3.0)
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "torn')
    with RunLog.reopen(run.folder, offset) as run:
        logger.info("after")
        run.metric("epoch", phase="func", loss=0.25)
    assert [event["loss"] for event in read_metrics(run.folder)] == [1.0, 0.5, 0.25]
    assert drawn(run.folder) == {"epoch/func/loss": [(0, 1.0), (1, 0.5), (2, 0.25)]}
    log = run.log_path.read_text()
    assert "before" in log and "after" in log
    with RunLog.reopen(run.folder, 0):
        pass
    assert read_metrics(run.folder) == []


def test_reopen_refuses_what_does_not_fit(tmp_path):
    with create(tmp_path / "run") as run:
        run.metric("epoch", loss=1.0)
        size = run.metrics_bytes
    for offset in (size + 1, size - 1, -1):
        with pytest.raises(UserError, match="does not fit the checkpoint"):
            RunLog.reopen(run.folder, offset)
    assert len(read_metrics(run.folder)) == 1


def test_tensorboard_has_tasks_as_steps_hyper_parameters_and_figures(tmp_path):
    """Losses stand over the training steps of the whole run; a record that is opened again shows the same."""
    with create(tmp_path / "run", lr=0.1, head="fc", layers=[1, 2], none=None) as run:
        for task, steps in enumerate((10, 20)):
            for done in (steps // 2, steps):
                run.metric("epoch", task=task, phase="func", epoch=1, steps_in_task=done, loss=float(done))
            run.metric("norms", task=task, block=1, adapter=0, slow=2.0)
            run.metric("task", task=task, total=90.0 - task)
        size = run.metrics_bytes
    figure = tmp_path / "norms.png"
    titled_figure(3, 3, "norms", "of a run").savefig(figure)
    with RunLog.reopen(tmp_path / "run", size) as run:
        run.show_result({"final": 89.0, "forgetting": None}, [figure])
    shown = drawn(run.folder)
    assert shown["epoch/func/loss"] == [(5, 5.0), (10, 10.0), (20, 10.0), (30, 20.0)]
    assert shown["task/total"] == [(0, 90.0), (1, 89.0)] and [s for s, _ in shown["result/final"]] == [0]
    assert [step for step, _ in shown["norms/block_01/adapter_00/slow"]] == [0, 1]
    rows = list(csv.reader((run.folder / "metrics.csv").open()))
    assert ["task/total", "1", "89.0"] in rows and ["result/final", "0", "89.0"] in rows
    assert len(list((run.folder / "tb").iterdir())) == 1  # one TensorBoard run
    board = EventAccumulator(str(run.folder / "tb")).Reload()
    assert board.Images("figures/norms")[0].encoded_image_string == figure.read_bytes()
    tables = map(HParamsPluginData.FromString, board.PluginTagToContent("hparams").values())
    start, experiment = sorted(tables, key=lambda data: data.HasField("experiment"))
    values = start.session_start_info.hparams
    assert values["lr"].number_value == 0.1 and values["layers"].string_value == "[1, 2]"
    assert {info.name for info in experiment.experiment.hparam_infos} == {"lr", "head", "layers"}
    assert [info.name.tag for info in experiment.experiment.metric_infos][0] == "result/final"


# --- files ---


def test_accuracy_csv_is_numeric_and_exact(tmp_path):
    matrix = AccuracyMatrix()
    for correct, total in (([1], [3]), ([1, 1], [3, 2]), ([0, 2, 7], [3, 2, 7])):
        matrix.add(correct, total)
    with create(tmp_path / "run") as run:
        run.table("accuracy.csv", matrix_frame(matrix))
    path = run.folder / "accuracy.csv"
    assert list(csv.reader(path.open()))[0] == [repr(100 / 3), "", ""]
    values = np.genfromtxt(path, delimiter=",")
    assert values.shape == (3, 3) and np.isnan(values[0, 1]) and values[2, 2] == 100.0


SCALARS = {
    "epoch": (
        {"task": 3, "phase": "rd", "block": 9, "epoch": 2, "loss": 0.5, "accuracy": None, "lr": {"rd": 0.1}},
        [("epoch/rd/block_09/loss", 0.5), ("epoch/rd/block_09/lr/rd", 0.1)],
    ),
    "slow_step": (
        {"task": 0, "phase": "func", "step": 5, "updated": True, "moved": 0.25},
        [("slow_step/func/updated", 1.0), ("slow_step/func/moved", 0.25)],
    ),
    "norms": (
        {"task": 0, "block": 11, "adapter": 1, "when": "before", "slow": 2.0},
        [("norms/block_11/adapter_01/before/slow", 2.0)],
    ),
    "task": (
        {"task": 1, "accuracy": [90.0, 80.0], "adapters": {"9": 2}},
        [("task/accuracy/00", 90.0), ("task/accuracy/01", 80.0), ("task/adapters/09", 2.0)],
    ),
}


@pytest.mark.parametrize("event", SCALARS)
def test_scalars_of_each_kind_of_event(event):
    fields, expected = SCALARS[event]
    assert scalars({"event": event, **fields}) == expected
