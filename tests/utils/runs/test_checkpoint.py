"""utils.runs.checkpoint: bit-for-bit round trips, refusal of damage, and a crash at every step of a save."""

import itertools
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.runs import checkpoint
from utils.runs.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint, save_checkpoint

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}


def saved(folder: Path, mark: int = 1) -> Path:
    save_checkpoint(folder, {**TENSORS, "mark": torch.tensor(mark)}, {"mark": mark})
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_what_is_saved_comes_back_bit_for_bit_and_apart(tmp_path):
    base = torch.arange(4.0)
    tensors = {
        "float32": torch.randn(3, 4),
        "float64": torch.randn(3, 4, dtype=torch.float64),
        "bfloat16": torch.randn(5).to(torch.bfloat16),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "scalar": torch.tensor(2.5),
        "integer": torch.tensor(7),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 3, dtype=torch.int64),
        "bool": torch.tensor([True, False]),
        "random state": torch.get_rng_state(),
        "transposed": torch.randn(4, 3).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "learned": torch.randn(2, requires_grad=True),
        "alias": base,
        "base": base,
        "tail": base[2:],
    }
    state = {"python": random.getstate()[1], "x": 0.1 + 0.2, "big": 2**80, "none": None, "text": "é\n"}
    save_checkpoint(tmp_path / "task_00", tensors, {**state, "nan": float("nan")})
    loaded, read = load_checkpoint(tmp_path / "task_00")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded[name]) == bits(tensor.detach()), name
    loaded["alias"].zero_()
    assert loaded["base"].tolist() == [0, 1, 2, 3] and loaded["tail"].tolist() == [2, 3]
    assert math.isnan(read.pop("nan"))
    assert read == {**state, "python": list(state["python"])}
    assert {path.name for path in (tmp_path / "task_00").iterdir()} == {"state.json", "tensors.safetensors"}


@pytest.mark.parametrize("state", [{9: 1}, {"blocks": {9: 1}}, {"list": [{0: 1}]}, {"x": object()}])
def test_state_that_json_would_change_is_refused_before_anything_is_written(tmp_path, state):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "task_00", {}, state)
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_furthest_by_task_and_step(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for task, step in [(1, None), (2, 9), (2, 120), (0, 99)]:
        saved(tmp_path / checkpoint_name(task, step))
    assert latest_checkpoint(tmp_path).name == "task_02_step_000120"
    assert latest_checkpoint(tmp_path, whole_tasks=True).name == "task_01"
    for task in (2, 100):
        saved(tmp_path / checkpoint_name(task))
        assert latest_checkpoint(tmp_path).name == checkpoint_name(task)
    for other in (".tmp-task_105", "task_107_backup"):  # leftovers and foreign folders
        shutil.copytree(tmp_path / "task_01", tmp_path / other)
    (tmp_path / "task_106").mkdir()
    (tmp_path / "task_108").write_text("a file")
    assert latest_checkpoint(tmp_path).name == "task_100"


class Crash(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


def crash_at(monkeypatch, step: int) -> list[str]:
    """Let the step-th disk operation of a save raise Crash; returns the operations so far."""
    done: list[str] = []

    def guarded(name, real):
        def call(*args, **kwargs):
            if len(done) == step:
                raise Crash
            done.append(name)
            return real(*args, **kwargs)

        return call

    for owner, names in ((os, ("rename", "replace", "fsync")), (shutil, ("rmtree",)), (Path, ("mkdir",))):
        for name in names:
            monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("replacing", [False, True])
def test_crash_at_every_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, replacing):
    """Saving mark 2 over or after mark 1 and dying: one of them is found, whole; the next save cleans up."""
    seen, crashed = [], True
    while crashed:
        folder = tmp_path / str(len(seen))
        first = saved(folder / "task_00", 1)
        with monkeypatch.context() as patch:
            done = crash_at(patch, len(seen))
            try:
                saved(first if replacing else folder / "task_01", 2)
                crashed = False
            except Crash:
                pass
        tensors, state = load_checkpoint(latest_checkpoint(folder))
        assert tensors["mark"] == state["mark"] and tensors["weight"].equal(TENSORS["weight"])
        seen.append(state["mark"])
        saved(folder / "task_02", 3)  # the run goes on
        both = not replacing and state["mark"] == 2
        assert {path.name for path in folder.iterdir()} == {"task_00", "task_02", *(["task_01"] * both)}
        assert load_checkpoint(latest_checkpoint(folder))[1] == {"mark": 3}
    assert set(seen) == {1, 2} and seen[-1] == 2
    assert {"mkdir", "fsync", "rename"} <= set(done) and len(seen) > (7 if replacing else 6)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_every_truncation_and_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    folder = saved(tmp_path / "task_00")
    whole = (folder / name).read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    for position, flip in itertools.product(range(len(whole)), (0x01, 0x20, 0x80)):
        damaged.append(whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :])
    harmless = 0
    for content in damaged:
        (folder / name).write_bytes(content)
        try:
            tensors, state = load_checkpoint(folder)
        except UserError as error:
            assert "task_00" in str(error)
        else:
            harmless += 1
            assert len(content) == len(whole) and state == {"mark": 1}
            assert tensors["weight"].equal(TENSORS["weight"])
    assert harmless == 0 or name == "state.json"  # white space in JSON means nothing


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": checkpoint.VERSION + 1}, "format 2, this program reads up to 1"),
        ({"version": "1"}, "state.json is damaged"),
        ({"format": "something else"}, "not a checkpoint of this program"),
        ({"tensors_sha256": "0" * 64}, "tensors.safetensors does not have the recorded SHA-256"),
        ({"state": {"mark": 5}}, "state does not have the recorded SHA-256"),
        ({"state": None}, "state does not have the recorded SHA-256"),
    ],
)
def test_what_is_wrong_with_the_header_is_said(tmp_path, change, told):
    path = saved(tmp_path / "task_00") / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        load_checkpoint(path.parent)


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_checkpoint(tmp_path / "task_09")
    (saved(tmp_path / "task_00") / "state.json").unlink()
    with pytest.raises(UserError, match="holds no state.json"):
        load_checkpoint(tmp_path / "task_00")
