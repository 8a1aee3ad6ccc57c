"""Our SEMA modules against numbers of the published implementation, tests/data/sema_tiny.npz.

`SEMA_GOLDEN` names another file of the same layout.

Features agree to 1e-5; decisions, counts and record lengths exactly.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone.sema_block import AdapterSpec
from backbone.vit_sema import SEMAVisionTransformer, token_mean

GOLDEN = Path(os.environ.get("SEMA_GOLDEN", Path(__file__).parent / "data" / "sema_tiny.npz"))
SPEC = AdapterSpec(width=32, kind="adaptmlp", bottleneck=8, rd_dim=16, buffer_size=64)
GROWING, DEPTH, THRESHOLD = (2, 3), 4, 2.0
OURS = re.compile("rd_loss_record|tasks_learned")  # state that the file holds as statistics, or not at all


class Golden:
    """The file's arrays as tensors, and its weights under our names."""

    def __init__(self, path: Path) -> None:
        self.arrays = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def state(self, moment: str) -> dict[str, Tensor]:
        """Weights at "init", "grown" or "merged", q, k, v fused and blocks wrapped as ours are."""
        prefix = f"{moment}/state/"
        theirs = {
            key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)
        }
        ours = {}
        for name, value in theirs.items():
            found = re.match(r"blocks\.(\d+)\.(.*)", name)
            if not found:
                ours[f"vit.{name}"] = value
                continue
            block, rest = int(found[1]), found[2]
            if rest.startswith("adapter_module.router") and block not in GROWING:
                continue  # published code creates it and never calls it
            if rest.startswith("adapter_module."):
                ours[f"vit.blocks.{block}.{rest}"] = value
            elif rest.startswith(("attn.k_proj", "attn.v_proj")):
                continue
            elif rest.startswith("attn.q_proj"):
                parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                ours[f"vit.blocks.{block}.block.attn.qkv.{rest.split('.')[-1]}"] = torch.cat(parts)
            else:
                inside = rest if not rest.startswith("fc") else f"mlp.{rest}"
                ours[f"vit.blocks.{block}.block.{inside}"] = value
        return ours


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(GOLDEN)


def tiny_network() -> SEMAVisionTransformer:
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=DEPTH, num_heads=4, num_classes=0, global_pool="token"
    )
    return SEMAVisionTransformer(vit, SPEC, growing=GROWING, adapted=range(DEPTH))


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Strict but for what the file does not hold as tensors."""
    outcome = network.load_state_dict(state, strict=False)
    assert not outcome.unexpected_keys and all(OURS.search(key) for key in outcome.missing_keys)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=tolerance, rtol=0)


def training_forward(network: SEMAVisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and rd loss of a training-mode forward as published, which also records the errors."""
    network.train()
    with network.capture_inputs(network.growing, token_mean) as means:
        features = network(images)
    rd_loss = network.descriptor_loss(means)
    network.observe(means)
    return features, rd_loss


def novel_blocks(network: SEMAVisionTransformer, images: Tensor) -> list[bool]:
    """For every block visited: does it find the batch novel? The pass stops at the first that does."""
    network.eval()
    with torch.no_grad(), network.capture_inputs(network.growing, token_mean) as means:
        network(images)
    visited = []
    for block in range(DEPTH):
        visited.append(block in means and network.modules_by_block[block].novelty(means[block]) > THRESHOLD)
        if visited[-1]:
            break
    return visited


def end_of_task(network: SEMAVisionTransformer) -> None:
    for modules in network.modules_by_block.values():
        modules.end_of_task_training()


def test_a_run_through_two_tasks_gives_the_published_numbers(golden: Golden) -> None:
    """Task 0, records, evaluation, detection, growth, second task's end: all numbers of the file in order."""
    network = tiny_network()
    load(network, golden.state("init"))

    for i in range(4):
        features, rd_loss = training_forward(network, golden[f"records/input{i}"])
        close(features, golden[f"records/features{i}"])
        close(rd_loss, golden[f"records/rd_loss{i}"])

    for block in range(DEPTH):
        record = network.modules_by_block[block].adapters[0].rd_loss_record
        length = int(golden[f"records/stats/block{block}.adapter0.length"])
        assert (len(record) if record is not None else 0) == length
        if record is not None:
            close(record.mean, golden[f"records/stats/block{block}.adapter0.mean"])
            close(record.stddev, golden[f"records/stats/block{block}.adapter0.stddev"])

    network.eval()
    close(network(golden["eval/input"]), golden["eval/features"])

    end_of_task(network)
    assert (
        novel_blocks(network, golden["detect/in_distribution"])
        == golden["detect/in_distribution_added"].tolist()
    )
    visited = novel_blocks(network, golden["detect/shifted"])
    assert visited == golden["detect/shifted_added"].tolist()

    load(network, golden.state("grown"))
    counts = [network.adapters_per_block()[block] for block in range(DEPTH)]
    assert counts == golden["detect/adapters_per_block"].tolist()
    network.eval()
    close(network(golden["eval/input"]), golden["grown/features"])
    close(network(golden["detect/shifted"][:8]), golden["grown/features_shifted"])
    _, rd_loss = training_forward(network, golden["detect/shifted"])
    close(rd_loss, golden["grown/rd_loss"])

    end_of_task(network)
    network.eval()
    close(network(golden["eval/input"]), golden["merged/features"])
    merged = golden.state("merged")
    state = network.state_dict()
    assert set(merged) == {key for key in state if not OURS.search(key)}
    for key, value in merged.items():
        close(state[key], value)


def test_forward_changes_nothing(golden: Golden) -> None:
    """Forwards, also in training mode on shifted images, leave structure and state as they were."""
    network = tiny_network()
    load(network, golden.state("init"))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for mode in (True, False):
        network.train(mode)
        network(golden["detect/shifted"])
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_array_of_the_file_is_used(golden: Golden) -> None:
    """A new kind of number in the file must be checked, not skipped in silence."""
    known = r"(init|grown|merged)/state/.+|records/(input|features|rd_loss)\d"
    known += r"|records/stats/block\d\.adapter0\.(length|mean|stddev)"
    known += r"|eval/(input|features)|detect/(in_distribution|shifted)(_added)?|detect/adapters_per_block"
    known += r"|grown/(features|features_shifted|rd_loss)|merged/features"
    assert [key for key in golden.arrays if not re.fullmatch(known, key)] == []
