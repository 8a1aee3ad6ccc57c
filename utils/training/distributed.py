"""Data-parallel training under torchrun: the rank of this process, and exchange between processes.

with init_distributed(torch.device("cuda")) as distributed:
    rows = network(images[distributed.shard(len(images))])
    features = distributed.all_gather(rows, len(images))

One process exchanges nothing. Several must call the same methods of `DistributedContext` in the same order.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import RESUME, UserError, os_error_sentence

Answer = TypeVar("Answer")
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # that torchrun sets


@dataclass(frozen=True)
class DistributedContext:
    """One process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the local_size processes of this machine
    device: torch.device = torch.device("cpu")  # if it is CUDA, exchanged tensors pass through it
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def _carrier(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def shard(self, n: int) -> slice:
        """This rank's contiguous rows of n; the shards of all ranks, in rank order, are all n rows."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_gather(self, rows: Tensor, total: int) -> Tensor:
        """Rows of all ranks in rank order, (total, ...), bit for bit, without gradients.

        They are on the device of `rows`. `rows`, (n_r, ...), are this rank's shard(total), possibly none,
        else ValueError; one process gets them back.
        """
        counts = [total * (rank + 1) // self.size - total * rank // self.size for rank in range(self.size)]
        if len(rows) != counts[self.rank]:
            raise ValueError(
                f"rank {self.rank} of {self.size} holds {len(rows)} of {total} rows, not {counts}"
            )
        if self.size == 1 or total == 0:
            return rows
        padded = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype, device=self._carrier)
        padded[: len(rows)] = rows.detach()
        parts = padded.new_empty((self.size, *padded.shape))  # travels as bytes, whatever its dtype
        dist.all_gather_into_tensor(parts.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    @torch.no_grad()
    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum of each tensor over ranks, in place, the same bits on all; one exchange for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1).to(self._carrier) for tensor in alike])
            dist.all_reduce(flat)
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return bool(self.all_gather(torch.tensor([flag]), self.size).any())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def check_same(self, what: str, text: str) -> None:
        """Check that a text, such as a hash, is the same on all ranks.

        Raises UserError: on every rank, naming `what` and the ranks whose text differs from rank 0's.
        """
        digests = self.all_gather(torch.tensor([list(hashlib.sha256(text.encode()).digest())]), self.size)
        differing = ", ".join(str(rank) for rank in range(self.size) if not digests[rank].equal(digests[0]))
        if differing:
            raise UserError(
                f"{what} differs on rank {differing} from rank 0: run the same code on devices of one kind"
            )

    def on_main(self, call: Callable[[], Answer]) -> Answer:
        """Make a call on rank 0 only, and return its result, which pickle must take, on every rank.

        If it raises a UserError or OSError, rank 0 raises that, and the others a UserError with its text.
        """
        reply, refused = [None, None], None  # the result, or the text of the error
        if self.is_main:
            try:
                reply[0] = call()
            except (UserError, OSError) as error:
                refused = error
                reply[1] = os_error_sentence(error) if isinstance(error, OSError) else str(error)
        if self.size > 1:
            dist.broadcast_object_list(reply, src=0, device=self._carrier)
        if reply[1] is not None:
            raise refused or UserError(reply[1])
        return reply[0]


def context_from_environment() -> DistributedContext:
    """This process as torchrun's environment describes it; a single one where WORLD_SIZE is absent or 1.

    Raises UserError: variables of torchrun are missing or inconsistent.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    try:
        if int(given.get("WORLD_SIZE", 1)) == 1:
            return DistributedContext()
        size, rank, local_rank = (int(given[name]) for name in VARIABLES[:3])
        local_size = int(given.get("LOCAL_WORLD_SIZE", local_rank + 1))
        fits = 0 <= rank < size and 0 <= local_rank < local_size <= size
    except (KeyError, ValueError):
        fits = False
    if not fits:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(
            f"{shown} in the environment is not what torchrun sets; use torchrun or unset WORLD_SIZE"
        )
    return DistributedContext(rank, size, local_rank, local_size=local_size)


def local_device(device: torch.device, context: DistributedContext) -> torch.device:
    """Device of this rank: of several each takes the GPU of its local rank, else UserError."""
    if context.size == 1 or device.type != "cuda":
        return device
    seen = torch.cuda.device_count()
    if context.local_size > seen:
        raise UserError(
            f"{context.local_size} processes on this machine need a GPU each, but this PyTorch sees {seen}: "
            f'lower torchrun\'s --nproc_per_node to at most {seen}, or set device to "cpu"'
        )
    return torch.device("cuda", context.local_rank)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an exchange failed since another process has ended: what NCCL or gloo raises then."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Context in which the processes that torchrun started are connected; without torchrun this one alone.

    device: that of the configuration; with CUDA each of several processes takes the GPU of its local rank.

    Raises UserError: the machine has fewer GPUs than processes, torchrun's environment is incomplete, or the
    connection to another process is lost.
    """
    context = context_from_environment()
    context = replace(context, device=local_device(device, context))
    if context.size == 1:
        yield context
        return
    gpu = context.device if context.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        "env://",
        timedelta(minutes=30),
        context.size,
        context.rank,
        device_id=gpu,
    )
    close = gpu is None  # after an error NCCL would wait for ranks that torchrun ends only after this one
    try:
        yield context
        close = True
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise UserError(
            f"rank {context.rank} of {context.size} has lost the connection to another process, which has "
            f"ended: remove the cause that it or torchrun names, then {RESUME}"
        ) from error
    finally:
        if close:
            dist.destroy_process_group()
