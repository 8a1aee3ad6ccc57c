"""utils.training.distributed: one process exchanges nothing, two and three real ones what they should."""

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError
from utils.training.distributed import (
    VARIABLES,
    DistributedContext,
    context_from_environment,
    init_distributed,
    local_device,
)

CONTEXT = multiprocessing.get_context("forkserver")  # which preloads what tests.crash says, if imported
TOTALS = (0, 1, 2, 5, 6)  # of rows: with 2 and 3 ranks equal, unequal and empty shares
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
TEXTS = ["logs/Läufe/1", "", "x" * 5000]
REFUSALS = [UserError("no"), OSError(28, "No space left on device", "a.json")]
TAILS = ((), (3,), (2, 4), (0,))
Work = Callable[[DistributedContext], dict[str, Any]]


# --- what the ranks do --------------------------------------------------------------------------------------


def all_rows(total: int, dtype: torch.dtype, tail: tuple[int, ...]) -> Tensor:
    """The rows (total, *tail) that the ranks hold together."""
    values = torch.randn((total, *tail), generator=torch.Generator().manual_seed(total)) * 50
    return values.to(dtype) if dtype.is_floating_point else values.abs().to(dtype)


def gradients(rank: int) -> list[Tensor]:
    """A rank's terms: two dtypes, a scalar, a transpose, an empty tensor, a parameter with gradients."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(3, 5, generator=generator),
        torch.arange(4) + rank,
        torch.randn((), generator=generator),
        torch.randn(2, 7, generator=generator).T,
        torch.zeros(0),
        torch.nn.Parameter(torch.randn(6, generator=generator)),
    ]


def exchange(world: DistributedContext) -> dict[str, Any]:
    """Everything a rank can ask the others, and what it was told."""
    told: dict[str, Any] = {"world": (world.rank, world.size, world.local_rank, world.local_size)}
    told["rows"] = {
        (total, dtype, tail): world.all_gather(all_rows(total, dtype, tail)[world.shard(total)], total)
        for total in TOTALS
        for dtype in DTYPES
        for tail in TAILS
    }
    learned = torch.ones(7, 2, requires_grad=True)
    told["learned rows"] = world.all_gather((learned * 2)[world.shard(7)], 7)
    told["transposed rows"] = world.all_gather(torch.arange(21).view(3, 7).T[world.shard(7)], 7)
    told["wrong rows"] = refusal(lambda: world.all_gather(torch.zeros(5), 4))
    tensors = gradients(world.rank)
    kept = [tensor.data_ptr() for tensor in tensors]
    world.all_reduce(tensors)
    told["sums"], told["in place"] = tensors, [tensor.data_ptr() for tensor in tensors] == kept
    world.all_reduce([])
    told["any"] = [world.any(flag) for flag in (*(rank == world.rank for rank in range(world.size)), False)]
    world.barrier()
    world.check_same("the hash of nothing", "")
    world.check_same("the hash of the model", "0123abcd")
    told["one differs"] = refusal(lambda: world.check_same("the model", f"{world.rank == 1}"))
    told["all differ"] = refusal(lambda: world.check_same("the order", f"{world.rank}"))
    told["texts"] = [world.on_main(lambda text=text: text) for text in TEXTS]
    told["decided"] = world.on_main(lambda: f"by rank {world.rank}")
    told["refused"] = [refusal(lambda error=error: world.on_main(lambda: fail(error))) for error in REFUSALS]
    return told


def fail_alone(world: DistributedContext) -> dict[str, Any]:
    """One rank ends with an error of its own, while the others wait for it."""
    if world.rank == 1:
        raise UserError("b.png is damaged")
    world.barrier()
    raise AssertionError


def fail(error: Exception) -> str:
    raise error


def refusal(call: Callable[[], Any]) -> str:
    """The text of the error that the call must raise."""
    with pytest.raises((ValueError, UserError, OSError)) as caught:
        call()
    return str(caught.value)


# --- real processes -----------------------------------------------------------------------------------------


def run_ranks(size: int, folder: Path, work: Work = exchange) -> list[dict[str, Any]]:
    """`work` in `size` processes, with torchrun's environment; what each was told, by rank."""
    minute = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=minute)
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the launcher's, as with torchrun
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    children = []
    for rank in range(size):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (environment, folder / f"{rank}.pt", work)
        children.append(CONTEXT.Process(target=_child, args=arguments, daemon=True))
        children[-1].start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _child(environment: dict[str, str], path: Path, work: Work) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    told = {}
    try:
        with init_distributed(torch.device("cpu")) as world:
            told = work(world)
    except UserError as error:
        told["error"] = str(error)
    torch.save(told | {"left": not dist.is_initialized()}, path)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(request.param, tmp_path_factory.mktemp("ranks"))


def test_ranks_know_who_they_are_and_leave_the_group(ranks):
    size = len(ranks)
    assert [told["world"] for told in ranks] == [(rank, size, rank, size) for rank in range(size)]
    assert all(told["left"] for told in ranks)


def test_gathered_rows_are_those_of_one_process(ranks):
    for told in ranks:
        assert len(told["rows"]) == len(TOTALS) * len(DTYPES) * len(TAILS)
        for (total, dtype, tail), rows in told["rows"].items():
            assert rows.dtype == dtype
            assert rows.equal(all_rows(total, dtype, tail)), (total, dtype, tail)
        assert told["learned rows"].equal(torch.full((7, 2), 2.0)) and not told["learned rows"].requires_grad
        assert told["transposed rows"].equal(torch.arange(21).view(3, 7).T)
        assert f"rank {told['world'][0]} of {len(ranks)} holds 5 of 4 rows" in told["wrong rows"]


def test_sums_are_in_place_and_the_same_bits_on_all_ranks(ranks):
    expected = [torch.stack(parts).sum(0) for parts in zip(*map(gradients, range(len(ranks))), strict=True)]
    for told in ranks:
        assert told["in place"]
        for total, first, wanted in zip(told["sums"], ranks[0]["sums"], expected, strict=True):
            assert total.equal(first)
            torch.testing.assert_close(total, wanted, check_stride=False)
        assert told["sums"][-1].requires_grad


def test_all_ranks_hear_of_a_flag_of_differing_texts_and_of_what_rank_0_decides_or_refuses(ranks):
    others = ", ".join(str(rank) for rank in range(1, len(ranks)))
    for told in ranks:
        assert told["any"] == [True] * len(ranks) + [False]
        assert told["one differs"].startswith("the model differs on rank 1 from rank 0")
        assert told["all differ"].startswith(f"the order differs on rank {others} from rank 0")
        assert told["texts"] == TEXTS and told["decided"] == "by rank 0"
        mistake, full = told["refused"]
        assert mistake == "no" and "a.json" in full and "No space left" in full


def test_the_others_are_told_when_one_rank_has_ended(tmp_path):
    waiting, ended = run_ranks(2, tmp_path, fail_alone)
    assert ended["error"] == "b.png is damaged"
    assert "rank 0 of 2 has lost the connection" in waiting["error"] and "--resume" in waiting["error"]
    assert waiting["left"] and ended["left"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of torchrun that are given, as text, and removes the others."""

    def put(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


# --- one process --------------------------------------------------------------------------------------------


def test_shares_cover_every_row_once_and_differ_by_one_at_most():
    for size, n in itertools.product([1, 2, 3, 4, 7, 8], range(30)):
        shares = [list(range(n))[DistributedContext(rank, size).shard(n)] for rank in range(size)]
        assert [row for share in shares for row in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- environment and devices --------------------------------------------------------------------------------


def test_environment_of_torchrun(environment):
    several = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    for values in (several, several | {"LOCAL_WORLD_SIZE": "2"}):
        environment(**values)
        assert context_from_environment() == DistributedContext(rank=3, size=4, local_rank=1, local_size=2)
    for values in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        environment(**values)
        assert context_from_environment() == DistributedContext()


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", value) for value in ("two", "", "0")]
    + [("RANK", value) for value in (None, "-1", "2")]
    + [("LOCAL_RANK", None), ("LOCAL_RANK", "1.5"), ("LOCAL_WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "3")],
)
def test_malformed_environment_is_refused(environment, name, value):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {name: value}
    environment(**{name: value for name, value in whole.items() if value is not None})
    with pytest.raises(UserError, match="WORLD_SIZE=.*unset WORLD_SIZE"):
        context_from_environment()


def test_each_local_rank_takes_its_gpu_if_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, world, expected in (
        ("cuda", DistributedContext(3, 4, 1, local_size=2), "cuda:1"),
        ("cuda:0", DistributedContext(2, 4, 0, local_size=2), "cuda:0"),
        ("cuda:1", DistributedContext(), "cuda:1"),
        ("cpu", DistributedContext(1, 2, 1, local_size=2), "cpu"),
    ):
        assert local_device(torch.device(asked), world) == torch.device(expected)
    told = "3 processes on this machine .* sees 2: lower .* to at most 2, or set device"
    for rank in range(3):
        with pytest.raises(UserError, match=told):
            local_device(torch.device("cuda:0"), DistributedContext(rank, 3, rank, local_size=3))


@pytest.mark.parametrize(
    ("device", "fails", "done"),
    [
        ("cpu", False, ["gloo", "leave"]),
        ("cpu", True, ["gloo", "leave"]),
        ("cuda:1", False, ["cuda:1", "nccl", "leave"]),
        ("cuda:1", True, ["cuda:1", "nccl"]),
    ],
)
def test_group_is_left_unless_that_could_wait_for_ever(environment, monkeypatch, device, fails, done):
    seen, given = [], {}
    environment(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **more: (seen.append(args[0]), given.update(more))
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append("leave"))
    with contextlib.suppress(UserError), init_distributed(torch.device(device)):
        if fails:
            raise UserError("a mistake")
    assert seen == done
    assert given["device_id"] == (None if device == "cpu" else torch.device(device))
