"""Joint training of the same adapters on all classes at once; an upper bound for task-by-task learning.

    python main.py --config exps/baselines/joint_cifar.json

There is one task that holds all classes, so the record has a final accuracy and neither forgetting nor a
curve.
"""

from torch import nn

from models.config.joint import JointConfig
from models.heads import build_heads
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import adapted_network, train_functional


class Joint(ClassIncrementalLearner):
    """Adapters and classifier trained on all classes together."""

    Config = JointConfig
    config: JointConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        network = adapted_network(vit, self.config)
        return nn.ModuleDict({"backbone": network, **build_heads(self.config, vit.num_features)})

    def learn_task(self) -> None:
        self.once("functional", lambda: train_functional(self))
        self.once("head", self.fit_head)
