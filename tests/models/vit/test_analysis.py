"""models.vit.analysis: class tokens and output spaces of branches, as analyses get them."""

import pytest
import torch

from models.vit.analysis import branch_spaces, class_tokens
from tests.conftest import run_tasks
from utils.training.random import rng

IMAGES = torch.rand(3, 3, 32, 32, generator=rng("test", 0))


def test_class_tokens_are_what_enters_the_next_block_and_become_the_features(make_sema) -> None:
    learner = make_sema(max_tasks=1)
    learner.begin_task(0)
    tokens, network = class_tokens(learner.network.vit, learner.features, IMAGES), learner.network
    assert tokens.shape == (6, 3, network.vit.embed_dim) and not tokens.requires_grad
    with torch.no_grad():
        x = network.embed(IMAGES)
        for block, expected in zip(network.vit.blocks, tokens, strict=True):
            torch.testing.assert_close((x := block(x))[:, 0], expected)
        torch.testing.assert_close(network.vit.norm(tokens[5]), learner.features(IMAGES))


@pytest.mark.parametrize("method", ["aper", "ease", "coda_prompt"])
def test_blocks_that_run_several_times_give_the_tokens_of_the_newest_features(method: str, make_sema) -> None:
    """Of the newest adapter's subspace; with the prompts, not of the pass for the query."""
    learner = run_tasks(make_sema(model_name=method), 2)
    tokens, width = class_tokens(learner.network.vit, learner.features, IMAGES), learner.network.vit.embed_dim
    with torch.no_grad():
        features = learner.features(IMAGES)
        torch.testing.assert_close(learner.network.vit.norm(tokens[5]), features[:, -width:])
    assert tokens.shape == (6, 3, width)


def test_class_tokens_of_merged_directions_become_the_features(make_sdlora) -> None:
    learner = make_sdlora()
    learner.begin_task(0)
    torch.nn.init.normal_(learner.network.projections[2].new.up)
    tokens = class_tokens(learner.network.vit, learner.features, IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(learner.network.vit.norm(tokens[5]), learner.features(IMAGES))
    assert branch_spaces(learner.network) == {}


def test_branch_spaces_are_those_of_the_trained_products(make_sema) -> None:
    learner = make_sema(max_tasks=1, nested_lora_rank=3)
    at_first = branch_spaces(learner.network)
    assert set(at_first) == {(block, 0) for block in range(6)} and at_first[2, 0]["fast"].shape[1] == 0
    functional = learner.network.modules_by_block[2].adapters[0].functional
    torch.nn.init.normal_(functional.slow.up_proj.weight)
    spaces = branch_spaces(learner.network)[2, 0]
    product = (functional.slow.up_proj.weight @ functional.slow.down_proj.weight).detach().double()
    basis = spaces["slow"]
    assert basis.shape[1] == 3 and spaces["fast"].shape[1] == 0
    torch.testing.assert_close(basis @ (basis.T @ product), product)
