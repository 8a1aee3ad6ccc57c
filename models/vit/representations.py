"""Representations inside a network: class tokens after its blocks, and the output spaces of adapter branches.

Learners give them to `eval.py --analyse` through `ClassIncrementalLearner.class_tokens` and `.branch_spaces`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from backbone.sema_block import SEMAModules
from backbone.sema_components import NestedLoRAAdapter
from utils.analysis.similarity import column_space


@torch.no_grad()
def class_tokens(blocks: Sequence[nn.Module], run: Callable[[], object]) -> Tensor:
    """First tokens (L, B, d), float32, after each of L blocks in depth order, when `run` last runs it."""
    found: dict[int, Tensor] = {}

    def keep(number: int, module: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> None:
        found[number] = x[:, 0].float()

    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(partial(keep, number)))
        run()
    return torch.stack([found[number] for number in range(len(blocks))])


def branch_spaces(modules_by_block: Mapping[int, SEMAModules]) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Bases (d, k) of the column spaces of W_up W_down, by (block, adapter) and branch.

    They are of both branches, "fast" and "slow", of every nested adapter.
    """
    return {
        (block, k): {
            name: column_space(branch.up_proj.weight, branch.down_proj.weight)
            for name, branch in adapter.functional.named_children()
        }
        for block, modules in modules_by_block.items()
        for k, adapter in enumerate(modules.adapters)
        if isinstance(adapter.functional, NestedLoRAAdapter)
    }
