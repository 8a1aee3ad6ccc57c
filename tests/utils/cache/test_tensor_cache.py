"""Tensors on disk: exact, verified, within a limit, shared by processes, removed without touching others."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from utils.cache import tensor_cache
from utils.cache.tensor_cache import RESERVE, TensorCache

BYTES = 40_000  # of a tensor of `numbers`


def never() -> Tensor:
    raise AssertionError("built although it is stored")


def numbers(value: float = 1.0) -> Tensor:
    return torch.arange(BYTES // 4, dtype=torch.float32) + value


def stored_file(root: Path, group: str = "group", key: str = "key") -> Path:
    """The one file of a tensor."""
    (path,) = (root / group).glob(f"{key}.*")
    return path


def groups(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", 1.0)


@pytest.fixture
def fresh(cache: TensorCache) -> Callable[[], TensorCache]:
    """Another cache on the same folder, as another process has it."""
    return lambda: TensorCache(cache.root, cache.limit_gb)


def fill(root: Path, names: list[str]) -> None:
    """One tensor in each group, left by another run, last used in this order, all of them long ago."""
    cache = TensorCache(root, 1)
    for age, group in enumerate(names):
        cache.get(group, "key", numbers)
        os.utime(root / group, (10_000 + age, 10_000 + age))


def limited(root: Path, tensors: float) -> TensorCache:
    """A cache with room for so many tensors of `numbers`, with a little for the headers of their files."""
    return TensorCache(root, tensors * 1.01 * BYTES / 1e9)


# ---------------------------------------------------------------------------------------------------- content


NUMBERS = "float32 float64 float16 bfloat16 float8_e4m3fn int8 uint8 int64 uint16 bool"


@pytest.mark.parametrize("shape", [(7, 3), (0, 5), (), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", NUMBERS.split())
def test_every_bit_comes_back(cache, fresh, dtype: str, shape: tuple[int, ...]):
    kind = getattr(torch, dtype)
    raw = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * kind.itemsize, dtype=np.uint8)
    raw = raw % 2 if dtype == "bool" else raw  # the other bit patterns include NaN and infinities
    tensor = torch.tensor(raw.tolist(), dtype=torch.uint8).view(kind).reshape(shape)
    for reader, build in ((cache, lambda: tensor), (cache, never), (fresh(), never)):
        assert same(reader.get("group", "key", build), tensor)


def test_a_view_is_stored_without_what_surrounds_it(cache, fresh):
    whole = numbers().reshape(100, 100).requires_grad_()
    stored = cache.get("group", "key", lambda: whole[:, ::50].T)
    assert same(stored, whole.detach()[:, ::50].T) and same(fresh().get("group", "key", never), stored)
    assert stored.is_contiguous() and not stored.requires_grad
    assert stored_file(cache.root).stat().st_size < 2 * 200 * 4


def test_open_tensors_hold_no_file_descriptors(cache):
    tensors = [cache.get("group", str(i), lambda: torch.zeros(3_000_000)) for i in range(4)]
    assert all(cache.get("group", str(i), never) is tensor for i, tensor in enumerate(tensors))
    if Path("/proc/self/fd").is_dir():
        open_files = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        assert not any(str(cache.root) in name for name in open_files)


@pytest.mark.parametrize("limit_gb", [0, 1])
def test_a_tensor_of_another_device_is_stored_from_the_cpu(cache, limit_gb):
    """Stands in for a device: a tensor that becomes readable by `cpu()` only."""
    elsewhere = SimpleNamespace(cpu=numbers, detach=lambda: elsewhere)
    assert torch.equal(TensorCache(cache.root, limit_gb).get("group", "key", lambda: elsewhere), numbers())


# ----------------------------------------------------------------------------------------------------- layout


def test_files_of_other_processes_are_seen(cache, fresh):
    with pytest.raises(AssertionError):
        cache.get("group", "key", never)  # a build that fails stores nothing
    assert not cache.has("group", "key") and not cache.root.exists()
    fresh().get("group", "key", numbers)
    assert cache.has("group", "key") and not cache.has("group", "ke") and not cache.has("other", "key")
    cache.get("group", "key", never).zero_()  # does not reach the file
    assert same(fresh().get("group", "key", never), numbers())
    assert same(safetensors.torch.load_file(stored_file(cache.root))["tensor"], numbers())
    stored_file(cache.root).unlink()
    assert not cache.has("group", "key")


def test_a_limit_of_0_only_builds(tmp_path):
    fill(tmp_path / "cache", ["group"])
    cache = TensorCache(tmp_path / "cache", 0)
    assert not cache.enabled and torch.equal(cache.get("group", "key", lambda: numbers(5)), numbers(5))
    assert not cache.has("group", "key") and not cache.make_room("group", 0)
    cache.get("new", "key", numbers)
    cache.describe("new", {"a": 1})
    assert groups(cache.root) == ["group"]


@pytest.mark.parametrize("by", ["this process", "another process"])
def test_a_group_is_described_once_and_dropped_but_for_foreign_files(cache, fresh, by: str):
    fill(cache.root, ["other"])
    folder, foreign = cache.root / "group", ["key.npy", "key.safetensors", "notes.txt"]
    folder.mkdir()
    for name in foreign:
        (folder / name).write_text("not ours")
    assert not cache.has("group", "key")
    kept = cache.get("group", "key", numbers)
    for about in ({"depth": 3, "view": ("view", 0), "what": "größe"}, {"depth": 4}):
        cache.describe("group", about)
    text = (folder / "about.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"depth": 3, "view": ["view", 0], "what": "größe"} and "größe" in text
    dropping = cache if by == "this process" else fresh()
    dropping.drop("group")
    dropping.drop("absent")
    assert sorted(path.name for path in folder.iterdir()) == foreign and (cache.root / "other").is_dir()
    assert not cache.has("group", "key") and torch.equal(kept, numbers())  # an open map stays readable
    cache.make_room("group", 1)
    assert torch.equal(cache.get("group", "key", lambda: numbers(7)), numbers(7))


# ----------------------------------------------------------------------------------------------------- damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another format": lambda path: path.write_bytes(b"no tensor" * 1000),
    "no checksum": lambda path: safetensors.torch.save_file({"tensor": numbers()}, path),
    "other tensors": lambda path: safetensors.torch.save_file({"a": numbers(), "b": numbers()}, path),
    "of another key": lambda path: shutil.copy(stored_file(path.parents[1], "group", "other"), path),
    "of another group": lambda path: shutil.copy(stored_file(path.parents[1], "elsewhere"), path),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_misplaced_file_is_built_again(cache, fresh, caplog, what: str):
    for group, key in (("group", "key"), ("group", "other"), ("elsewhere", "key")):
        cache.get(group, key, numbers)
    DAMAGE[what](stored_file(cache.root))
    with caplog.at_level(logging.WARNING, "nested_lora"):
        assert torch.equal(fresh().get("group", "key", lambda: numbers(7)), numbers(7))
    (message,) = caplog.messages
    assert "damaged" in message and "\n" not in message
    assert torch.equal(fresh().get("group", "key", never), numbers(7))


def test_any_altered_byte_is_found(cache, fresh, monkeypatch):
    """Each byte of the header and of the data, one at a time; also by who has read the file before."""
    tensor = torch.arange(8.0).reshape(2, 4)
    cache.get("group", "key", lambda: tensor)
    path = stored_file(cache.root)
    monkeypatch.setattr(logging.getLogger("nested_lora"), "disabled", True)
    for reader, positions in ((fresh, range(path.stat().st_size)), (lambda: cache, [-1])):
        for position in positions:
            flip(path, position)
            built = []
            found = reader().get("group", "key", lambda built=built: built.append(1) or tensor)
            assert same(found, tensor) and built, position


def test_an_unreadable_file_is_not_removed(cache, fresh, caplog):
    if os.geteuid() == 0:
        pytest.skip("the superuser reads every file")
    cache.get("group", "key", numbers)
    stored_file(cache.root).chmod(0)
    assert torch.equal(fresh().get("group", "key", numbers), numbers())
    assert "cannot read" in caplog.text and stored_file(cache.root).exists()


# ------------------------------------------------------------------------------------------------------- room


def test_the_groups_that_were_unused_longest_make_room(tmp_path):
    root = tmp_path / "cache"
    fill(root, ["oldest", "middle", "newest"])
    cache = limited(root, 3.5)
    assert cache.make_room("new", BYTES // 3) and groups(root) == ["middle", "newest", "oldest"]
    assert cache.make_room("new", BYTES) and groups(root) == ["middle", "newest"]
    cache.get("new", "key", numbers)
    cache.get("new", "other", numbers)
    assert groups(root) == ["new", "newest"]
    TensorCache(root, 1).get("newest", "key", never)  # to read is to use
    os.utime(root / "new", (20_000, 20_000))
    assert limited(root, 3).make_room("last", 2 * BYTES) and groups(root) == ["newest"]


def test_what_this_run_uses_stays_until_it_is_dropped(tmp_path):
    root = tmp_path / "cache"
    fill(root, ["left"])
    cache = limited(root, 2.5)
    cache.get("mine", "key", numbers)
    assert not cache.make_room("new", 3 * BYTES)
    assert groups(root) == ["left", "mine"]  # nothing is removed in vain
    assert cache.make_room("new", BYTES) and groups(root) == ["mine"]
    assert not cache.make_room("new", 2 * BYTES) and not cache.make_room("mine", 2 * BYTES)
    assert cache.make_room("mine", 0)  # nothing needed always fits
    cache.drop("mine")
    assert cache.make_room("new", 2 * BYTES)


def test_a_reserve_of_the_disk_is_left(tmp_path, monkeypatch):
    root, free = tmp_path / "cache", RESERVE + BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    cache = TensorCache(root, 100)
    assert cache.make_room("new", BYTES) and not cache.make_room("new", BYTES + 1)
    fill(root, ["oldest", "newest"])
    assert cache.make_room("new", BYTES + 1) and groups(root) == ["newest"]


def test_what_does_not_fit_is_built_every_time(tmp_path, caplog):
    cache = limited(tmp_path / "cache", 1.5)
    cache.get("group", "one", numbers)
    built = []
    for key in ("two", "two", "three"):
        assert torch.equal(cache.get("group", key, lambda: built.append(1) or numbers(2)), numbers(2))
    assert len(built) == 3 and not cache.has("group", "two") and cache.has("group", "one")
    (message,) = caplog.messages
    assert "cache_gb" in message and "\n" not in message
    TensorCache(tmp_path / "small", 1e-9).get("group", "key", numbers)
    assert not (tmp_path / "small").exists()


# ---------------------------------------------------------------------------------- disks and other processes


def test_a_full_disk_is_no_error(cache, monkeypatch, caplog):
    cache.get("group", "stored", numbers)

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    before = sorted(cache.root.rglob("*"))
    for key in ("one", "two"):
        assert torch.equal(cache.get("group", key, lambda: numbers(3)), numbers(3))
    cache.describe("group", {"depth": 3})
    assert len(caplog.messages) == 1 and "No space left" in caplog.text
    assert sorted(cache.root.rglob("*")) == before  # no temporary file either
    monkeypatch.undo()
    cache.get("group", "one", lambda: numbers(3))
    assert cache.has("group", "one")


def test_a_folder_that_cannot_be_made_or_is_removed_during_the_write_is_no_error(cache, monkeypatch, caplog):
    cache.root.write_text("a file")
    assert torch.equal(cache.get("group", "key", numbers), numbers())
    assert len(caplog.messages) == 1
    caplog.clear()
    cache.root.unlink()
    replace = os.replace

    def removed_before(source: Path, target: Path) -> None:
        shutil.rmtree(cache.root / "group")
        replace(source, target)

    monkeypatch.setattr(os, "replace", removed_before)
    assert torch.equal(cache.get("group", "key", numbers), numbers())
    assert not caplog.messages and not cache.has("group", "key")


def test_who_builds_later_takes_what_was_stored_meanwhile(cache, fresh):
    """By a process that wrote over what a killed one left half written."""
    cache.root.mkdir()
    (cache.root / ".writing").write_bytes(b"half")

    def build() -> Tensor:
        fresh().get("group", "key", lambda: numbers(1))
        return numbers(2)

    assert (
        torch.equal(cache.get("group", "key", build), numbers(1)) and not (cache.root / ".writing").exists()
    )


def test_threads_and_processes_share_a_folder(cache, fresh):
    """Half of the threads share an instance, the others have one each, as processes do."""

    def wrong(number: int) -> list[int]:
        mine = cache if number % 2 else fresh()
        keys = [(key, mine.get("group", str(key), lambda key=key: numbers(key))) for key in range(20)]
        return [key for key, got in keys if not torch.equal(got, numbers(key))]

    with ThreadPoolExecutor(4) as threads:
        assert not any(threads.map(wrong, range(4))) and len(list((cache.root / "group").iterdir())) == 20


def test_room_that_was_made_is_written_to_without_looking_again(tmp_path, monkeypatch):
    """The files of the folder are looked at once for all tensors of a group, and again beyond the room."""
    looked = []
    original = tensor_cache.groups_in
    monkeypatch.setattr(tensor_cache, "groups_in", lambda root: looked.append(root) or original(root))
    root = tmp_path / "cache"
    cache = limited(root, 5.5)
    assert cache.make_room("group", 5 * BYTES) and len(looked) == 1
    for key in range(5):
        cache.get("group", str(key), numbers)
    assert len(looked) == 1
    cache.get("group", "5", numbers)
    assert len(looked) == 2 and not cache.has("group", "5")
    assert not cache.make_room("other", 5 * BYTES)
    cache.get("other", "0", numbers)
    assert not cache.has("other", "0")
