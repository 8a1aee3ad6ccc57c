"""CODA-Prompt's prompts, prefixes and penalty, by loops and by plain attention."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from backbone.prompts import PrefixAttention, PromptedViT, PromptPool
from tests.tiny_vits import MODELS, WIDTH, images, plain_vit

D, LENGTH = 6, 4


def pool(*components: int) -> PromptPool:
    """Components of several tasks, the last still learning."""
    torch.manual_seed(0)
    made = PromptPool(D, LENGTH)
    for count in components[:-1]:
        made.grow(count)
        made.freeze()
    made.grow(components[-1])
    return made


def test_a_prompt_is_the_sum_of_components_by_cosine() -> None:
    ours, query = pool(2, 1), torch.randn(3, D)
    keys, attention, prompts = (ours.all(name).detach().numpy() for name in ("keys", "attention", "prompts"))
    for b, q in enumerate(query.numpy()):
        expected = np.zeros((LENGTH, D))
        for m in range(3):
            seen = q * attention[m]
            share = seen @ keys[m] / np.linalg.norm(seen) / np.linalg.norm(keys[m])
            expected += share * prompts[m].reshape(LENGTH, D)
        np.testing.assert_allclose(ours(query)[b].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_penalty_is_the_distance_from_orthonormal_rows(reduction: str) -> None:
    ours = pool(2, 1)
    ours.new_keys.data += 0.5
    total = 0.0
    for name in ("keys", "attention", "prompts"):
        rows = ours.all(name).detach().double().numpy()
        squares = [(rows[i] @ rows[j] - (i == j)) ** 2 for i in range(len(rows)) for j in range(len(rows))]
        total += sum(squares) if reduction == "sum" else sum(squares) / len(squares)
    assert float(ours.penalty(reduction).detach()) == pytest.approx(total, rel=1e-4)


def test_new_components_are_orthonormal_to_all_others_while_there_is_room() -> None:
    ours = pool(2, 2)
    for name in ("keys", "attention", "prompts"):
        rows = ours.all(name).detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)
    full = pool(4, 4)
    assert torch.isfinite(full.all("keys")).all() and len(full.all("keys")) == 8 > D


def test_no_new_component_is_nearly_constant() -> None:
    torch.manual_seed(0)
    ours = PromptPool(400, LENGTH)
    ours.grow(10)
    for name in ("keys", "attention", "prompts"):
        rows = F.normalize(ours.all(name).detach(), dim=1)
        assert rows.mean(dim=1).abs().max() * rows.shape[1] ** 0.5 < 0.3  # the cosine with a constant


def test_a_prefix_is_attended_to_like_further_tokens() -> None:
    """By loops over samples and heads, in one block."""
    attention = plain_vit("vit_small_patch16_224").blocks[0].attn
    wrapped, x = PrefixAttention(attention), torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(wrapped(x), attention(x))
    keys, values = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    wrapped.prefix = keys, values
    heads, size = attention.num_heads, WIDTH // attention.num_heads
    q, k, v = attention.qkv(x).chunk(3, dim=2)
    k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
    out = torch.zeros(2, 7, WIDTH)
    for b in range(2):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = (q[b, :, part] @ k[b, :, part].T / math.sqrt(size)).softmax(dim=1)
            out[b, :, part] = weights @ v[b, :, part]
    torch.testing.assert_close(wrapped(x), attention.proj(out), atol=1e-5, rtol=1e-4)


def prompted(name: str = "vit_small_patch16_224", blocks: tuple[int, ...] = (1, 2)) -> PromptedViT:
    torch.manual_seed(1)
    return PromptedViT(plain_vit(name), blocks, LENGTH)


@pytest.mark.parametrize("name", MODELS)
def test_without_prompts_the_network_is_timm_s_and_with_them_another(name: str) -> None:
    network, x = prompted(name), images(name)
    torch.testing.assert_close(network.plain(x), plain_vit(name)(x), atol=1e-5, rtol=1e-4)
    network.grow(3)
    features = network(x)
    assert not torch.allclose(features, network.plain(x), atol=1e-3)
    torch.testing.assert_close(network(x, query=network.plain(x)), features)
    tokens = network(x, 0, 1)
    torch.testing.assert_close(network(tokens, 1), features)
    torch.testing.assert_close(network.plain(x), plain_vit(name)(x), atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_new_component_and_nothing_else() -> None:
    network, x = prompted(), images("vit_small_patch16_224")
    network.grow(2)
    F.mse_loss(network(x), torch.zeros(len(x), WIDTH)).backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    names = {f"pools.{block}.new_{part}" for block in (1, 2) for part in ("keys", "attention", "prompts")}
    assert found.keys() == names and all(gradient.abs().sum() > 0 for gradient in found.values())
    network.freeze()
    assert not any(p.requires_grad for p in network.parameters()) and len(network.pools["1"].keys) == 2
