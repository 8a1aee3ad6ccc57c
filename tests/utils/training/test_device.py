"""Devices by every name users have, precision, packing of nested state, keys to generators."""

from collections.abc import Iterator

import pytest
import torch

from utils.errors import UserError
from utils.metric_catalogue import COSTS, by_key
from utils.training.device import (
    MEMORY_KEYS,
    one_ahead,
    out_of_memory_advice,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
    sha256_of,
)

CPU = torch.device("cpu")


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    specs = {"cpu": ["cpu", "CPU", ["-1"], [-1], "-1"], "mps": ["mps", "MPS"]}
    specs |= {"cuda:0": ["auto", "cuda", 0], "cuda:1": ["cuda:1", ["1"], "1"]}
    for name, asked in specs.items():
        assert [resolve_device(spec) for spec in asked] == [(torch.device(name), None)] * len(asked)
    device, warning = resolve_device(["0", "1"])
    assert device == torch.device("cuda:0") and "only GPU 0" in warning


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published list falls back to the CPU with a warning; what is asked for by name must be there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for spec in (["0"], [0], "0", ["0", "1"]):
        device, warning = resolve_device(spec)
        assert device == CPU and "running on the CPU" in warning
    for spec in ("cuda", "cuda:3", "mps"):
        with pytest.raises(UserError, match="asked for"):
            resolve_device(spec)


def test_bf16_is_taken_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr("utils.training.device.has_bf16", lambda device, has=has: has)
        assert resolve_precision("fp32", CPU) == ("fp32", None)
        precision, warning = resolve_precision("bf16", CPU)
        assert (precision, warning is None) == (("bf16", True) if has else ("fp32", False))
    assert "no bf16 instructions" in warning


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "avx512_f", None])
def test_auto_is_bf16_where_that_is_the_faster(
    monkeypatch: pytest.MonkeyPatch, instruction: str | None
) -> None:
    """Never where the libraries have it but the CPU multiplies in fp32, and never with a warning."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    for has in (True, False):
        monkeypatch.setattr("utils.training.device.has_bf16", lambda device, has=has: has)
        expected = "bf16" if has and instruction in ("avx512_bf16", "amx_bf16") else "fp32"
        assert resolve_precision("auto", CPU) == (expected, None)
    assert resolve_precision("auto", torch.device("mps")) == ("fp32", None)


def test_sha256_of_tensors_sees_names_values_shapes_and_not_the_order() -> None:
    a, b = torch.arange(4.0), torch.ones(2)
    expected = sha256_of({"a": a, "b": b})
    assert sha256_of({"b": b, "a": a}) == expected
    others = [{"a": a}, {"a": b, "b": a}, *({"a": x, "b": b} for x in (a.view(2, 2), a + 1, a.int()))]
    assert expected not in map(sha256_of, others)


ON_GPU = [torch.OutOfMemoryError("CUDA"), RuntimeError("CUDA error: out of memory")]
ON_CPU = [MemoryError(), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", [*ON_GPU, *ON_CPU], ids=repr)
def test_out_of_memory_is_advice(error: Exception) -> None:
    training = dict(zip(MEMORY_KEYS, (32, 2, 64, 2000), strict=True))
    ridge, both = "" if error in ON_GPU else ", ranpac_dim=1000", {"grad_accumulation", "eval_batch_size"}
    for sizes, editable, advice in (
        (training, both, f"set grad_accumulation=4 .*batch_size=16, eval_batch_size=32{ridge};"),
        (training, {"eval_batch_size"}, f"size 64[^:]*: halve .*=32{ridge}; .*editing eval_batch_size in"),
        ({"eval_batch_size": 1}, both, "to eval_batch_size=1; .*editing eval_batch_size in"),
        ({"batch_size": 32, "eval_batch_size": 2}, both, "batch_size 32, eval_batch_size 2: halve the sizes"),
    ):
        with pytest.raises(UserError, match=advice), out_of_memory_advice(sizes, editable):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_advice(training, both):
        raise RuntimeError("shapes")


def test_peak_memory_is_in_the_unit_that_reports_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    spec = by_key(COSTS)["peak_memory_mb"]
    assert (spec.text(peak_memory_mb(torch.device("cuda"))), spec.unit) == ("3", "MiB")


def test_one_ahead_gives_the_same_items_and_passes_errors_on() -> None:
    started: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            started.append(number)
            yield number
        raise ValueError("at the end")

    received = []
    with pytest.raises(ValueError, match="at the end"):
        for item in one_ahead(items()):
            received.append(item)
    assert received == started == [0, 1, 2, 3]
    assert list(one_ahead([])) == [] and list(one_ahead([None, 0])) == [None, 0]
    abandoned = one_ahead(iter(range(3)))
    assert next(abandoned) == 0
    abandoned.close()
