"""Disk space is told before it is taken, and runs whose checkpoints do not fit are not begun."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
import trainer
from tests.conftest import command, folder_of
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.runs.disk import disk_use, kept_bytes

Config = Callable[..., RunConfig]
RANPAC = {"model_name": "ranpac", "ranpac_dim": 2000}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the free space of every disk, in GB."""

    def set_free(gb: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(gb * 1e9)))

    return set_free


def test_checkpoints_of_all_tasks_or_of_the_last_two_are_there_at_once() -> None:
    assert kept_bytes([1, 2, 3], "all") == 6
    assert kept_bytes([1, 2, 3], "last") == 5  # the new one is whole before the old one goes
    assert kept_bytes([], "last") == 0


def test_what_fits_is_told_and_what_does_not_is_refused(
    smoke_config: Config, free: Callable[[float], None]
) -> None:
    """Four tasks of 32 MB each: two triangles of 2000 x 2000 sums in float64."""
    config = smoke_config(**RANPAC)
    free(1)
    told = disk_use([config])
    assert "129 MB" in told and "1.0 GB free" in told and "20 GB" in told
    free(0.1)
    with pytest.raises(UserError, match="129 MB .* 100 MB free .*checkpoints=last: 65 MB.*logs_root"):
        disk_use([config])
    assert "65 MB" in disk_use([config.model_copy(update={"checkpoints": "last"})])
    with pytest.raises(UserError, match="checkpoints of 3 runs"):
        disk_use([config.model_copy(update={"seed": seed}) for seed in range(3)])


def test_a_cache_that_may_take_the_room_is_warned_of(
    smoke_config: Config, free: Callable[[float], None]
) -> None:
    config = smoke_config(**RANPAC)
    runs = [config.model_copy(update={"seed": seed}) for seed in range(40)]  # 5.2 GB
    free(20)
    assert "set cache_gb to 14 at most" in disk_use(runs)
    assert "set cache_gb" not in disk_use([run.model_copy(update={"cache_gb": 14.0}) for run in runs])
    free(30)
    assert "set cache_gb" not in disk_use(runs)


def test_a_run_is_extended_where_its_further_tasks_fit(
    smoke_config: Config, free: Callable[[float], None], told: Callable[..., str]
) -> None:
    """Two of 32 MB; on the same disk the checkpoints of the two tasks that are learned are links."""
    config = smoke_config(**RANPAC, max_tasks=2)
    trainer.train(config)
    logs = Path(config.logs_root)
    run, other = folder_of(logs), logs.with_name("other")
    for place, room, code in ((logs, 0.06, 2), (logs, 0.07, 0), (other, 0.07, 0)):
        free(room)
        more = ["--set", "max_tasks=4", "--set", f"logs_root={place}"]
        assert "checkpoints take about 65 MB" in told(code, main.main, "--extend", run, *more)
        assert len(list(place.rglob("smoke_4tasks_*/config.json"))) == 1 - code // 2


@pytest.mark.parametrize("option", [[], ["--resume", "auto"]], ids=" ".join)
def test_nothing_is_started_on_a_disk_without_room(
    option: list[str], free: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free(0)
    assert main.main([*option, *command("smoke.json", tmp_path)]) == 2
    assert "free some space" in capsys.readouterr().err and not list(tmp_path.rglob("config.json"))
