"""An adapter per task: features of several subspaces, against one network each."""

import pytest
import torch
from torch import Tensor

from backbone.sema_block import AdapterSpec
from backbone.task_adapters import TaskAdapterViT
from backbone.vit_sema import SEMAVisionTransformer
from tests.tiny_vits import DEPTH, WIDTH, images, plain_vit

SPEC = AdapterSpec(width=WIDTH, kind="adaptmlp", bottleneck=4)
BLOCKS = (1, 2)


def with_adapters(count: int, plain: bool = False) -> TaskAdapterViT:
    """Frozen adapters that do something, each another thing."""
    torch.manual_seed(1)
    network = TaskAdapterViT(plain_vit(), SPEC, BLOCKS, plain)
    for _ in range(count):
        network.grow()
        for modules in network.modules_by_block.values():
            torch.nn.init.normal_(modules.adapters[-1].functional.up_proj.weight)
        network.freeze()
    return network


def alone(network: TaskAdapterViT, adapter: int | None) -> Tensor:
    """Features of a ViT that has this adapter only."""
    single = SEMAVisionTransformer(plain_vit(), SPEC, adapted=BLOCKS if adapter is not None else ())
    for block, modules in single.modules_by_block.items():
        modules.adapters[0].load_state_dict(network.modules_by_block[block].adapters[adapter].state_dict())
    return single(images())


@pytest.mark.parametrize("plain", [True, False])
def test_features_are_those_of_one_network_per_subspace(plain: bool) -> None:
    network = with_adapters(2, plain)
    chosen = [None, 0, 1] if plain else [0, 1]
    expected = torch.cat([alone(network, adapter) for adapter in chosen], dim=1)
    torch.testing.assert_close(network(images()), expected)
    tokens = network(images(), 0, 1)
    torch.testing.assert_close(network(tokens, 1), expected)
    assert network.feature_width == expected.shape[1]


def test_blocks_below_the_first_adapter_run_once() -> None:
    network, runs = with_adapters(3), []
    for i, block in enumerate(network.vit.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    network(images())
    assert [runs.count(i) for i in range(DEPTH)] == [1, 3, 3]
