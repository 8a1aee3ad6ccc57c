"""InfLoRA: low-rank terms of k and v whose input directions are orthogonal to older tasks' inputs.

    python main.py --config exps/methods/inflora_cifar.json

Before a task its images pass through the network once. In every adapted block the second moments of the
inputs of q, k and v give the directions A of the task's terms B A x: main directions of its inputs orthogonal
to the basis M of older tasks' inputs. B and the task's classifier rows learn with cross-entropy over the
task's classes; then B A is merged into the weights, the images pass once more, and M grows by their inputs'
main directions. The part of an old input inside M gets the same k and v from then on. Source:
Liang and Li, *InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning*, CVPR 2024.
"""

import logging

import torch
from torch import Tensor, nn

from backbone.inflora import InfLoRAViT
from models.config.inflora import InfLoRAConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import train_functional
from utils.data.splits import tasks_of
from utils.inc_net import IncrementalHead

logger = logging.getLogger("nested_lora")


class InfLoRA(ClassIncrementalLearner):
    """Low-rank terms of k and v in directions that older tasks' inputs lack."""

    Config = InfLoRAConfig
    config: InfLoRAConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        network = InfLoRAViT(vit, self.config.lora_rank, self.config.adapted_blocks(len(vit.blocks)))
        return nn.ModuleDict({"backbone": network, "head": IncrementalHead(vit.num_features)})

    def learn_task(self) -> None:
        self.once("directions", self.choose_directions)
        self.once("functional", lambda: train_functional(self))
        self.once("freeze", self.network.freeze)
        self.once("memory", self.remember_inputs)
        self.inputs.store.drop_own("train")

    def choose_directions(self) -> None:
        """Add the task's terms, with directions orthogonal to older tasks' inputs."""
        left = self.network.grow(self.second_moments())
        fewest = min(left.values())
        if fewest < self.config.lora_rank:
            block = min(left, key=left.get)
            logger.warning(
                f"Task {self.task}: block {block} has {fewest} directions left for rank "
                f"{self.config.lora_rank}; lower lamb and lame leave more"
            )

    def remember_inputs(self) -> None:
        """Let the basis of every block grow by the task's inputs."""
        power = 1 if self.config.threshold_on == "energy" else 2
        self.network.remember(self.second_moments(), self.share, power)
        sizes = {block: p.basis.shape[1] for block, p in self.network.modules_by_block.items()}
        logger.debug(f"Task {self.task}: directions of old inputs by block {sizes}")
        self.log.metric("basis", task=self.task, share=self.share, directions=sizes)

    @property
    def share(self) -> float:
        """Share of the energy of the open task's inputs that the basis is to hold.

        It moves from `lamb` towards `lame` over the tasks of the data set, whether or not the run learns all
        of them, and is `lame` for those of `extra_data`.
        """
        config, classes = self.config, self.data.nb_classes - sum(self.data.dataset.added)
        tasks = len(tasks_of(classes, config.init_cls, config.increment, None))
        return config.lamb + (config.lame - config.lamb) * min(1.0, self.task / tasks)

    @torch.no_grad()
    def second_moments(self) -> dict[int, Tensor]:
        """Sums of x x^T over the inputs of q, k and v on the task's training images, (d, d) by block."""
        with self.network.second_moments() as moments:
            self.features_of(self.task, "train")
        self.distributed.all_reduce(list(moments.values()))
        return moments
