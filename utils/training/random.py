"""Named random streams: generators seeded by a name and numbers alone, the same on every machine.

    generator = rng("gumbel noise", seed, task, step)     # torch.Generator on the CPU
    chosen = numpy_rng("order", seed, task).permutation(100)

A stream is named by what it is for; different names or numbers give unrelated streams (PyTorch's generator
reads 32 bits of a seed), and no global state is used.
"""

import hashlib
import json

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
