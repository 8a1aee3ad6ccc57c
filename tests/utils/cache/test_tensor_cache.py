"""Tensors on disk: exact, verified, within their limit, shared by processes, and removed without touching else."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from utils.cache import tensor_cache
from utils.cache.__main__ import main
from utils.cache.tensor_cache import TensorCache

FOUR_KB = 1000  # float32 numbers; their file has 4128 bytes
FILE_BYTES = 4 * FOUR_KB + 128


def never() -> Tensor:
    raise AssertionError("built although it is stored")


def numbers(value: float = 1.0, count: int = FOUR_KB) -> Tensor:
    return torch.arange(count, dtype=torch.float32) + value


def chunk(root: Path, group: str = "group", key: str = "key") -> Path:
    """The one file of a tensor."""
    (path,) = (root / group).glob(f"{key}.*.npy")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors above 64 bytes are memory-mapped."""
    monkeypatch.setattr(tensor_cache, "IN_MEMORY", 64)


DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "int8",
    "uint8",
    "int32",
    "int64",
    "uint16",
]


@pytest.mark.parametrize("threshold", [tensor_cache.IN_MEMORY, 1], ids=["in memory", "mapped"])
@pytest.mark.parametrize("shape", [(7, 3), (0, 5), (), (3, 0), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_every_bit_comes_back(
    cache: TensorCache,
    fresh,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    shape: tuple[int, ...],
    threshold: int,
) -> None:
    monkeypatch.setattr(tensor_cache, "IN_MEMORY", threshold)
    kind = getattr(torch, dtype)
    raw = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * kind.itemsize, dtype=np.uint8)
    raw = raw % 2 if dtype == "bool" else raw  # the other bit patterns include NaN and infinities
    tensor = torch.tensor(raw.tolist(), dtype=torch.uint8).view(kind).reshape(shape)
    assert same(cache.get("group", "key", lambda: tensor), tensor)
    assert same(cache.get("group", "key", never), tensor)
    assert same(fresh().get("group", "key", never), tensor)
    assert chunk(cache.root).name.split(".")[1] == dtype


def test_a_view_is_stored_without_what_surrounds_it(cache: TensorCache, fresh) -> None:
    whole = numbers(count=10_000).reshape(100, 100).requires_grad_()
    stored = cache.get("group", "key", lambda: whole[:, ::50].T)
    again = fresh().get("group", "key", never)
    assert same(stored, whole.detach()[:, ::50].T) and same(again, stored)
    assert stored.is_contiguous() and not stored.requires_grad
    assert chunk(cache.root).stat().st_size == 200 * 4 + 128


def test_numpy_reads_the_files(cache: TensorCache) -> None:
    cache.get("group", "key", lambda: numbers().reshape(10, 100))
    assert np.array_equal(np.load(chunk(cache.root)), numbers().reshape(10, 100).numpy())


def test_an_empty_numpy_array_comes_back(cache: TensorCache, fresh) -> None:
    tensor = torch.from_numpy(np.zeros((0, 5), np.float32))
    for got in (cache.get("group", "key", lambda: tensor), fresh().get("group", "key", never)):
        assert got.shape == (0, 5) and got.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list memory maps there")
@pytest.mark.parametrize(("over", "mapped"), [(0, False), (1, True)])
def test_only_large_tensors_are_memory_mapped(cache: TensorCache, fresh, over: int, mapped: bool) -> None:
    tensor = torch.arange(8 * 2**20 + over, dtype=torch.int64).to(torch.uint8)
    built = cache.get("group", "key", lambda: tensor)
    maps = Path("/proc/self/maps").read_text().count(str(chunk(cache.root)))
    read = fresh().get("group", "key", never)
    assert torch.equal(built, tensor) and torch.equal(read, tensor)
    maps_more = Path("/proc/self/maps").read_text().count(str(chunk(cache.root)))
    assert (maps > 0, maps_more > maps) == (mapped, mapped)


def test_a_map_is_kept_open_and_holds_no_file_descriptor(cache: TensorCache, fresh, small_maps: None) -> None:
    tensors = [cache.get("group", str(i), lambda i=i: numbers(i)) for i in range(20)]
    assert all(cache.get("group", str(i), never) is tensor for i, tensor in enumerate(tensors))
    if Path("/proc/self/fd").is_dir():
        open_files = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        assert not any(str(cache.root) in name for name in open_files)


def test_writing_to_a_map_does_not_reach_the_file(cache: TensorCache, fresh, small_maps: None) -> None:
    cache.get("group", "key", numbers).zero_()
    assert torch.equal(fresh().get("group", "key", never), numbers())


def test_a_file_is_hashed_once_by_a_reader(
    cache: TensorCache, fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get("group", "key", numbers)
    hashed = []
    checksum = tensor_cache._checksum
    monkeypatch.setattr(tensor_cache, "_checksum", lambda *data: hashed.append(1) or checksum(*data))
    for _ in range(3):
        cache.get("group", "key", never)
    assert not hashed  # who wrote it knows it
    reader = fresh()
    for _ in range(3):
        reader.get("group", "key", never)
    assert len(hashed) == 1


def test_has_and_layout(cache: TensorCache) -> None:
    assert not cache.has("group", "key") and not cache.root.exists()
    cache.get("group", "key", numbers)
    assert cache.has("group", "key") and not cache.has("group", "ke") and not cache.has("other", "key")
    assert re.fullmatch(r"key\.float32\.[0-9a-f]{32}\.npy", chunk(cache.root).name)
    assert files(cache.root) == ["CACHE", "group"] and len(files(cache.root / "group")) == 1
    chunk(cache.root).unlink()
    assert not cache.has("group", "key")


def test_a_file_of_another_process_is_seen(cache: TensorCache, fresh) -> None:
    cache.get("group", "one", numbers)
    assert not cache.has("group", "two")
    fresh().get("group", "two", lambda: numbers(2))
    assert cache.has("group", "two") and torch.equal(cache.get("group", "two", never), numbers(2))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "a b", "ä", "a\n"])
def test_names_that_could_be_paths_are_refused(cache: TensorCache, name: str) -> None:
    calls = [
        lambda: cache.get(name, "key", numbers),
        lambda: cache.get("group", name, numbers),
        lambda: cache.has("group", name),
        lambda: cache.make_room(name, 1),
        lambda: cache.describe(name, {}),
        lambda: cache.drop(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="only letters"):
            call()
    assert not cache.root.exists()


def test_disabled_only_builds(tmp_path: Path) -> None:
    TensorCache(tmp_path / "cache", 1).get("group", "key", lambda: numbers(5))
    cache = TensorCache(tmp_path / "cache", 0)
    assert not cache.enabled and TensorCache(tmp_path, 0.1).enabled
    assert torch.equal(cache.get("group", "key", numbers), numbers())
    assert (
        not cache.has("group", "key") and not cache.make_room("group", 1) and not cache.make_room("group", 0)
    )
    cache.get("new", "key", numbers)
    cache.describe("new", {"a": 1})
    assert files(cache.root) == ["CACHE", "group"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "altered byte": lambda path: flip(path, 1000),
    "altered header": lambda path: flip(path, 30),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "unparsable": lambda path: path.write_bytes(b"not an array" * 1000),
    "another dtype": lambda path: path.rename(path.with_name(path.name.replace("float32", "int32"))),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_built_again(
    cache: TensorCache,
    fresh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
    mapped: bool,
) -> None:
    if mapped:
        monkeypatch.setattr(tensor_cache, "IN_MEMORY", 64)
    cache.get("group", "key", numbers)
    good = chunk(cache.root).name
    DAMAGE[what](chunk(cache.root))
    built = []
    reader = fresh()
    with caplog.at_level(logging.WARNING, "nested_lora"):
        got = reader.get("group", "key", lambda: built.append(1) or numbers())
    assert built == [1] and torch.equal(got, numbers())
    assert len(caplog.messages) == 1 and "damaged" in caplog.text and "\n" not in caplog.messages[0]
    assert chunk(cache.root).name == good
    assert torch.equal(fresh().get("group", "key", never), numbers())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "place", [("group", "other"), ("elsewhere", "key")], ids=["another key", "another group"]
)
def test_a_file_of_another_key_or_group_is_refused(
    cache: TensorCache,
    fresh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: tuple[str, str],
    mapped: bool,
) -> None:
    """A whole file, right in itself, under a name that is not its own."""
    if mapped:
        monkeypatch.setattr(tensor_cache, "IN_MEMORY", 64)
    cache.get("group", "key", numbers)
    (group, key), source = place, chunk(cache.root)
    (cache.root / group).mkdir(exist_ok=True)
    shutil.copy2(source, cache.root / group / source.name.replace("key.", f"{key}."))
    with caplog.at_level(logging.WARNING, "nested_lora"):
        got = fresh().get(group, key, lambda: numbers(7))
    assert torch.equal(got, numbers(7)) and "damaged" in caplog.text
    assert torch.equal(fresh().get(group, key, never), numbers(7))
    assert torch.equal(fresh().get("group", "key", never), numbers())


def test_any_altered_byte_is_found(cache: TensorCache, fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the header and of the data, one at a time."""
    cache.get("group", "key", lambda: numbers(count=8).reshape(2, 4))
    path = chunk(cache.root)
    monkeypatch.setattr(logging.getLogger("nested_lora"), "disabled", True)
    for position in range(path.stat().st_size):
        flip(path, position)
        built = []
        got = fresh().get(
            "group", "key", lambda built=built: built.append(1) or numbers(count=8).reshape(2, 4)
        )
        assert built and same(got, numbers(count=8).reshape(2, 4)), position


def test_a_file_damaged_after_its_first_reading_is_noticed(cache: TensorCache) -> None:
    cache.get("group", "key", numbers)
    cache.get("group", "key", never)
    path = chunk(cache.root)
    flip(path, 1000)
    os.utime(path, (1, 1))
    assert torch.equal(cache.get("group", "key", numbers), numbers())


def test_foreign_files_are_ignored_and_kept(
    cache: TensorCache, fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache.root / "group"
    folder.mkdir(parents=True)
    foreign = ["key.npy", "key.float32.npy", "key.float32.zz.npy", "notes.txt", ".tmp-mine"]
    for name in foreign:
        (folder / name).write_text("not ours")
    (folder / f"key.float32.{'0' * 32}.npy").mkdir()  # a folder named like a file
    assert not cache.has("group", "key")
    assert torch.equal(cache.get("group", "key", numbers), numbers())
    (folder / f"key.float32.{'0' * 32}.npy").rmdir()
    assert torch.equal(fresh().get("group", "key", never), numbers())
    assert main(["--root", str(cache.root), "--clear"]) == 0
    assert f"{FILE_BYTES} bytes" in capsys.readouterr().out
    assert files(folder) == sorted(foreign)


def test_an_unreadable_file_is_not_removed(
    cache: TensorCache, fresh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get("group", "key", numbers)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "fromfile", refuse)
    assert torch.equal(fresh().get("group", "key", numbers), numbers())
    assert "Too many open files" in caplog.text and chunk(cache.root).exists()


def test_a_file_removed_while_it_is_read_is_built_again(
    cache: TensorCache,
    fresh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    small_maps: None,
) -> None:
    cache.get("group", "key", numbers)
    reader = fresh()
    path = chunk(cache.root)
    from_file = torch.from_file

    def removed(*args: object, **kwargs: object) -> Tensor:
        monkeypatch.setattr(torch, "from_file", from_file)
        path.unlink()
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch, "from_file", removed)
    assert torch.equal(reader.get("group", "key", numbers), numbers())
    assert chunk(cache.root).exists() and not caplog.messages


def fill(cache: TensorCache, groups: list[str]) -> None:
    """One file in each group, left by another run, last used in this order, all of them long ago."""
    cache = TensorCache(cache.root, 1)
    for age, group in enumerate(reversed(groups)):
        cache.get(group, "key", numbers)
        os.utime(cache.root / group, (10_000 - age, 10_000 - age))


def test_make_room_removes_the_groups_unused_longest(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache", 3.5 * FILE_BYTES / 1e9)
    fill(cache, ["oldest", "middle", "newest"])
    for reader in (cache, TensorCache(cache.root, cache.limit_gb)):
        assert reader.make_room("new", FILE_BYTES // 2)
        assert files(cache.root) == ["CACHE", "middle", "newest", "oldest"]
    assert cache.make_room("new", FILE_BYTES)
    assert files(cache.root) == ["CACHE", "middle", "newest"]
    assert cache.make_room("new", 2 * FILE_BYTES)
    assert files(cache.root) == ["CACHE", "newest"]


def test_make_room_leaves_what_this_run_uses(tmp_path: Path) -> None:
    """A group that the instance has read or stored stays, until it is dropped; only what others left goes."""
    cache = TensorCache(tmp_path / "cache", 2.5 * FILE_BYTES / 1e9)
    fill(cache, ["left"])
    cache.get("mine", "key", numbers)
    assert not cache.make_room("new", 3 * FILE_BYTES) and cache.has("left", "key")
    assert cache.make_room("new", FILE_BYTES) and not cache.has("left", "key") and cache.has("mine", "key")
    assert not cache.make_room("new", 2 * FILE_BYTES)
    cache.drop("mine")
    assert cache.make_room("new", 2 * FILE_BYTES)


def test_reading_a_group_counts_as_use(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache", 3.5 * FILE_BYTES / 1e9)
    fill(cache, ["oldest", "middle", "newest"])
    TensorCache(cache.root, 1).get("oldest", "key", never)
    assert cache.make_room("new", 2 * FILE_BYTES)
    assert files(cache.root) == ["CACHE", "oldest"]


def test_last_use_is_noted_once_a_minute(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    monkeypatch.setattr(os, "utime", lambda path: noted.append(Path(path).name))
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds in (0, 59, 2, 30):
        now[0] += seconds
        cache.get("group", "key", numbers)
    cache.get("other", "key", numbers)
    assert noted == ["group", "group", "other"]


def test_make_room_removes_nothing_when_that_would_not_do(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache", 3.5 * FILE_BYTES / 1e9)
    fill(cache, ["other", "group"])
    assert not cache.make_room("group", 3 * FILE_BYTES)  # its own file stays
    assert files(cache.root) == ["CACHE", "group", "other"]
    assert cache.make_room("group", 2 * FILE_BYTES)
    assert files(cache.root) == ["CACHE", "group"]


def test_nothing_needed_always_fits(tmp_path: Path) -> None:
    fill(TensorCache(tmp_path / "cache", 1), ["other", "group"])
    assert TensorCache(tmp_path / "cache", 1e-9).make_room("group", 0)
    assert files(tmp_path / "cache") == ["CACHE", "group", "other"]


def test_make_room_leaves_a_reserve_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path / "cache", 100)
    free = 2 * 10**9 + FILE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert cache.make_room("new", FILE_BYTES) and not cache.make_room("new", FILE_BYTES + 1)
    fill(cache, ["oldest", "newest"])
    cache = TensorCache(tmp_path / "cache", 100)
    assert cache.make_room("new", FILE_BYTES + 1)
    assert files(cache.root) == ["CACHE", "newest"]


def test_other_processes_count_and_what_they_removed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    one, two = (TensorCache(tmp_path / "cache", 2.5 * FILE_BYTES / 1e9) for _ in range(2))
    one.get("a", "key", numbers)
    two.get("b", "key", numbers)
    now[0] += 61
    assert not one.make_room("a", 2 * FILE_BYTES)
    two.drop("b")
    now[0] += 2  # a refusal is not for what was there a minute ago
    assert one.make_room("a", FILE_BYTES)


def test_the_folder_is_looked_through_once_a_minute(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks = [1000.0], []
    survey = tensor_cache.groups_in
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tensor_cache, "groups_in", lambda root: looks.append(now[0]) or survey(root))
    for key, seconds in enumerate((0, 59, 2, 30)):
        now[0] += seconds
        cache.get("group", str(key), numbers)
        cache.get("group", str(key), never)
    assert looks == [1000, 1061]


def test_storing_removes_groups_unused_longest(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache", 2.5 * FILE_BYTES / 1e9)
    fill(cache, ["oldest", "newest"])
    cache.get("new", "key", numbers)
    assert files(cache.root) == ["CACHE", "new", "newest"]


def test_what_does_not_fit_is_built_every_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TensorCache(tmp_path / "cache", 1.5 * FILE_BYTES / 1e9)
    cache.get("group", "one", numbers)
    built = []
    for key in ("two", "two", "three"):
        assert torch.equal(cache.get("group", key, lambda: built.append(1) or numbers(2)), numbers(2))
    assert len(built) == 3 and not cache.has("group", "two") and cache.has("group", "one")
    (message,) = caplog.messages
    assert "set cache_gb" in message and "\n" not in message and f"{1.5 * FILE_BYTES / 1e9:g} GB" in message


def test_nothing_is_created_for_what_does_not_fit(tmp_path: Path) -> None:
    TensorCache(tmp_path / "cache", 1e-9).get("group", "key", numbers)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_no_error(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get("group", "stored", numbers)

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for key in ("one", "two"):
        assert torch.equal(cache.get("group", key, lambda: numbers(3)), numbers(3))
    cache.describe("group", {"depth": 3})
    assert len(caplog.messages) == 1 and "No space left" in caplog.text
    assert files(cache.root / "group") == [chunk(cache.root, key="stored").name]  # no temporary file either
    monkeypatch.undo()
    cache.get("group", "one", lambda: numbers(3))
    assert cache.has("group", "one")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    assert torch.equal(TensorCache(tmp_path / "cache", 1).get("group", "key", numbers), numbers())
    assert len(caplog.messages) == 1


def test_a_group_removed_during_the_write_is_no_error(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace = os.replace

    def removed_before(source: Path, target: Path) -> None:
        shutil.rmtree(cache.root / "group")
        replace(source, target)

    monkeypatch.setattr(os, "replace", removed_before)
    assert torch.equal(cache.get("group", "key", numbers), numbers())
    assert not caplog.messages and not cache.has("group", "key")


@pytest.mark.parametrize(("age", "kept"), [(3500, True), (3700, False)])
def test_remains_of_killed_processes_are_removed(cache: TensorCache, fresh, age: float, kept: bool) -> None:
    cache.get("group", "key", numbers)
    remains = cache.root / "group" / ".tmp-123-0123abcd"
    remains.write_bytes(b"half")
    os.utime(remains, (time.time() - age,) * 2)
    fresh().make_room("group", 1)
    assert remains.exists() == kept


def test_a_failing_build_stores_nothing(cache: TensorCache) -> None:
    with pytest.raises(AssertionError):
        cache.get("group", "key", never)
    assert not cache.root.exists()


def test_drop(cache: TensorCache, small_maps: None) -> None:
    kept = cache.get("group", "key", numbers)
    cache.get("other", "key", numbers)
    cache.describe("group", {"depth": 3})
    cache.drop("group")
    cache.drop("absent")
    assert files(cache.root) == ["CACHE", "other"] and not cache.has("group", "key")
    assert torch.equal(kept, numbers())  # who still reads it can
    assert torch.equal(cache.get("group", "key", lambda: numbers(7)), numbers(7))


def test_maps_of_a_group_that_another_process_dropped_are_closed(
    cache: TensorCache, fresh, small_maps: None
) -> None:
    cache.get("group", "key", numbers)
    fresh().drop("group")
    cache._measure(0)
    assert torch.equal(cache.get("group", "key", lambda: numbers(7)), numbers(7))


def test_describe_writes_once(cache: TensorCache) -> None:
    cache.describe("group", {"depth": 3, "view": (1, 0), "what": "größe"})
    cache.describe("group", {"depth": 4})
    text = (cache.root / "group" / "about.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"depth": 3, "view": [1, 0], "what": "größe"} and "größe" in text
    assert files(cache.root / "group") == ["about.json"] and (cache.root / "CACHE").is_file()


def test_a_tensor_of_another_device_is_stored_from_the_cpu(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a device: a tensor that becomes readable by `cpu()` only."""

    class Elsewhere:
        def detach(self) -> "Elsewhere":
            return self

        def cpu(self) -> Tensor:
            return numbers()

    assert cache.get("group", "key", Elsewhere).device.type == "cpu"
    assert torch.equal(cache.get("group", "key", never), numbers())
    assert torch.equal(TensorCache(cache.root, 0).get("group", "key", Elsewhere), numbers())


def _race(root: Path, value: float, both_build: "multiprocessing.synchronize.Barrier", results) -> None:
    def build() -> Tensor:
        both_build.wait(20)
        return numbers(value)

    got = TensorCache(root, 1).get("group", "key", build)
    results.put(float(got[0]))


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 2.0)], ids=["same content", "different content"])
def test_two_processes_build_the_same_key_at_once(
    cache: TensorCache, fresh, values: tuple[float, float]
) -> None:
    context = multiprocessing.get_context("fork")
    both_build, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_race, args=(cache.root, value, both_build, results)) for value in values
    ]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert set(got) <= set(values)
    read = {float(fresh().get("group", "key", never)[0]) for _ in range(5)}
    assert len(read) == 1 and read <= set(values)
    assert 1 <= len(files(cache.root / "group")) <= len(set(values))


def test_who_builds_later_takes_what_was_stored_meanwhile(cache: TensorCache, fresh) -> None:
    def build() -> Tensor:
        fresh().get("group", "key", lambda: numbers(1))
        return numbers(2)

    assert torch.equal(cache.get("group", "key", build), numbers(1))
    assert len(files(cache.root / "group")) == 1


def test_threads_share_an_instance(cache: TensorCache, small_maps: None) -> None:
    wrong = []

    def work() -> None:
        for key in range(30):
            if not torch.equal(cache.get("group", str(key), lambda key=key: numbers(key)), numbers(key)):
                wrong.append(key)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and len(files(cache.root / "group")) == 30
