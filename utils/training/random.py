"""Named random streams: generators seeded by a name and numbers alone, the same on every machine.

    generator = rng("gumbel noise", seed, task, step)     # torch.Generator on the CPU
    chosen = numpy_rng("order", seed, task).permutation(100)

A stream is named by what it is for; different names or numbers give unrelated streams (PyTorch's generator
reads 32 bits of a seed), and no global state is used. PyTorch's own generators, which new modules draw from:

    with kept_generators(device):             # afterwards they are as they were
        seed_generators(seed, device)
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Key = tuple[str | int, ...]


def stream_seed(*key: str | int) -> int:
    """SHA-256 of names and integers of any size, as an integer of 256 bits."""
    parts = [part if isinstance(part, str) else int(part) for part in key]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest(), "big")


def rng(name: str, *numbers: str | int) -> torch.Generator:
    """The CPU generator of a stream."""
    return torch.Generator().manual_seed(stream_seed(name, *numbers) % 2**63)


def numpy_rng(name: str, *numbers: str | int) -> np.random.Generator:
    """NumPy's generator of a stream, unrelated to `rng` of the same name."""
    return np.random.default_rng(stream_seed(name, *numbers))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that modules on a device draw from; unlike `torch.manual_seed` no other ones."""
    for generator in _own_generators(device):
        generator.manual_seed(seed)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Context after which the generators that modules on a device draw from are as they were before it."""
    generators = _own_generators(device)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _own_generators(device: torch.device) -> list[torch.Generator]:
    """PyTorch's own generators of the CPU, where modules are made, and of the device."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # which makes them
        generators.append(torch.cuda.default_generators[device.index or 0])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators
