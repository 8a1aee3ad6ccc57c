"""Data and pretrained backbone of a configuration, loaded.

data, backbone = load_data_and_backbone(config, context)
"""

from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from models.base import RunContext
from models.vit.config import ClassIncrementalConfig
from models.vit.pretrained import Backbone, create_backbone, find_weights
from utils.cache.file_memo import IMAGES
from utils.data.datasets import load_dataset
from utils.data.tasks import DataManager, TaskSplit
from utils.data.transforms import ViewSpec
from utils.errors import UserError


def load_data_and_backbone(
    config: ClassIncrementalConfig, context: RunContext
) -> tuple[DataManager, Backbone]:
    """The task sequence and the pretrained ViT of a configuration.

    Raises:
        UserError: data or weights cannot be had; one message names both.
    """
    load = partial(
        load_dataset,
        config.dataset,
        config.data_root,
        Path(config.cache_root) / IMAGES,
        test_share=config.test_share,
        added=config.added,
        partial=context.trains_from != 0,
    )
    try:
        dataset = load(splits=("train",)) if config.validation_share else load()
    except UserError as error:
        try:
            find_weights(config.backbone_type, weights=config.weights, weights_root=Path(config.weights_root))
        except UserError as missing:
            raise UserError(f"{error}\n{missing}") from error
        raise
    backbone = load_backbone(config)
    on_cpu = context.device.type == "cpu"  # which is busy computing
    default_workers = 0 if on_cpu else min(8, torch.multiprocessing.cpu_count())
    data = DataManager(
        dataset,
        TaskSplit(**{field.name: getattr(config, field.name) for field in fields(TaskSplit)}),
        train_view=view_spec(config, backbone, config.augmentation),
        test_view=view_spec(config, backbone, "none"),
        num_workers=default_workers if config.num_workers is None else config.num_workers,
        pinned=context.device.type == "cuda",
        distributed=context.distributed,
        load_whole=load,
    )
    if context.trains_from is not None:
        data.require_training_images(context.trains_from)
    data.stop_requested = lambda: context.stop()
    return data, backbone


def load_backbone(config: ClassIncrementalConfig) -> Backbone:
    """The pretrained ViT of a configuration. UserError: its weights cannot be had."""
    root = Path(config.weights_root)
    return create_backbone(
        config.backbone_type, image_size=config.image_size, weights=config.weights, weights_root=root
    )


def view_spec(config: ClassIncrementalConfig, backbone: Backbone, augmentation: str) -> ViewSpec:
    """Transform from images to inputs of a backbone, with the normalisation that the configuration names."""
    norm = (backbone.mean, backbone.std) if config.input_normalization == "weights" else (None, None)
    return ViewSpec(backbone.image_size, augmentation, *norm)
