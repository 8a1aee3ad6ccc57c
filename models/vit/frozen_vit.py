"""What the methods on a frozen ViT share: its features, read through stored activations, and what classifies them.

A subclass says which blocks hold adapters (none here) and what happens in a task. Where a `Readout` classifies (class
means or ridge regression, `models/vit/closed_form.py`), the stage "readout" ends every task: it reads the task's training images
once more, in the test view, and takes their features in.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backbone.sema_block import AdapterSpec
from backbone.vit_sema import SEMAVisionTransformer
from models.vit.activations import Place
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import PrototypeReadout, RanPACReadout, Readout
from models.vit.config import ViTConfig
from models.vit.pretrained import Backbone
from models.vit.representations import branch_spaces, class_tokens
from models.vit.task_inputs import TaskInputs
from utils.runs.manifest import library_versions
from utils.training.device import require_finite

logger = logging.getLogger("nested_lora")

READOUTS: dict[str, type[Readout]] = {"cosine": PrototypeReadout, "ranpac": RanPACReadout}


class FrozenViT(ClassIncrementalLearner):
    """Class-incremental learning from the features of a frozen ViT.

    Attributes:
        readout: the closed-form classifier, or None where another one classifies.
        features_before: features (n, d) of the open task's training images as the task found the network, while they
            are needed to carry `readout` along; else None.
    """

    Config = ViTConfig
    config: ViTConfig

    def build(self, backbone: Backbone) -> nn.ModuleDict:
        network = self.build_network(backbone)
        place = Place(
            device=self.device,
            precision=self.config.precision,
            batch_size=self.config.eval_batch_size,
            identity={
                **backbone.identity(),
                "options": backbone.options_sha256,
                "data": self.data.dataset.sha256,
                "versions": library_versions(),
            },
            world=self.world,
            stop_requested=self._stop_requested,
        )
        self.inputs = TaskInputs(
            network, self.data, self.cache, place, fast=self.config.engine == "fast", views=self.fixed_views
        )
        kind = READOUTS.get(self.head_kind)
        self.readout: Readout | None = kind and kind(
            network.vit.num_features, self.seed, self.config.ranpac_dim
        )
        self.features_before: Tensor | None = None
        return nn.ModuleDict({"backbone": network})

    def build_network(self, backbone: Backbone) -> SEMAVisionTransformer:
        """The ViT with its adapters: none."""
        return SEMAVisionTransformer(backbone.vit, AdapterSpec(backbone.vit.embed_dim, "adaptmlp", 1), (), ())

    @property
    def head_kind(self) -> str:
        """What classifies: a key of `READOUTS`, or "fc" for a trained classifier."""
        return "cosine"

    @property
    def fixed_views(self) -> int:
        """Fixed augmented views of a training image; 0: new ones whenever asked."""
        return 0

    @property
    def network(self) -> SEMAVisionTransformer:
        return self.modules["backbone"]

    def open_task(self) -> None:
        """A readout makes room when it takes a task in."""

    @property
    def stages(self) -> dict[str, Callable[[], str]]:
        return {"start": lambda: "readout", "readout": self.fit_readout}

    def features(self, images: Tensor) -> Tensor:
        """Class token of the adapted backbone, (B, 3, S, S) -> (B, d), float32."""
        with self.autocast():
            return self.network(images).float()

    def classify(self, features: Tensor) -> Tensor:
        return self.readout(features)

    def features_of(self, task: int, source: str) -> Tensor:
        fast = self.config.engine == "fast"
        return self.inputs.features_of(task, source) if fast else super().features_of(task, source)

    def class_tokens(self, images: Tensor) -> Tensor:
        return class_tokens(self.network.vit.blocks, lambda: self.features(images))

    def branch_spaces(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        return branch_spaces(self.network.modules_by_block)

    def close_run(self) -> None:
        self.inputs.store.drop_own("train")
        self.inputs.store.drop_own("test")

    # --- stage: readout ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_readout(self) -> str:
        """Take the task's training features into the readout, which first follows the network where it has moved."""
        if self.readout is not None:
            features = self.training_features()
            if self.features_before is not None:
                self._follow(self.features_before, features)
            targets = self.data.targets(self.data.indices(self.classes, "train"), "train")
            self.readout.add(features, targets)
            self.features_before = None
        self.inputs.store.drop_own("train")
        return "done"

    def training_features(self) -> Tensor:
        """Features of the open task's training images in the test view, (n, d).

        Raises:
            UserError: one is not finite.
        """
        features = self.features_of(self.task, "train")
        return require_finite(
            features, f"the features of task {self.task}'s training images", self.config.precision
        )

    def _follow(self, before: Tensor, after: Tensor) -> None:
        """Carry the readout's class statistics along with the features, and say how far those moved."""
        before, after = before.cpu(), after.cpu()
        moved = float((after - before).norm() / before.norm().clamp_min(torch.finfo(before.dtype).tiny))
        explained = None
        if moved:
            explained = self.readout.follow(before, after)
            logger.info(
                f"Task {self.task}: features moved by {moved:.3f} (relative), {explained:.3f} of it explained"
            )
        self.log.metric("feature_drift", task=self.task, moved=moved, explained=explained)

    # --- state ------------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        before = None if self.features_before is None else len(self.features_before)
        readout = None if self.readout is None else self.readout.structure()
        return {"readout": readout, "features_before": before}

    def rebuild(self, structure: dict[str, Any]) -> None:
        if self.readout is not None:
            self.readout.rebuild(structure["readout"])
        rows = structure["features_before"]
        self.features_before = None if rows is None else torch.zeros(rows, self.network.vit.num_features)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        readout = {} if self.readout is None else self.readout.state_dict()
        tensors = {f"readout.{name}": tensor for name, tensor in readout.items()}
        return (
            tensors if self.features_before is None else tensors | {"features_before": self.features_before}
        )

    def summary(self) -> dict[str, Any]:
        counts = self.parameter_counts()
        counts["stored"] = sum(counts.values())
        return {"adapters": self.network.adapters_per_block(), "parameters": counts}

    def parameter_counts(self) -> dict[str, int]:
        """Numbers that the method stores beside the frozen backbone, by part."""
        counts = self.network.parameter_counts() if self.network.modules_by_block else {}
        return counts if self.readout is None else counts | {"readout": self.readout.stored_numbers()}
