"""Devices, precision and memory; checks for finite numbers; hashes and packing of tensors.

device, warning = resolve_device("auto")
with autocast(device, "bf16"):
    features = network(images)
"""

import contextlib
import ctypes
import hashlib
import resource
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.errors import UserError, is_out_of_memory

Item = TypeVar("Item")
END = object()  # marks the end of the items of `one_ahead`
MEMORY_KEYS = ("batch_size", "grad_accumulation", "eval_batch_size", "ranpac_dim")  # of a config


def resolve_device(spec: str | int | list[str | int]) -> tuple[torch.device, str | None]:
    """The device a config asks for, and a warning where another one is used.

    "auto" takes CUDA when there is one. A published list (`["0"]`) takes that GPU, or the CPU with a warning
    where it is absent; `["-1"]` is the CPU.

    Raises UserError: the device was asked for by name and is absent.
    """
    names = [str(item).lower() for item in (spec if isinstance(spec, list) else [spec])]
    name = names[0]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in ("cpu", "-1"):
        return torch.device("cpu"), None
    if name == "mps":
        if torch.backends.mps.is_available():
            return torch.device("mps"), None
        seen = "no MPS device"
    else:
        index, gpus = int(name.removeprefix("cuda").removeprefix(":") or 0), torch.cuda.device_count()
        if index < gpus:
            several = f"device = {spec!r}: only GPU {index} is used" if len(names) > 1 else None
            return torch.device("cuda", index), several
        if name.isdecimal():
            return torch.device("cpu"), f"device = {spec!r}: no such GPU here, running on the CPU"
        seen = f"{gpus} CUDA devices"
    raise UserError(f'device = "{spec}" was asked for, but this PyTorch sees {seen}; use "auto" or "cpu"')


def resolve_precision(precision: str, device: torch.device) -> tuple[str, str | None]:
    """The precision to compute in, and a warning where it is not the one asked for.

    On a device without instructions for bf16 it would be emulated, at a thirtieth of the speed of fp32
    (measured on a CPU with AVX2 only): fp32 is used instead. "auto" is bf16 where that is known to be faster.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) and has_bf16_products(device) else "fp32", None
    if precision != "bf16" or has_bf16(device):
        return precision, None
    fault = f"{device.type} has no bf16 instructions here, without which it is very slow"
    return "fp32", f'precision = "bf16": {fault}; using fp32'


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (CPU: AVX512 or AMX, as oneDNN needs)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def has_bf16_products(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than fp32: a GPU, or a CPU with an instruction for it."""
    if device.type != "cpu":
        return device.type == "cuda"
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast on the device, or nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def not_finite_advice(precision: str) -> str:
    """Advice for numbers that became NaN or infinite in a run of this precision."""
    exact = "" if precision == "fp32" else 'set precision to "fp32", '
    return f"{exact}lower the learning rates or the weight decay, or start from other weights"


def require_finite(values: Tensor, what: str, precision: str) -> Tensor:
    """The values themselves. UserError: one is NaN or infinite; `what`, a plural, names them."""
    if not torch.isfinite(values).all():
        raise UserError(f"{what} are not finite (NaN or infinity): {not_finite_advice(precision)}")
    return values


def predictions(scores: Tensor, what: str, precision: str) -> Tensor:
    """The class of the highest score, (B, C, ...) -> (B, ...); every tested prediction is made here.

    Raises UserError: a score is NaN or infinite; `what` says of what the scores are.
    """
    return require_finite(scores, f"the scores of {what}", precision).argmax(dim=1)


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory instead of returning it to the system after every tensor.

    By default every large tensor is mapped, zeroed page by page and unmapped again; on the CPU that took 30 %
    of a training step. Without glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # parameter numbers of mallopt(3)
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 * 2**20)):
            mallopt(parameter, value)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextlib.contextmanager
def out_of_memory_advice(sizes: Mapping[str, int], editable: Collection[str]) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that says which sizes (`MEMORY_KEYS`) to set to what.

    editable: keys that change no result, and with which a run can be resumed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            sizes = {key: size for key, size in sizes.items() if key != "ranpac_dim"}  # no ridge on a GPU
        now = ", ".join(f"{key} {value}" for key, value in sizes.items())
        halved = [f"{key}={max(1, n // 2)}" for key, n in sizes.items() if key != "grad_accumulation"]
        edits = " or ".join(key for key in sizes if key in editable)
        batch, smaller = sizes.get("batch_size", 1), ""
        if "grad_accumulation" in editable and (parts := sizes.get("grad_accumulation", batch)) < batch:
            more = min(2 * parts, batch)
            smaller = f"set grad_accumulation={more} for the same result in smaller parts, or "
        raise UserError(
            f"out of memory with {now}: {smaller}halve the sizes to {', '.join(halved)}; what is saved can "
            f"be resumed after editing {edits} in its config.json"
        ) from error


@contextlib.contextmanager
def dead_worker_advice() -> Iterator[None]:
    """Turn PyTorch's error for a data worker that has died into a UserError.

    A signal handler raises it, so it can come from any statement that runs while workers are alive.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a data worker has ended before its work was done ({first_line(error)}): it was killed, or "
            "there was too little memory for it; lower num_workers (0 uses none) and go on with --resume "
            "where a run had begun"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's text without its full stop, or its class when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each prepared in a thread while the caller works on the one before it."""
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, source, END)
        while (item := pending.result()) is not END:
            pending = thread.submit(next, source, END)
            yield item


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pack_tensors(tree: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into JSON with placeholders and a flat dict of their tensors.

    Dict keys become strings. `unpack_tensors` puts the two together again.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach()
            return {"tensor": name}
        if isinstance(node, dict):
            return {str(key): walk(value, f"{name}.{key}") for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{name}.{i}") for i, value in enumerate(node)]
        return node

    return walk(tree, prefix), tensors


def unpack_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `pack_tensors`: placeholders become tensors."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"} and isinstance(tree["tensor"], str):
            return tensors[tree["tensor"]]
        return {key: unpack_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack_tensors(value, tensors) for value in tree]
    return tree
