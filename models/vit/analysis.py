"""Networks of a run as analyses see them: class tokens after every block, output spaces of branches."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbone.frozen_vit import FrozenViT
from backbone.sema_components import NestedLoRAAdapter
from models.vit.config import ClassIncrementalConfig
from utils.analysis.representations import AnalysisInputs, chosen_images
from utils.analysis.similarity import column_space
from utils.console import progress
from utils.data.tasks import DataManager
from utils.runs.figures import describe
from utils.training.device import require_finite

IMAGES_PER_CLASS = 20  # by default


class TaskNetwork(NamedTuple):
    """The network after a task, and the name of its checkpoint."""

    name: str
    network: FrozenViT
    features: Callable[[Tensor], Tensor]  # of images (B, 3, S, S)
    weights: dict[int, float]  # `ClassIncrementalLearner.adapter_weights`


def analysis_inputs(
    networks: Iterable[TaskNetwork],
    data: DataManager,
    config: ClassIncrementalConfig,
    device: torch.device,
    images_per_class: int | None,
) -> AnalysisInputs:
    """Class tokens of the same images and output spaces of the branches, for the network after every task.

    `images_per_class` of the images that the run is measured on, at most; None for `IMAGES_PER_CLASS`.
    UserError: there are too few, or what they give is not finite.
    """
    images = chosen_images(data, config.seed, images_per_class or IMAGES_PER_CLASS)
    source, size = data.evaluated, config.eval_batch_size
    tokens, spaces, weights = [], [], []
    for task in networks:
        what, found = f"class tokens of {task.name}", []
        for start in progress(range(0, len(images), size), desc=what.capitalize(), unit="batch"):
            views = data.views(images[start : start + size], source, None, device)
            found.append(class_tokens(task.network.vit, task.features, views).cpu())
        tokens.append(require_finite(torch.cat(found, dim=1), f"the {what}", config.precision))
        spaces.append(branch_spaces(task.network))
        weights.append(task.weights)
    labels = data.targets(images, source)
    ends = torch.tensor([data.task_classes(task).stop for task in range(len(tokens))])
    about = f"{describe(config.model_dump())} · {len(images)} {source} images"
    tasks = torch.searchsorted(ends, labels, right=True)
    return AnalysisInputs(torch.stack(tokens), labels, spaces, config.seed, about, tasks, weights)


@torch.no_grad()
def class_tokens(vit: nn.Module, features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Class token after each of the L blocks, where `features` runs it last: (L, B, d), float32."""
    found: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> None:
        found[block] = x[:, 0].float()

    with ExitStack() as hooks:
        for block in vit.blocks:
            hooks.enter_context(block.register_forward_hook(keep))
        features(images)
    return torch.stack([found[block] for block in vit.blocks])


def branch_spaces(network: FrozenViT) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Column spaces of W_up W_down of nested adapters: (block, adapter) -> "fast" and "slow", (d, k)."""
    return {
        (block, k): {
            name: column_space(branch.up_proj.weight, branch.down_proj.weight)
            for name, branch in adapter.functional.named_children()
        }
        for block, modules in network.modules_by_block.items()
        for k, adapter in enumerate(getattr(modules, "adapters", ()))
        if isinstance(adapter.functional, NestedLoRAAdapter)
    }
