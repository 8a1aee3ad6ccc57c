"""Groups of config keys shared by methods on a pretrained ViT; a method's config combines some of them.

    ClassIncrementalConfig   data, tasks, and a pretrained backbone: the base of all groups
    FrozenViTKeys            how features of the frozen ViT are computed
    RidgeKeys, HeadKeys      RanPAC's ridge regression; with it, a choice of classifier
    StepKeys, TrainingKeys   a step of training; with it, phases of training on the frozen ViT
    BlockKeys, AdapterKeys   blocks that carry adapters; adapters of one branch, or of a fast and a slow one
    RowsRules, OneTaskRules  no keys: rules of methods that classify by trained rows, or have one task only

class JointConfig(OneTaskRules, AdapterKeys, HeadKeys, TrainingKeys): ...

The rules of a group may name keys of the groups that it is combined with.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.vit.backbones import BackboneShape, known_shape
from utils.cache.file_memo import IMAGES
from utils.config.schema import (
    Conflict,
    Count,
    CountOrZero,
    PathText,
    Rate,
    RateOrZero,
    RunConfig,
    Text,
    UnusedRule,
    distinct,
    key,
)
from utils.data.datasets import class_count, dataset_slug, require_dataset, splits_itself
from utils.data.splits import tasks_of
from utils.errors import UserError, os_error_sentence
from utils.files import why_no_file
from utils.metric_catalogue import CLASS_INCREMENTAL, VALIDATION, MetricSpec
from utils.training.late_compiler import import_networks
from utils.wording import counted

# ----------------------------------------------------------------------------------------------------------
# Data and backbone


class MeasuredBy:
    """The metrics of a config: on validation images where some are held out, else on test images."""

    def __get__(self, config: "ClassIncrementalConfig | None", owner: type) -> tuple[MetricSpec, ...]:
        return VALIDATION if config is not None and config.validation_share else CLASS_INCREMENTAL


class ClassIncrementalConfig(RunConfig):
    """Data, tasks, and a pretrained backbone."""

    metrics: ClassVar[tuple[MetricSpec, ...]] = MeasuredBy()
    legacy_keys: ClassVar[dict[str, str]] = {
        "memory_size": "no exemplar memory",
        "memory_per_class": "no exemplar memory",
        "fixed_memory": "no exemplar memory",
        "vpt_type": "no prompts",
        "prompt_token_num": "no prompts",
        "nb_classes": "counted in the data",
        "nb_tasks": "follows from the classes, init_cls and increment",
        "pretrained": "weights says which",
        "topk": "accuracy is top-1",
        "drop": "the backbone is frozen and in evaluation mode",
        "drop_path": "the backbone is frozen and in evaluation mode",
    }
    asset_keys: ClassVar[tuple[str, ...]] = (
        "dataset", "data_root", "extra_data", "backbone_type", "weights", "weights_root",
    )  # fmt: skip
    editable_keys: ClassVar[frozenset[str]] = RunConfig.editable_keys | {
        "dataset", "data_root", "extra_data", "weights", "weights_root", "num_workers", "checkpoints",
        "cache_root", "cache_gb", "grad_accumulation",
    }  # fmt: skip

    dataset: PathText = key("cifar224", "A known data set's name, or the path of an .npz or image folder.")
    data_root: PathText = key("data", "Folder where data sets are looked for and downloaded to.")
    extra_data: Annotated[list[PathText], Field(min_length=1), AfterValidator(distinct)] | None = key(
        None,
        "Data sets of further classes, given like dataset: after its tasks, each is one task.",
        "null, or a list of different names or paths, at least one",
    )
    shuffle: bool = key(True, "Draw the class order from the seed; false keeps the data set's order.")
    init_cls: Count = key(10, "Classes of the first task.")
    increment: Count = key(10, "Classes of every later task; the last task may be shorter.")
    max_tasks: Count | None = key(
        None, "Stop after this many tasks of dataset; null runs all. Those of extra_data follow."
    )
    max_train_per_class: Count | None = key(None, "Training images per class; null = all.")
    max_test_per_class: Count | None = key(None, "Test images per class; null = all.")
    validation_share: float = key(
        0.0,
        "Share of every class's training images that is held out and takes the place of the test images.",
        ge=0,
        lt=0.5,
    )
    test_share: float | None = key(
        None,
        "Share of every class's images that is for the test, of a folder with one folder per class.",
        gt=0,
        lt=1,
    )
    num_workers: int | None = key(
        None, "Data workers; null = 0 on the CPU, else min(8, cores).", ge=0, le=256
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto",
        "auto: bf16 autocast where the device multiplies bf16 faster, else fp32, as in published code.",
    )
    checkpoints: Literal["all", "last"] = key("all", "Keep the checkpoint of every task, or the last.")
    cache_root: PathText = key(
        "cache", "Folder for what is computed once: activations, checks of image files."
    )
    cache_gb: float = key(
        20.0, "Largest size of cache_root in GB (10^9 bytes); 0 stores no activations.", ge=0, le=1e6
    )

    backbone_type: Text = key(
        "pretrained_vit_b16_224_adapter", "Published short name, or a timm name with its weight tag."
    )
    weights: PathText | None = key(None, 'null for the backbone\'s own, "random" for untrained, or a file.')
    weights_root: PathText = key("weights", "Folder where backbone weights are looked for and fetched to.")
    image_size: int | None = key(None, "Side of the input in pixels; null = the weights' own.", ge=8, le=2048)
    input_normalization: Literal["none", "weights"] = key(
        "none",
        '"none" feeds images in [0, 1], as published; "weights" uses mean and std of the weights, or where '
        "these do not say, as a file, those of the tag in backbone_type, or of timm's default tag.",
    )

    def folder_names(self, seed: int) -> list[str]:
        """Method, data set, classes of the first task (0 where they are the increment), increment, run."""
        first = 0 if self.init_cls == self.increment else self.init_cls
        run = f"{self.prefix}_{seed}_{self.backbone_type}"
        return [self.model_name, dataset_slug(self.dataset), str(first), str(self.increment), run]

    def tested_on(self, tasks: int, seen: int, classes: int) -> dict[str, Any]:
        """Classes and images of the evaluation and, with several tasks, their split into tasks.

        Where some classes are left out, their order decides which of them are learned.
        """
        learned = f"{seen}, drawn by the seed" if seen < classes and self.shuffle else seen
        split = {"init_cls": self.init_cls, "increment": self.increment, "shuffle": self.shuffle}
        images = {"max_test_per_class": self.max_test_per_class, "validation_share": self.validation_share}
        return {"classes": learned, **images} | (split if tasks > 1 else {})

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._class_conflicts()
        yield from super().conflicts()
        if self.weights not in (None, "random") and (reason := why_no_file(Path(self.weights))):
            yield ("weights",), f'{reason}; allowed: null, "random" or the path of a weight file'
        if shape := known_shape(self.backbone_type):
            yield from self.shape_conflicts(shape)

    def unchecked_keys(self) -> list[str]:
        named = [] if known_shape(self.backbone_type) else ["backbone_type"]
        return [*named, *super().unchecked_keys()]

    def late_conflicts(self) -> Iterator[Conflict]:
        """Conflicts of a backbone without a short name: unknown to timm, or with keys that do not fit it."""
        yield from super().late_conflicts()
        if known_shape(self.backbone_type):
            return
        import_networks()
        from models.vit.pretrained import backbone_shape  # here: it imports timm

        try:
            shape = backbone_shape(self.backbone_type, weights=self.weights and "random")
        except UserError as error:
            yield ("backbone_type",), str(error)
        else:
            yield from self.shape_conflicts(shape)

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        """Keys that do not fit the backbone; a subclass extends those of super()."""
        if self.image_size is not None and self.image_size % shape.patch:
            low = max(self.image_size // shape.patch, 1) * shape.patch
            allowed = f"a multiple of {shape.patch}, such as {low} or {low + shape.patch}"
            yield ("image_size", "backbone_type"), f"not whole patches; allowed: {allowed}"

    def unused_rules(self) -> list[UnusedRule]:
        return [
            (self.weights is not None, "weights says which", ["weights_root"]),
            (self.dataset == "synthetic", 'dataset is "synthetic"', ["data_root"]),
            (
                all(splits_itself(name, self.data_root) for name in [self.dataset, *self.added]),
                "the data set has test images",
                ["test_share"],
            ),
            *super().unused_rules(),
        ]

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        """Warnings about tasks of a single class, from which cross-entropy learns nothing."""
        yield from super().warnings(nb_seeds)
        tasks = self.known_tasks()
        single = [task for task, labels in enumerate(tasks) if len(labels) == 1]
        if untaught := [task for task in single if self.one_class_advice(task)]:
            shown = ", ".join(map(str, untaught[:3])) + (", ..." if len(untaught) > 3 else "")
            fault = f"task {shown} of 0 to {len(tasks) - 1} brings one class"
            nothing = "cross-entropy over it alone is zero and teaches nothing"
            yield f"{fault}: {nothing}; {self.one_class_advice(untaught[0])}"

    def one_class_advice(self, task: int) -> str:
        """Advice for a task of a single class; "" where the method learns from it all the same."""
        return ""

    def known_tasks(self) -> list[range]:
        """The incremental labels of every task; none where the number of classes is not known yet."""
        with contextlib.suppress(UserError, OSError):
            first, *added = (
                class_count(name, self.data_root, self.test_share) for name in [self.dataset, *self.added]
            )
            if first is not None and None not in added:
                return tasks_of(first, self.init_cls, self.increment, self.max_tasks, added)
        return []

    @property
    def added(self) -> list[str]:
        """The data sets of `extra_data`."""
        return self.extra_data or []

    def missing_assets(self) -> Iterator[str]:
        from models.vit.pretrained import find_weights  # here: it imports timm

        weights = {"weights": self.weights, "weights_root": Path(self.weights_root)}
        looks = [partial(find_weights, self.backbone_type, **weights, fetch=True)]
        place = self.data_root, Path(self.cache_root) / IMAGES, self.test_share
        looks += [partial(require_dataset, name, *place) for name in (self.dataset, *self.added)]
        for look in looks:
            try:
                look()
            except UserError as error:
                yield str(error)

    def _class_conflicts(self) -> Iterator[Conflict]:
        try:
            classes = class_count(self.dataset, self.data_root, self.test_share)
        except (UserError, OSError) as error:
            yield ("dataset",), os_error_sentence(error) if isinstance(error, OSError) else str(error)
            return
        if classes == 0:
            needed = "a folder needs one folder of images per class, in it or in its train/ and test/"
            yield ("dataset",), f"the data set has no class; {needed}"
        for name in [name for name in ("init_cls", "increment") if name not in self.without_effect()]:
            if classes and getattr(self, name) > classes:
                held = counted(classes, "class", "classes")
                yield (name, "dataset"), f"the data set has {held}; allowed: {name} from 1 to {classes}"


class FrozenViTKeys(ClassIncrementalConfig):
    """How features of the frozen ViT are computed."""

    engine: Literal["fast", "reference"] = key(
        "fast",
        '"reference" stores no activations, stacks no adapters and runs timm\'s own blocks: slow, fp32 only.',
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.engine == "reference" and self.precision == "bf16":
            sentence = 'the reference computes in fp32; allowed: precision "fp32" or "auto"'
            yield ("engine", "precision"), sentence


# ----------------------------------------------------------------------------------------------------------
# Classifiers


class ProxyKeys(ClassIncrementalConfig):
    """The classifier that adapters are trained with where another one classifies."""

    training_classifier: Literal["linear", "cosine"] = key(
        "linear",
        "What adapters are trained with: linear, as the papers write it, or cosine with a scale that starts "
        "at 1 and learns, as published code has it.",
    )

    def unused_rules(self) -> list[UnusedRule]:
        return [
            (self.func_epoch == 0, "func_epoch is 0", ("training_classifier",)),
            *super().unused_rules(),
        ]


class RidgeKeys(ClassIncrementalConfig):
    """RanPAC's ridge regression on random features."""

    ranpac_dim: int = key(
        2000, "Random features of RanPAC's ridge regression; published: 10000.", ge=1, le=20_000
    )


class HeadKeys(RidgeKeys):
    """The choice of classifier, and the keys of each."""

    head: Literal["fc", "aligned", "cosine", "fecam", "ranpac"] = key(
        "fc",
        "What classifies: the trained classifier, as it is or aligned on Gaussians of all classes (SLCA); "
        "class means by cosine, or by Mahalanobis distance (FeCAM); or RanPAC's ridge regression.",
    )
    head_drift: Literal["none", "linear"] = key(
        "none", 'Class statistics of earlier tasks when features move: kept, or compensated ("linear").'
    )
    ca_samples: Count = key(256, 'Features drawn per class and epoch for the head "aligned".')
    ca_epochs: Count = key(5, 'Epochs of the alignment of the head "aligned".')
    ca_lr: Rate = key(0.01, 'Learning rate of the head "aligned", cosine to 0.')
    ca_restart: bool = key(
        False,
        'Align older rows of the head "aligned" from their trained values after every task, as published.',
    )
    alpha1: float = key(
        1.0, 'Weight of the mean variance in the shrinkage of the head "fecam".', ge=0, le=1e6
    )
    alpha2: float = key(
        1.0,
        "Weight of the mean covariance in it; at most alpha1, or distances can be negative.",
        ge=0,
        le=1e6,
    )

    def unused_rules(self) -> list[UnusedRule]:
        head = f'head is "{self.head}"'
        alignment = [name for name in HeadKeys.own_keys() if name.startswith("ca_")]
        return [
            (self.head == "fc", head, ("head_drift",)),
            (self.head != "ranpac", head, ("ranpac_dim",)),
            (self.head != "aligned", head, alignment),
            (self.head != "fecam", head, ("alpha1", "alpha2")),
            *super().unused_rules(),
        ]

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.head == "fecam" and self.alpha2 > self.alpha1:
            sentence = f"the covariance could be indefinite; allowed: alpha2 from 0 to {self.alpha1:g}"
            yield ("alpha2", "alpha1"), sentence

    def one_class_advice(self, task: int) -> str:
        if self.head == "fc":
            return 'use head "cosine" or "ranpac", or larger tasks: this classifier cannot tell them apart'
        return f'head "{self.head}" still tells them apart, by features that they leave as they are'


# ----------------------------------------------------------------------------------------------------------
# Training


NullIsTiny = BeforeValidator(lambda value: 1e-8 if value is None else value)


class StepKeys(ClassIncrementalConfig):
    """Keys of an optimizer step."""

    batch_size: Count = key(32, "Samples in a training step, over all devices.")
    grad_accumulation: Count = key(1, "Parts a training step is cut into to save memory.")
    augmentation: Literal["crop_flip", "crop", "none"] = key(
        "crop_flip", "Random resized crop with or without horizontal flip, or the test transform."
    )
    optimizer: Literal["sgd", "adam"] = key("sgd", 'SGD with momentum 0.9; "adam" means AdamW.')

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.grad_accumulation > self.batch_size and "grad_accumulation" not in self.without_effect():
            sentence = f"a part has a sample at least; allowed: from 1 to {self.batch_size}"
            yield ("grad_accumulation", "batch_size"), sentence


SCHEDULER = {"scheduler": "the schedule is a cosine"}  # a legacy key of some methods


class TrainingKeys(StepKeys, FrozenViTKeys):
    """Keys of training phases; `lr_keys` names those that are learning rates."""

    lr_keys: ClassVar[tuple[str, ...]] = ("init_lr",)

    func_epoch: CountOrZero = key(5, "Epochs of a functional phase (adapters, router, classifier).")
    init_lr: Rate = key(0.005, "Learning rate of functional phases.")
    weight_decay: RateOrZero = key(0.0005, "Weight decay.")
    min_lr: Annotated[RateOrZero, NullIsTiny] = key(
        0.0,
        "Where the cosine schedule ends; null is read as 1e-8, as published.",
        "a number >= 0 and < 1000, or null for 1e-8",
    )
    cache_views: int = key(
        0,
        "Fixed augmented views per training image; 0 = new ones every epoch, as published, the same in all "
        "phases of a task.",
        ge=0,
        le=1000,
    )

    @property
    def trains(self) -> bool:
        """Whether there is any epoch of training."""
        return self.func_epoch > 0

    def group_options(self, name: str) -> dict[str, Any]:
        """Learning rate and other options of the `ParameterGroup` of this name."""
        return {"lr": self.init_lr}

    def one_class_advice(self, task: int) -> str:
        same = "tells such classes apart all the same, by features that training leaves as they are"
        return f"{self.model_name} {same}"

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self.min_lr_conflicts(self.lr_keys)

    def unused_rules(self) -> list[UnusedRule]:
        one_view = self.augmentation == "none" and (self.engine == "reference" or self.cache_gb == 0)
        training = ("batch_size", "augmentation", "weight_decay", "min_lr", "optimizer", "cache_views")
        return [
            (not self.trains, "no epoch trains anything", training),
            (self.func_epoch == 0, "func_epoch is 0", ("init_lr", "grad_accumulation", "head_drift")),
            (one_view, 'augmentation is "none" and nothing is stored', ("cache_views",)),
            *super().unused_rules(),
        ]


class RowsRules(ClassIncrementalConfig):
    """No keys: rules of methods that classify by rows trained on their own task's classes only."""

    def one_class_advice(self, task: int) -> str:
        other = 'use larger tasks, or model_name "finetune" with head "cosine" or "ranpac"'
        return f"the classifier cannot tell such classes apart: {other}"


class OneTaskRules(ClassIncrementalConfig):
    """No keys: the rules of methods that learn all classes at once."""

    def conflicts(self) -> Iterator[Conflict]:
        found, sentence = list(super().conflicts()), f"{self.model_name} learns all classes at once; allowed:"
        yield from found
        if not any("dataset" in keys for keys, _ in found):  # else its classes cannot be counted, or are few
            classes = class_count(self.dataset, self.data_root, self.test_share)
            if classes not in (None, self.init_cls):
                yield ("init_cls", "dataset"), f"{sentence} init_cls = {classes}"
        if self.added:
            yield ("extra_data",), f"{sentence} null"

    def folder_names(self, seed: int) -> list[str]:
        """As where every later task would have as many classes."""
        method, data, *_, run = super().folder_names(seed)
        return [method, data, "0", str(self.init_cls), run]

    def unused_rules(self) -> list[UnusedRule]:
        unused = ("increment", "max_tasks", "head_drift", "ca_restart")
        return [(True, "there is one task", unused), *super().unused_rules()]


# ----------------------------------------------------------------------------------------------------------
# Adapters


def _number_in_quotes(value: Any) -> Any:
    """`"0.1"` -> 0.1: published tuning configs quote this number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _not_zero(scale: float) -> float:
    if abs(scale) < 1e-6:
        raise ValueError("so near to 0 that adapters would add nothing")
    return scale


class BlockKeys(ClassIncrementalConfig):
    """Keys of the blocks that carry adapters."""

    adapter_blocks: Literal["all", "growing"] = key(
        "all", "Blocks that carry adapters: all, as published, or only those that may grow."
    )
    adapt_start_layer: int = key(9, "First block that may grow, counted from 0.", ge=0, le=1000)
    adapt_end_layer: int = key(11, "Last block that may grow, inclusive.", ge=0, le=1000)

    @property
    def grows(self) -> bool:
        """Whether blocks may gain adapters."""
        return False

    @property
    def chooses_blocks(self) -> bool:
        """Whether adapt_start_layer and adapt_end_layer have an effect."""
        return self.grows or self.adapter_blocks == "growing"

    @property
    def trains_adapters(self) -> bool:
        """Whether there are adapters to train."""
        return True

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.trains_adapters and self.adapt_start_layer > self.adapt_end_layer:
            order = "the first growing block is after the last; allowed: adapt_start_layer <= adapt_end_layer"
            yield ("adapt_start_layer", "adapt_end_layer"), order

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        yield from super().shape_conflicts(shape)
        if self.trains_adapters and self.chooses_blocks:
            yield from shape.block_conflicts("adapt_start_layer", self.adapt_start_layer)
            yield from shape.block_conflicts("adapt_end_layer", self.adapt_end_layer)

    def adapted_blocks(self, depth: int) -> range:
        """The blocks that carry adapters, of a backbone with `depth` blocks."""
        if self.adapter_blocks == "all":
            return range(depth)
        return range(self.adapt_start_layer, self.adapt_end_layer + 1)

    def unused_rules(self) -> list[UnusedRule]:
        blocks = ("adapt_start_layer", "adapt_end_layer")
        why = 'all blocks have an adapter and none grows; "adapter_blocks": "growing" puts them in these only'
        return [
            (not self.chooses_blocks, why, blocks),
            *super().unused_rules(),
        ]


class AdapterKeys(BlockKeys):
    """Adapters in the blocks, of one branch, or of a fast and a slow one (Nested LoRA).

    Go with `TrainingKeys`.
    """

    known_as: ClassVar[dict[str, str]] = ClassIncrementalConfig.known_as | dict.fromkeys(
        ("nested_lora", "use_nested_lora"), "ffn_adapter_type=nested_lora"
    )
    lr_keys: ClassVar[tuple[str, ...]] = (
        "init_lr", "adapter_lr", "nested_lora_lr_fast", "nested_lora_lr_slow",
    )  # fmt: skip

    ffn_adapter_type: Literal["adaptmlp", "lora", "nested_lora", "nested_lora_linear"] = key(
        "adaptmlp",
        'One ReLU bottleneck; one plain low-rank product without ReLU and biases ("lora"); or a fast and a '
        'slow one of either, summed ("nested_lora", "nested_lora_linear").',
    )
    ffn_num: int = key(16, 'Bottleneck width of an "adaptmlp" adapter, rank of a "lora" one.', ge=1, le=8192)
    adapter_lr: RateOrZero | None = key(
        None, "Learning rate of adapters with one branch; null = init_lr, as published."
    )
    ffn_adapter_scalar: Annotated[
        float, Field(ge=-1e3, le=1e3), AfterValidator(_not_zero), BeforeValidator(_number_in_quotes)
    ] = key(1.0, "Factor on an adapter's output; published configs name 0.1, published code applies 1.")
    nested_lora_rank: int = key(16, "Rank of each of the two branches.", ge=1, le=4096)
    nested_lora_lr_fast: RateOrZero = key(0.01, "Learning rate of fast branches; 0: they are not trained.")
    nested_lora_lr_slow: RateOrZero = key(
        0.001, "Learning rate of slow branches; 0: only consolidation moves them."
    )
    nested_lora_update_interval_slow: CountOrZero = key(
        1, "Slow branches step on every k-th step only; 0 and 1 mean every step."
    )
    nested_lora_slow_grad: Literal["discard", "accumulate"] = key(
        "discard", "Between slow steps, drop the gradients or use their mean at the k-th step."
    )

    @property
    def nested(self) -> bool:
        """Whether an adapter has a fast and a slow branch."""
        return self.ffn_adapter_type.startswith("nested_lora")

    def group_options(self, name: str) -> dict[str, Any]:
        adapter_lr = self.init_lr if self.adapter_lr is None else self.adapter_lr
        slow = {
            "lr": self.nested_lora_lr_slow,
            "update_interval": self.nested_lora_update_interval_slow,
            "between": self.nested_lora_slow_grad,
        }
        of_adapters = {"slow": slow, "fast": {"lr": self.nested_lora_lr_fast}, "adapter": {"lr": adapter_lr}}
        return of_adapters.get(name) or super().group_options(name)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        rates, way_out = ("adapter_lr",), ", or null for init_lr"
        if self.nested:
            rates, way_out = ("nested_lora_lr_fast", "nested_lora_lr_slow"), " for one branch at least"
        if self.trains_adapters and all(getattr(self, name) == 0 for name in rates):
            yield rates, f"adapters would learn nothing; allowed: a rate above 0{way_out}"

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        yield from super().shape_conflicts(shape)
        if self.trains_adapters and self.nested:
            yield from shape.rank_conflicts("nested_lora_rank", self.nested_lora_rank)
        elif self.trains_adapters:  # as many units as two branches of the largest rank
            yield from shape.rank_conflicts("ffn_num", self.ffn_num, widths=2)

    def unused_rules(self) -> list[UnusedRule]:
        kind = f'ffn_adapter_type is "{self.ffn_adapter_type}"'
        nested = [name for name in type(self).model_fields if name.startswith("nested_lora_")]
        interval = ("nested_lora_update_interval_slow", "nested_lora_slow_grad")
        every_step = self.nested_lora_update_interval_slow <= 1
        return [
            (not self.nested, kind, nested),
            (self.nested, "nested_lora_rank is the width", ("ffn_num",)),
            (self.nested, "nested_lora_lr_fast and nested_lora_lr_slow are the rates", ("adapter_lr",)),
            (self.func_epoch == 0, "func_epoch is 0", (*AdapterKeys.lr_keys, *interval)),
            (self.nested_lora_lr_slow == 0, "nested_lora_lr_slow is 0", interval),
            (every_step, "slow branches step every step", ("nested_lora_slow_grad",)),
            *super().unused_rules(),
        ]

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        yield from super().warnings(nb_seeds)
        if self.ffn_adapter_scalar != 1.0:
            applied = f"ffn_adapter_scalar = {self.ffn_adapter_scalar:g} is applied here"
            yield f"{applied}; the published code names a scale and applies 1"
