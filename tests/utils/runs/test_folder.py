"""utils.runs.folder: one process writes a folder, and what it replaces waits until it is finished."""

import os
from pathlib import Path

import pytest

from models.vit.config import ClassIncrementalConfig
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.runs.folder import (
    FolderLock,
    claim_folder,
    create_folder,
    folder_of,
    remove_replaced,
    replaced_folders,
    restore_replaced,
    set_aside,
)


def made(folder: Path, content: str) -> Path:
    create_folder(folder, {"config.json": content.encode()})
    folder.with_name(folder.name + ".log").write_text(content)
    return folder


def content(folder: Path) -> tuple[str, str]:
    return (folder / "config.json").read_text(), folder.with_name(folder.name + ".log").read_text()


def dies(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_run_is_recorded_where_readers_of_the_logs_look() -> None:
    values = {"model_name": "sema", "prefix": "debug_nested_lora", "dataset": "cifar224"}
    values |= {"init_cls": 50, "increment": 50, "backbone_type": "pretrained_vit_b16_224_adapter"}
    config = ClassIncrementalConfig(**values)
    expected = "logs/sema/cifar224/0/50/debug_nested_lora_1993_pretrained_vit_b16_224_adapter"
    assert folder_of(config, 1993).as_posix() == expected
    other = config.model_copy(update={"dataset": "a/b.npz", "increment": 10, "backbone_type": "org/vit.tag"})
    assert folder_of(other, 1).as_posix() == "logs/sema/b/50/10/debug_nested_lora_1_org-vit.tag"
    assert folder_of(RunConfig(model_name="grids", prefix="p"), 1).as_posix() == "logs/grids/p_1"


def test_the_same_folder_by_another_name_is_the_same(tmp_path: Path, monkeypatch) -> None:
    """Who asks for it is told who writes it; a second time, too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    with FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run_2"):
        for name in ("../latest", ".", "../run/"):
            with pytest.raises(UserError, match=rf"by process {os.getpid()} on \S+ since \d{{4}}-\d\d"):
                FolderLock(Path(name)).acquire()


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_folder_holds_its_files_from_the_first_moment(call: str, tmp_path: Path, monkeypatch) -> None:
    """Wherever its process is killed: it is not there, or whole; the next attempt removes what was left."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, dies)
        with pytest.raises(KeyboardInterrupt):
            create_folder(tmp_path / "run", {"config.json": b"{}"})
    assert not (tmp_path / "run").exists()
    made(tmp_path / "run", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log"}


def test_what_is_replaced_waits_until_the_end(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", "first")
    assert set_aside(folder, "config.json") == tmp_path / "run.replaced"
    assert not folder.exists()
    made(folder, "second")
    assert restore_replaced(folder) is None  # its replacement stands
    assert set_aside(folder, "config.json") == tmp_path / "run.replaced_2"
    made(folder, "third")
    assert [content(path)[0] for path in replaced_folders(folder)] == ["first", "second"]
    assert content(folder) == ("third", "third")
    (tmp_path / "run.replaced_notes").mkdir()  # a name of somebody else's
    remove_replaced(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log", "run.replaced_notes"}


def test_what_was_moved_and_not_replaced_comes_back(tmp_path: Path, monkeypatch) -> None:
    """Killed after the folder was moved, before its log was, and after both."""
    folder = made(tmp_path / "run", "first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            set_aside(folder, "config.json")
    assert restore_replaced(folder) == tmp_path / "run.replaced"
    assert content(folder) == ("first", "first")
    set_aside(folder, "config.json")
    claim = claim_folder(folder, {"config.json": b"{}"}, overwrite=False)
    assert claim.folder.name == "run_2" and content(folder) == ("first", "first")
    claim.abandon()
    claim.lock.release()
    assert replaced_folders(folder) == [] and not claim.folder.exists()


def test_a_replaced_folder_that_is_written_stays(tmp_path: Path, caplog) -> None:
    folder = made(tmp_path / "run", "first")
    aside = set_aside(folder, "config.json")
    with FolderLock(aside):
        remove_replaced(folder)
    assert content(aside) == ("first", "first") and "stays" in caplog.text
    assert replaced_folders(folder) == [aside]
