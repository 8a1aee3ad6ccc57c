"""The command lines from the user's side: a run and its record, several seeds, eval.py, and bad input."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import main
from models import SCHEMAS
from models.ranpac import RanPACHead
from tests.conftest import EXPS, ROOT, TINY, TINY_GRIDS, command, folder_of, settings
from utils.config.loading import load_config
from utils.runs.run_log import read_metrics
from utils.wording import duration


def arguments(logs: Path, **changes: object) -> list[str]:
    return command("smoke.json", logs, **(TINY | {"max_tasks": 2} | changes))


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run."""
    logs = tmp_path_factory.mktemp("logs")
    assert main.main(arguments(logs, figure_format="png")) == 0
    return folder_of(logs)


def test_the_folder_is_where_readers_look_and_tells_the_whole_story(finished: Path) -> None:
    assert finished.parts[-5:] == ("sema", "synthetic", "0", "2", "smoke_1993_test_vit")
    files = {"config.json", "manifest.json", "metrics.jsonl", "accuracy.csv", "result.json"}
    assert files <= {path.name for path in finished.iterdir()}
    assert {path.name for path in (finished / "figures").iterdir()} == {
        "accuracy_matrix.png", "accuracy_curves.png", "confusion.png", "norms.png", "growth.png",
    }  # fmt: skip
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["task_00", "task_01"]
    assert list((finished / "tb").iterdir())
    assert not list(finished.rglob("*.pkl")) and not list(finished.rglob("*.pth"))


def test_the_text_log_has_the_published_lines(finished: Path) -> None:
    log = finished.with_name(finished.name + ".log").read_text()
    for line in (
        "Learning on 0-1 (", "func Task 0, Epoch 1/1 => Loss", "CNN top1 curve: [", "Average Accuracy (CNN):",
        "All params: ", "Trainable params: ", "[NestedLoRA] optimizer groups => slow: lr=", "slow updated",
        "Consolidated Nested LoRA at layer 5 with alpha=", "||theta_fast||",
    ):  # fmt: skip
        assert line in log, line
    seconds = read(finished, "result.json")["cost"]["seconds"]  # without the figures, drawn afterwards
    assert f"{duration(seconds)} on cpu; everything is in {finished}" in log


def test_the_text_log_is_a_short_story_and_verbose_tells_the_details(finished: Path, tmp_path: Path) -> None:
    """A line per phase, a block per task, classes by name, both ends included; no warning."""
    story = finished.with_name(finished.name + ".log").read_text()
    assert re.search(r"Task 1 \(2 of 2\): Learning on 2-3 \([a-z]\w+, [a-z]\w+\), 32 images", story)
    assert "WARNING" not in story and story.count("rd Task 0, Epoch 2/2") == 1
    phases = {(e["task"], e["phase"], e["block"]) for e in read_metrics(finished) if e["event"] == "epoch"}
    lines = [line.split("  ", 1)[1] for line in story.splitlines() if line.startswith("20")]
    told = [line for line in lines if "Epoch" in line]
    assert len(told) == len(phases) and len(lines) < 10 + 2 * 8 + len(phases) + 5
    details = ("rd Task 0, Epoch 1/2", "errors recorded on", "block 0 ||theta_fast||", "every  tensors")
    assert not any(detail in story for detail in details)
    assert main.main([*arguments(tmp_path), "--verbose"]) == 0
    folder = folder_of(tmp_path)
    verbose = folder.with_name(folder.name + ".log").read_text()
    assert all(detail in verbose for detail in details)


def test_result_and_matrix_agree(finished: Path) -> None:
    result = read(finished, "result.json")
    with open(finished / "accuracy.csv") as file:
        rows = [[float(cell) for cell in row if cell] for row in csv.reader(file)]
    assert rows == result["accuracy"] and [len(row) for row in rows] == [1, 2]
    metrics = result["metrics"]
    assert metrics["final"] == pytest.approx(sum(rows[1]) / 2)  # tasks of equal size
    assert metrics["forgetting"] == pytest.approx(rows[0][0] - rows[1][0]) == -metrics["bwt"]
    assert metrics["plasticity"] == pytest.approx((rows[0][0] + rows[1][1]) / 2)
    assert {spec.key for spec in SCHEMAS["sema"].metrics if not spec.per_task} == set(metrics)
    assert metrics["expansions"] == sum(result["adapters"].values()) - 6
    tasks = [event for event in read_metrics(finished) if event["event"] == "task"]
    assert [event["accuracy"] for event in tasks] == rows
    assert all(event["peak_memory_mb"] > 0 and event["seconds"] > 0 for event in tasks)
    parameters = result["parameters"]
    stored = sum(count for part, count in parameters.items() if part not in ("trained", "stored"))
    assert parameters["stored"] == stored and parameters["trained"] > parameters["adapters"] > 0


def test_the_manifest_says_what_the_run_was_made_with(finished: Path) -> None:
    manifest = read(finished, "manifest.json")
    session = manifest["sessions"][0]
    assert set(session["versions"]) >= {"python", "torch", "torchvision", "timm", "numpy", "PIL"}
    assert manifest["weights"]["tag"] == "test_vit.random" and len(manifest["weights"]["sha256"]) == 64
    assert sorted(manifest["class_order"]) == list(range(8)) and len(manifest["data"]["sha256"]) == 64
    assert session["device"].startswith("cpu")


def test_seeds_have_a_folder_and_a_log_each_and_a_table(tmp_path: Path, told: Callable[..., str]) -> None:
    shown = told(0, main.main, *arguments(tmp_path, seed=[1, 2], max_tasks=1))
    assert "Mean ± std (n) over seeds 1, 2" in shown
    first, second = sorted(path.parent for path in tmp_path.rglob("config.json"))
    assert (first.name, second.name) == ("smoke_1_test_vit", "smoke_2_test_vit")
    logs = [folder.with_name(folder.name + ".log").read_text() for folder in (first, second)]
    assert "seed 1" in logs[0] and "seed 2" not in logs[0]
    assert "seed 2" in logs[1] and "seed 1" not in logs[1].replace("seed 1993", "")
    table = told(0, evaluation.main, "--run", first, second)
    finals = [read(folder, "result.json")["metrics"]["final"] for folder in (first, second)]
    assert f"{sum(finals) / 2:.2f}" in table and "(2)" in table
    orders = [read(folder, "manifest.json")["class_order"] for folder in (first, second)]
    assert [read(folder, "config.json")["seed"] for folder in (first, second)] == [1, 2]
    assert orders[0] != orders[1]


def test_a_published_device_list_falls_back_with_a_warning_in_the_log(tmp_path: Path) -> None:
    """`["0"]` on a machine without such a GPU runs on the CPU and says so in the run's own log."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main.main(arguments(tmp_path, device=["0"], max_tasks=1, rd_epoch=0)) == 0
    folder = folder_of(tmp_path)
    assert "no such GPU here, running on the CPU" in folder.with_name(folder.name + ".log").read_text()


def test_eval_redraws_figures_and_tests_any_checkpoint(finished: Path, told: Callable[..., str]) -> None:
    """Rebuilt from the folder without training, the model has the recorded accuracy on every task."""
    figure = finished / "figures" / "accuracy_matrix.png"
    figure.unlink()
    last = told(0, evaluation.main, "--run", finished).splitlines()
    first = told(0, evaluation.main, "--checkpoint", finished / "checkpoints" / "task_00")
    matrix = read(finished, "result.json")["accuracy"]
    assert figure.exists() and f"{matrix[0][0]:6.2f}" in first and "task   1" not in first
    for task, accuracy in enumerate(matrix[-1]):
        line = next(line for line in last if line.startswith(f"task {task:>3}  classes"))
        assert f"{accuracy:6.2f}" in line
    total = next(line for line in last if line.startswith("total"))
    assert f"{sum(matrix[-1]) / 2:6.2f}" in total and total.index("(") == line.index("(")


BAD = {
    "two mistakes": ({"batch_size": "many", "nested_lora_lr_fast": -1}, "2 problems"),
    "more classes than there are": ({"init_cls": 9}, "8 classes"),
    "absent GPU": ({"device": "cuda:99"}, "cuda:99"),
    "unknown data set": ({"dataset": "cifra100"}, "cifar100"),
    "missing data": ({"dataset": "imagenetr", "backbone_type": "test_vit"}, "exps/quickstart.json"),
}


@pytest.mark.parametrize(("changes", "expected"), BAD.values(), ids=BAD)
def test_bad_input_is_a_message_and_exit_code_2_before_any_folder(
    changes: dict[str, Any], expected: str, tmp_path: Path, told: Callable[..., str]
) -> None:
    assert expected in told(2, main.main, *arguments(tmp_path, data_root=f"{tmp_path}/nothing", **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--resume x --set seed=1", "go with --resume auto"),
        ("--resume auto --set seed=1", "--resume auto goes with --config"),
        ("--resume auto --config x.json --overwrite", "--resume takes no --overwrite"),
        ("--extend x", "--extend goes with --set max_tasks=N or --data"),
        ("--data x", "allowed with --extend"),
        ("--sweep x.json --resume y", "--resume takes no --sweep"),
        ("--config x.json --jobs 2 --engine ray", "takes no --engine, --jobs: allowed with --sweep"),
        ("--sweep x.json --jobs 0", "--jobs: 0: at least 1"),
        ("--sweep x.json --jobs many", '"many" is not an integer'),
        ("--sweep x.json --seeds 1993,1994", "with spaces between"),
        ("--sweep x.json --engine slurm", "(choose from 'local', 'ray')"),
        ("--sweep x.json --ray-address auto", "--ray-address goes with --engine ray"),
        ("RANK=0 --sweep x.json", "without torchrun"),
        ("RANK=0", "without torchrun"),
        ("--benchmark", "goes with --config"),
        ("--sweep x.json --overwrite --only nested", "--overwrite replaces a whole sweep"),
        ("--profile x", "allowed with --benchmark"),
        ("--benchmark --overwrite", "--benchmark takes no --overwrite: it takes --config"),
        ("--benchmark --repeats 0", "at least 1"),
        ("--list methods --method sema", "--method goes with --list keys"),
        ("--list metrics --format markdown", "--format goes with --list keys"),
        ("--list key", "invalid choice"),
        ("--compare x y", "python eval.py --compare x y"),
        ("--compare", "python eval.py --compare FOLDER FOLDER"),
        ("--latex", "python eval.py --compare FOLDER FOLDER"),
        ("--run", "python eval.py --run FOLDER"),
        ("--test", "python eval.py --run FOLDER"),
    ],
)
def test_options_that_do_not_go_together(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command.split()
    if given[0].startswith("RANK="):
        monkeypatch.setenv(*given.pop(0).split("="))
    with pytest.raises(SystemExit) as exit_info:
        main.main(given)
    assert exit_info.value.code == 2 and words in capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize(
    "change", ["sweeps/costs dataset=cifar224", "smoke init_cls=5", "smoke buffer_size=5"]
)
def test_a_benchmark_refuses_changes_of_what_it_makes(change: str, told: Callable[..., str]) -> None:
    file, change = change.split()
    shown = told(2, main.main, "--benchmark", ROOT / f"exps/{file}.json", "--set", change)
    assert f"--set {change.partition('=')[0]}" in shown and "leave out" in shown


def test_the_default_is_the_quickstart() -> None:
    """Also with what a sweep takes."""
    for given in ([], ["--set", "seed=1"], ["--jobs", "1", "--overwrite"], ["--report"]):
        assert main.parse(given).sweep == Path("exps/quickstart.json")
    assert main.parse(["--config", "x.json"]).sweep is None


STAND_INS = {
    "dataset": "synthetic", "weights": "random", "backbone_type": "test_vit", "image_size": None,
    "adapt_start_layer": 4, "adapt_end_layer": 5, "init_cls": 2, "increment": 2, "max_tasks": 2,
    "max_train_per_class": 2, "max_test_per_class": 1, "func_epoch": 1, "rd_epoch": 1, "init_epoch": 1,
    "epochs": 1,
    "seed": 1, "device": "cpu", "precision": "fp32", "ranpac_dim": 20, "figure_format": "none",
}  # fmt: skip


@pytest.mark.parametrize("path", EXPS, ids=lambda path: path.stem)
def test_every_shipped_config_builds_its_learner(path: Path, tmp_path: Path) -> None:
    """End to end on generated images and an untrained tiny backbone: only data, weights and sizes differ."""
    changes = STAND_INS | {"filepath": str(tmp_path / "files"), "logs_root": str(tmp_path)}
    changes |= {"cache_root": str(tmp_path / "cache")}
    schema = type(load_config(path, [], SCHEMAS).config)
    if schema is SCHEMAS["shared_subspace"]:
        changes |= {key: value for key, value in TINY_GRIDS.items() if key not in ("prefix", "primitives")}
    if schema.model_fields["model_name"].default in ("joint", "linear_probe"):
        changes |= {"init_cls": 8, "increment": 8}
    known = {key: value for key, value in changes.items() if key in schema.model_fields}
    assert main.main(["--config", str(path), *settings(known)]) == 0


@pytest.mark.parametrize("method", ["__init__", "refit"])
def test_a_lack_of_memory_for_the_ridge_is_a_message_that_names_it(
    method: str, told: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is made, and in a task; nothing is trained, so that no part of a step is advised."""

    def exhausted(*arguments: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 6400000000 bytes")

    monkeypatch.setattr(RanPACHead, method, exhausted)
    values = {"model_name": "ranpac", "dataset": "synthetic", "init_cls": 2, "increment": 2}
    values |= {"backbone_type": "test_vit", "weights": "random", "image_size": 32, "device": "cpu"}
    (tmp_path / "ranpac.json").write_text(json.dumps(values))
    places = {"logs_root": str(tmp_path / "logs"), "cache_root": str(tmp_path / "cache"), "max_tasks": 1}
    shown = told(2, main.main, tmp_path / "ranpac.json", *settings(places))
    assert "out of memory" in shown and "ranpac_dim" in shown and "grad_accumulation" not in shown
