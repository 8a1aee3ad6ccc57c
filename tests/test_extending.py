"""docs/extending.md works as written: its method and its adapters, in tiny runs with growth."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import models
import trainer
from backbone.sema_components import ADAPTERS
from models import SCHEMAS, Method
from models.sdlora import SDLoRA
from tests.conftest import ROOT, folder_of
from utils.config.schema import RunConfig
from utils.runs.run_log import read_metrics

Make = Callable[..., RunConfig]
METHOD, NEW_ADAPTERS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL
)


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The code of a block of the page as a module."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(source, name, "exec"), vars(made))
    return made


def losses(config: RunConfig) -> list[float]:
    """Losses of every epoch of a configuration's only run."""
    trainer.train(config)
    events = read_metrics(folder_of(Path(config.logs_root)))
    return [event["loss"] for event in events if event["event"] == "epoch"]


# --- a method -----------------------------------------------------------------------------------------------


def test_the_page_s_method_runs_with_its_loss(
    smoke_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without smoothing it is finetuning to the bit; with it, it learns something else."""
    page = module("models.smooth", METHOD, monkeypatch)
    monkeypatch.setitem(models.METHODS, "smooth", Method(page.SmoothConfig, "models.smooth.Smooth"))
    monkeypatch.setitem(SCHEMAS, "smooth", page.SmoothConfig)
    methods = {
        "finetune": {"model_name": "finetune"},
        "plain": {"model_name": "smooth", "smoothing": 0.0},
        "smooth": {"model_name": "smooth"},
    }
    shared = {"ffn_adapter_type": "adaptmlp", "max_tasks": 2}
    runs = {
        name: losses(smoke_config(**shared, **changes, logs_root=str(tmp_path / name)))
        for name, changes in methods.items()
    }
    assert runs["plain"] == runs["finetune"] != runs["smooth"]


def test_sdlora_trains_with_the_same_hook(smoke_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDLoRA, "loss", lambda self, logits, targets, features: 0 * features.sum() + 3)
    config = smoke_config(model_name="sdlora", init_epoch=1, epochs=1, lora_rank=2, max_tasks=2)
    assert losses(config) == pytest.approx([3.0, 3.0])


# --- an adapter ---------------------------------------------------------------------------------------------


def grown(make: Make, tmp_path: Path, adapter: type[nn.Module], engine: str, patch: Any) -> dict[str, Any]:
    """Accuracies, adapters and losses of a run in which every growing block grows in each of three tasks."""
    patch.setitem(ADAPTERS, "adaptmlp", adapter)
    root = tmp_path / f"{adapter.__name__}_{engine}"
    places = {"logs_root": str(root / "logs"), "cache_root": str(root / "cache")}
    adapters = {"ffn_adapter_type": "adaptmlp", "ffn_num": 4, "expansion": "always", "adapter_lr": 0.05}
    config = make(**adapters, **places, engine=engine, max_tasks=3, func_epoch=2)
    found = losses(config)
    result = json.loads(next(root.rglob("result.json")).read_text())
    assert result["metrics"]["expansions"] == 4
    return {"accuracy": result["accuracy"], "adapters": result["adapters"], "losses": found}


def by_forward(factored: type[nn.Module]) -> type[nn.Module]:
    """The same adapter without factors: a module that knows its `forward` and its parameters only."""

    class ByForward(nn.Module):
        def __init__(self, *sizes: Any) -> None:
            super().__init__()
            self.inner = factored(*sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.inner
            return inner.scale * inner.up_proj(inner.activation(inner.down_proj(x)))

        def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
            return self.inner.parameter_groups()

    return ByForward


def test_adapters_of_any_activation_train_as_written(
    smoke_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By factors, by `forward` alone, and by an overridden `forward`, on either engine."""
    page = module("new_adapters", NEW_ADAPTERS, monkeypatch)

    class Doubled(page.GELUAdapter):  # inherits factors that are not its own any more
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    kinds = (page.GELUAdapter, by_forward(page.GELUAdapter), page.GatedAdapter, Doubled)
    runs = {
        kind: [grown(smoke_config, tmp_path, kind, engine, monkeypatch) for engine in ("fast", "reference")]
        for kind in kinds
    }
    for fast, reference in runs.values():
        assert fast["losses"] == pytest.approx(reference["losses"], rel=1e-3)
        assert (fast["accuracy"], fast["adapters"]) == (reference["accuracy"], reference["adapters"])
    factored, forward, gated, doubled = (fast["losses"] for fast, _ in runs.values())
    assert factored == pytest.approx(forward, rel=1e-3)
    assert factored != pytest.approx(gated, rel=1e-3) and factored != pytest.approx(doubled, rel=1e-3)
