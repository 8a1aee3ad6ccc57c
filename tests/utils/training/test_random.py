"""A stream depends on its whole name, on nothing else, and is the same everywhere."""

import numpy as np
import pytest
import torch

from utils.training.random import kept_generators, numpy_rng, rng, seed_generators

KEYS = [("a",), ("a1", 2), *(("a", *numbers) for numbers in [(1,), (12,), (1, 2), (2, 1), (1, 2, 0), (-1,)])]
KEYS += [("a", "1", 2)]


def torch_draw(*key: str | int) -> float:
    return float(torch.rand((), generator=rng(*key), dtype=torch.float64))


def numpy_draw(*key: str | int) -> float:
    return float(numpy_rng(*key).random())


def test_every_name_and_number_counts_and_their_places() -> None:
    for draw in (torch_draw, numpy_draw):
        assert len({draw(*key) for key in KEYS}) == len(KEYS)
        assert draw("a", 2**70) == draw("a", 2**70) != draw("a", 2**71)
        assert draw("a", np.int64(3)) == draw("a", 3)


def test_streams_never_change_nor_touch_the_global_state() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.randint(1000, (4,), generator=rng("a", 1)).tolist() == [845, 968, 564, 424]
    assert numpy_rng("a", 1).integers(1000, size=4).tolist() == [685, 791, 371, 774]
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_global_generators_of_a_device_are_seeded_and_kept(name: str) -> None:
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device(name)
    torch.manual_seed(5)
    expected = torch.rand(3), torch.rand(3, device=device)
    seed_generators(5, device)
    with kept_generators(device):
        torch.rand(3), torch.rand(3, device=device)
    assert torch.equal(torch.rand(3), expected[0]) and torch.equal(torch.rand(3, device=device), expected[1])
