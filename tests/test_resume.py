"""Killed and resumed = uninterrupted, bit for bit; Ctrl-C saves between steps; older state is refused."""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import main
from tests.conftest import TINY, command, folder_of
from tests.crash import outcome, run
from utils.runs.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

CHANGES = {
    **TINY,
    "max_train_per_class": 8,
    "max_tasks": 3,
    "exp_threshold": 0.5,
    "rd_epoch": 2,
    "rd_views": 1,  # errors are recorded after training
    "nested_lora_slow_grad": "accumulate",
    "nested_lora_update_interval_slow": 3,
    "nested_lora_freeze": "never",
    "optimizer": "adam",
}


STORED = {
    "nested_lora_freeze": "task",
    "adapter_blocks": "growing",
    "cache_views": 2,
    "func_epoch": 3,
    "precision": "bf16",  # where the CPU has it
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, list[str]]]:
    """The uninterrupted run: what it leaves behind, and the moments it goes through."""
    logs = tmp_path_factory.mktemp("reference")
    code, moments = run(command("smoke.json", logs, **CHANGES))
    assert code == 0
    assert set(moments) == {"step", "scan", "test", "write", "rename", "replace"}
    yield outcome(folder_of(logs)), moments


def first(moments: list[str], name: str, skip: int = 0) -> int:
    """Number of a moment: the one of that name after `skip` others of it."""
    return [i for i, moment in enumerate(moments) if moment == name][skip]


def finish(logs: Path) -> dict:
    code, _ = run(["--resume", str(folder_of(logs))])
    assert code == 0
    return outcome(folder_of(logs))


def chosen_points(moments: list[str]) -> dict[str, int]:
    """Before any checkpoint, while one is written or renamed, between tasks, in a scan, five at random."""
    task_ends = [i for i, moment in enumerate(moments) if moment == "rename"]
    points = {
        "first task": first(moments, "step", skip=3),
        "checkpoint files": task_ends[0] - 1,
        "checkpoint rename": task_ends[1],
        "between tasks": task_ends[0] + 1,
        "scan": first(moments, "scan", skip=2),
        "last test": len(moments) - 1 - moments[::-1].index("test"),
    }
    generator = random.Random(20)
    after_config = first(moments, "step")
    return points | {f"random {i}": generator.randrange(after_config, len(moments)) for i in range(5)}


PLACES = ["first task", "checkpoint files", "checkpoint rename", "between tasks", "scan", "last test"]


@pytest.mark.parametrize("where", [*PLACES, *(f"random {i}" for i in range(5))])
def test_killed_and_resumed_is_uninterrupted(
    reference: tuple[dict, list[str]], where: str, tmp_path: Path
) -> None:
    expected, moments = reference
    code, _ = run(command("smoke.json", tmp_path, **CHANGES), die_at=chosen_points(moments)[where])
    assert code == -signal.SIGKILL
    assert finish(tmp_path) == expected


def test_killed_twice(reference: tuple[dict, list[str]], tmp_path: Path) -> None:
    """A resumed run may die too."""
    expected, moments = reference
    run(command("smoke.json", tmp_path, **CHANGES), die_at=first(moments, "rename", skip=1) - 1)
    code, _ = run(["--resume", str(folder_of(tmp_path))], die_at=4)
    assert code == -signal.SIGKILL
    assert finish(tmp_path) == expected


def test_stopped_while_activations_are_stored(tmp_path: Path) -> None:
    """Stopped while the cached frozen prefix is written and read: what is there is used, the end equal."""
    changes = CHANGES | STORED
    code, moments = run(command("smoke.json", tmp_path / "whole", **changes))
    assert code == 0
    expected = outcome(folder_of(tmp_path / "whole"))
    stored = [i for i, moment in enumerate(moments) if moment == "store"]
    stops = [(point, signal.SIGKILL) for point in (stored[1], stored[-1] + 1, len(moments) // 2)]
    for number, (point, how) in enumerate([*stops, (stored[0] + 1, signal.SIGINT)]):
        logs = tmp_path / str(number)
        code, _ = run(command("smoke.json", logs, **changes), die_at=point, how=how)
        assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
        assert list((logs / "cache").rglob("*.safetensors"))
        assert finish(logs) == expected


def test_killed_between_the_growths_of_a_task(tmp_path: Path) -> None:
    """New views every epoch, some stored and some without room: the end is equal, and none is left."""
    changes = CHANGES | STORED | {"cache_views": 0, "exp_threshold": 0.0, "max_tasks": 2}
    changes |= {"precision": "fp32", "cache_gb": 0.0001}  # the same sizes on every CPU
    code, moments = run(command("smoke.json", tmp_path / "whole", **changes))
    assert code == 0
    last_scan = len(moments) - 1 - moments[::-1].index("scan")  # its batch makes the second block grow
    code, _ = run(command("smoke.json", tmp_path / "cut", **changes), die_at=last_scan + 2)
    assert code == -signal.SIGKILL and views_stored(tmp_path / "cut") in (1, 2)
    assert finish(tmp_path / "cut") == outcome(folder_of(tmp_path / "whole"))
    assert views_stored(tmp_path / "cut") == 0


def views_stored(logs: Path) -> int:
    """Augmented views of training images that have files in the cache."""
    groups = {path.parent for path in (logs / "cache").rglob("*.safetensors")}
    return sum(json.loads((group / "about.json").read_text())["view"] is not None for group in groups)


@pytest.mark.parametrize(
    ("where", "how"), [("step", signal.SIGINT), ("scan", signal.SIGHUP), ("test", signal.SIGINT)]
)
def test_ctrl_c_or_a_lost_terminal_saves_and_the_run_resumes_where_it_stopped(
    reference: tuple[dict, list[str]], where: str, how: signal.Signals, tmp_path: Path
) -> None:
    """In a later task: exit code 130, a checkpoint inside the task, the command in the log, the same end."""
    expected, moments = reference
    logs = tmp_path / "my logs"
    later = first(moments, "rename") + 1
    moment = later + moments[later:].index(where) + (3 if where == "step" else 0)
    code, _ = run(command("smoke.json", logs, **CHANGES), die_at=moment, how=how)
    folder = folder_of(logs)
    assert code == 130
    assert latest_checkpoint(folder / "checkpoints").name.startswith("task_01_step_")
    assert f"python main.py --resume '{folder}'" in folder.with_name(folder.name + ".log").read_text()
    assert finish(logs) == expected
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["task_00", "task_01", "task_02"]


def test_resume_auto_starts_continues_and_ends(reference: tuple[dict, list[str]], tmp_path: Path) -> None:
    """The same command again and again, as by SLURM; stopped before its record it leaves nothing."""
    expected, moments = reference
    again = ["--resume", "auto", *command("smoke.json", tmp_path, **CHANGES)]
    assert run(again, die_at=0, how=signal.SIGTERM)[0] == 130
    assert list(tmp_path.rglob("config.json")) == []
    assert run(again, die_at=first(moments, "step", skip=2), how=signal.SIGTERM)[0] == 130
    for _ in range(2):
        assert run(again)[0] == 0
        assert outcome(folder_of(tmp_path)) == expected
    assert run([*again, "--set", "max_tasks=1"])[0] == 0
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_resume_auto_says_which_keys_it_does_not_take(stopped: Path, told: Callable[..., str]) -> None:
    again = ["--resume", "auto", *command("smoke.json", stopped.parents[4], **CHANGES), "--set", "cache_gb=3"]
    shown = told(0, main.main, *again)
    assert "keeps its own cache_gb = " in shown and "config.json" in shown


@pytest.fixture
def stopped(reference: tuple[dict, list[str]], tmp_path: Path) -> Path:
    """A run folder with one finished task, killed in the second."""
    _, moments = reference
    run(command("smoke.json", tmp_path, **CHANGES), die_at=first(moments, "rename") + 4)
    return folder_of(tmp_path)


def test_a_checkpoint_inside_a_finished_task_goes_with_the_next_task(stopped: Path) -> None:
    """A run killed between the end of a task and the removal of what that replaces has left one."""
    checkpoints = stopped / "checkpoints"
    shutil.copytree(checkpoints / "task_00", checkpoints / "task_00_step_000003")
    assert run(["--resume", str(stopped)])[0] == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["task_00", "task_01", "task_02"]


@pytest.mark.parametrize(("seed", "words"), [(7, "its seed is 7"), ([1993, 7], "several seeds")])
def test_an_edited_seed_is_refused(seed: object, words: str, stopped: Path, told: Callable[..., str]) -> None:
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(config | {"seed": seed}))
    assert words in told(2, main.main, "--resume", stopped)


@pytest.mark.parametrize(
    "make_older",
    [
        lambda state: state.pop("evaluations"),
        lambda state: state["config"].pop("rd_dim"),
        lambda state: state["config"].update(seed=[1993]),
        lambda state: state["run"].pop("class_order"),
        lambda state: state["learner"]["progress"].pop("phases"),
    ],
    ids=["a part", "a key", "several seeds", "an identity", "the state"],
)
def test_a_checkpoint_of_an_earlier_version_is_called_old(
    make_older: Callable[[dict], object], stopped: Path, told: Callable[..., str]
) -> None:
    """Its hashes are right: it is neither damaged nor of another run; the answer is to run again."""
    checkpoint = latest_checkpoint(stopped / "checkpoints")
    tensors, state = load_checkpoint(checkpoint)
    make_older(state)
    save_checkpoint(checkpoint, tensors, state)
    shown = told(2, main.main, "--resume", stopped)
    assert "written by an earlier version" in shown and checkpoint.name in shown
    assert f"run it again with python main.py --config {stopped / 'config.json'}" in shown


def test_a_key_that_came_later_is_no_obstacle(stopped: Path) -> None:
    """While it has its default, as `shuffle` has here."""
    checkpoint = latest_checkpoint(stopped / "checkpoints")
    tensors, state = load_checkpoint(checkpoint)
    del state["config"]["shuffle"]
    save_checkpoint(checkpoint, tensors, state)
    assert run(["--resume", str(stopped)])[0] == 0
