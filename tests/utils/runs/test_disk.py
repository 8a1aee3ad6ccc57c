"""What is still to be written is judged by what has been: told once, and warned of where it does not fit."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import train
from utils.config.schema import RunConfig
from utils.runs.disk import DiskWatch, size_of

Config = Callable[..., RunConfig]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the free space of every disk, in MB."""

    def set_free(megabytes: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(megabytes * 1e6)))

    return set_free


def test_a_disk_is_told_of_once_and_warned_of_once(
    free: Callable[[float], None], smoke_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch = DiskWatch(tmp_path, smoke_config())
    for left, megabytes in ((4, 130), (3, 97), (2, 60), (1, 20), (0, 0)):
        free(megabytes)
        watch.compare("checkpoint", 32e6, left)
    told, warned = caplog.records
    assert "32 MB" in told.message and "128 MB; 130 MB are free" in told.message
    assert "64 MB; 60 MB are free" in warned.message and "resumed" in warned.message
    assert (told.levelname, warned.levelname) == ("INFO", "WARNING")


def test_a_warning_names_the_keys_that_help(
    free: Callable[[float], None], smoke_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free(1)
    shared = smoke_config(checkpoints="last", cache_root=str(tmp_path))
    for config in (shared, smoke_config(cache_root=str(tmp_path / "none"))):
        DiskWatch(tmp_path, config).compare("checkpoint", 2e6, 1)
    last, every = (record.message for record in caplog.records)
    assert "cache_gb" in last and "checkpoints=last" not in last and "logs_root" in last
    assert "cache_gb" not in every and "checkpoints=last" in every


@pytest.mark.parametrize(("checkpoints", "further"), [("all", 3), ("last", 1)])
def test_a_run_tells_the_size_of_its_further_checkpoints(
    checkpoints: str, further: int, smoke_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Four tasks; what takes the place of the last checkpoint is there with it for a moment."""
    caplog.set_level(logging.INFO)
    train(smoke_config(model_name="ranpac", ranpac_dim=600, checkpoints=checkpoints))
    (told,) = [message for message in caplog.messages if message.startswith("Disk")]
    megabytes = 600 * 601 * 8 / 1e6  # the ridge regression's sums, nearly all of it
    assert f"takes {megabytes:.0f} MB" in told and f"about {further * megabytes:.0f} MB;" in told


def test_what_goes_while_a_folder_is_measured_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the files of a tracker's own process do: a file and a folder, in a run that is finished."""
    scandir = os.scandir

    def vanishing(folder: Path | str) -> object:
        if Path(folder).name == "temporary":
            Path(folder).rmdir()
        return scandir(folder)

    (tmp_path / "temporary").mkdir()
    (tmp_path / "result").write_bytes(b"1234")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(os, "scandir", vanishing)
    assert size_of(tmp_path) == 4
