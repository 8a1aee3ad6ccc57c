"""Config keys that the methods on a frozen ViT share, from the fewest to the most.

    ClassIncrementalConfig   data, tasks, and a pretrained backbone
    ViTConfig        a frozen ViT whose features are read (SimpleCIL)
    TrainingConfig   something is trained by gradient: epochs, rates, what classifies in the end (linear probe)
    AdapterConfig    adapters in its blocks (finetune, joint, RanPAC's first session, SEMA)

A method's own `Config` extends one of them beside its learner.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.vit.pretrained import BackboneShape, backbone_shape
from utils.config.schema import MOST, Conflict, IdleRule, PathText, RunConfig, Text, falling_rate
from utils.data.datasets import class_count, dataset_slug
from utils.data.tasks import tasks_of
from utils.errors import UserError, os_error_sentence
from utils.files import why_no_file
from utils.metric_catalogue import CLASS_INCREMENTAL, MetricSpec

BATCH_KEYS = (
    "batch_size",
    "grad_accumulation",
    "augmentation",
)  # count only where something is trained by gradient


def _tiny_for_null(value: Any) -> Any:
    return 1e-8 if value is None else value


def _number_in_quotes(value: Any) -> Any:
    """`"0.1"` -> 0.1: published tuning configs quote this number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _not_zero(scale: float) -> float:
    if abs(scale) < 1e-6:
        raise ValueError("so near to 0 that adapters would add nothing")
    return scale


class ClassIncrementalConfig(RunConfig):
    """The keys every class-incremental method has: data, tasks, and a pretrained backbone."""

    metrics: ClassVar[tuple[MetricSpec, ...]] = CLASS_INCREMENTAL
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
    editable_keys: ClassVar[frozenset[str]] = RunConfig.editable_keys | {
        "dataset", "data_root", "weights", "weights_root", "num_workers", "checkpoints", "cache_root", "cache_gb",
    }  # fmt: skip

    dataset: PathText = Field(
        "cifar224", description="A known data set's name, or the path of an .npz or image folder."
    )
    data_root: PathText = Field(
        "data", description="Folder where data sets are looked for and downloaded to."
    )
    weights_root: PathText = Field(
        "weights", description="Folder where backbone weights are looked for and fetched to."
    )
    shuffle: bool = Field(
        True, description="Draw the class order from the seed; false keeps the data set's order."
    )
    init_cls: int = Field(10, ge=1, le=MOST, description="Classes of the first task.")
    increment: int = Field(
        10, ge=1, le=MOST, description="Classes of every later task; the last task may be shorter."
    )
    max_tasks: int | None = Field(
        None, ge=1, le=MOST, description="Stop after this many tasks; null runs all."
    )
    max_train_per_class: int | None = Field(
        None, ge=1, le=MOST, description="Training images of each class; null = all."
    )
    max_test_per_class: int | None = Field(
        None, ge=1, le=MOST, description="Test images of each class; null = all."
    )
    num_workers: int | None = Field(
        None, ge=0, le=256, description="Data workers; null = 0 on the CPU, else min(8, cores)."
    )

    backbone_type: Text = Field(
        "pretrained_vit_b16_224_adapter",
        description="Published short name, or a timm name with its weight tag.",
    )
    weights: PathText | None = Field(
        None, description='null for the backbone\'s own, "random" for untrained, or a file.'
    )
    image_size: int | None = Field(
        None, ge=8, le=2048, description="Side of the input in pixels; null = the weights' own."
    )
    input_normalization: Literal["none", "weights"] = Field(
        "none",
        description='"none" feeds images in [0, 1], as published; "weights" uses mean and std of the weights.',
    )
    augmentation: Literal["crop_flip", "crop", "none"] = Field(
        "crop_flip", description="Random resized crop with or without horizontal flip, or the test transform."
    )

    checkpoints: Literal["all", "last"] = Field(
        "all", description="Keep the checkpoint of every task, or the last."
    )
    cache_root: PathText = Field(
        "cache", description="Folder for what is computed once: activations, decoded images."
    )
    cache_gb: float = Field(
        20.0, ge=0, le=MOST, description="Size it may reach in GB (10^9 bytes); 0 keeps nothing."
    )

    def folder_names(self, seed: int) -> list[str]:
        """Method, data set, classes of the first task (0 where they are the increment), increment, then the run."""
        first = 0 if self.init_cls == self.increment else self.init_cls
        run = f"{self.prefix}_{seed}_{self.backbone_type}"
        return [self.model_name, dataset_slug(self.dataset), str(first), str(self.increment), run]

    def conflicts(self) -> list[Conflict]:
        """Adds data and backbones that are not there, and sizes that do not fit them."""
        found = [*self._class_conflicts(), *self._backbone_conflicts(), *super().conflicts()]
        if self.grad_accumulation > self.batch_size and "grad_accumulation" not in self.without_effect():
            fault = f"a step of {self.batch_size} samples has at most as many parts"
            found.append(
                (("grad_accumulation", "batch_size"), f"{fault}; allowed: from 1 to {self.batch_size}")
            )
        return found

    def known_classes(self) -> int | None:
        """Number of classes of the data set; None when it is unknown (which `conflicts` reports) or not there yet."""
        try:
            return class_count(self.dataset, self.data_root)
        except (UserError, OSError):
            return None

    def idle_rules(self) -> list[IdleRule]:
        """Adds folders in which nothing is looked for."""
        return [
            (self.weights is not None, "weights says which", ["weights_root"]),
            (self.dataset == "synthetic", 'dataset is "synthetic"', ["data_root"]),
            *super().idle_rules(),
        ]

    def remarks(self) -> list[str]:
        """Adds a warning of tasks that the method learns nothing from."""
        classes = self.known_classes()
        tasks = [] if classes is None else tasks_of(classes, self.init_cls, self.increment, self.max_tasks)
        advice = {task: self.one_class_advice(task) for task, labels in enumerate(tasks) if len(labels) == 1}
        untaught = [task for task, text in advice.items() if text]
        if not untaught:
            return super().remarks()
        shown = ", ".join(map(str, untaught[:3])) + (", ..." if len(untaught) > 3 else "")
        fault = f"task {shown} of 0 to {len(tasks) - 1} brings one class: cross-entropy over it alone is zero"
        return [*super().remarks(), f"{fault} and teaches nothing; {advice[untaught[0]]}"]

    def one_class_advice(self, task: int) -> str:
        """What to do where a task brings one class only; empty where the method learns from it all the same."""
        return ""

    def known_backbone(self) -> BackboneShape | None:
        """Depth, width and patch of the backbone; None when its name is unknown (which `conflicts` reports)."""
        try:
            return backbone_shape(self.backbone_type)
        except UserError:
            return None

    def _class_conflicts(self) -> list[Conflict]:
        try:
            classes = class_count(self.dataset, self.data_root)
        except UserError as error:
            return [(("dataset",), str(error))]
        except OSError as error:
            return [(("dataset",), os_error_sentence(error))]
        if classes is None:
            return []
        return [
            ((key, "dataset"), f"the data set has {classes} classes; allowed: {key} from 1 to {classes}")
            for key in ("init_cls", "increment")
            if getattr(self, key) > classes
        ]

    def _backbone_conflicts(self) -> list[Conflict]:
        found: list[Conflict] = []
        if self.weights not in (None, "random") and (reason := why_no_file(Path(self.weights))):
            found.append((("weights",), f'{reason}; allowed: null, "random" or the path of a weight file'))
        try:
            shape = backbone_shape(self.backbone_type, weights=self.weights and "random")
        except UserError as error:
            return [*found, (("backbone_type",), str(error))]
        if self.image_size is not None and self.image_size % shape.patch:
            low = max(self.image_size // shape.patch, 1) * shape.patch
            fault = f"the side is no multiple of the {shape.patch}-pixel patch"
            nearby = f"allowed: a multiple of {shape.patch}, such as {low} or {low + shape.patch}"
            found.append((("image_size", "backbone_type"), f"{fault}; {nearby}"))
        return found


class ViTConfig(ClassIncrementalConfig):
    """Features of a frozen ViT."""

    engine: Literal["fast", "reference"] = Field(
        "fast",
        description='"reference" stores no activations and stacks no adapters: slow and plain, fp32 only.',
    )
    ranpac_dim: int = Field(
        2000, ge=1, le=20_000, description="Random features of RanPAC's ridge regression; published: 10000."
    )

    def conflicts(self) -> list[Conflict]:
        """Adds the precision of the reference."""
        found = super().conflicts()
        if self.engine == "reference" and self.precision != "fp32":
            found.append(
                (("engine", "precision"), 'the reference computes in fp32; allowed with it: precision "fp32"')
            )
        return found


class TrainingConfig(ViTConfig):
    """Something learns by gradient: a classifier at least.

    `one_task`: the method learns all classes at once. `rates`: the keys of its learning rates.
    """

    one_task: ClassVar[bool] = False
    rates: ClassVar[tuple[str, ...]] = ("init_lr",)

    func_epoch: int = Field(
        5, ge=0, le=MOST, description="Epochs of a functional phase (adapters, router, classifier)."
    )
    init_lr: float = Field(0.005, gt=0, lt=1e3, description="Learning rate of functional phases.")
    weight_decay: float = Field(0.0005, ge=0, lt=1e3, description="Weight decay.")
    min_lr: Annotated[float, Field(ge=0, lt=1e3), BeforeValidator(_tiny_for_null)] = Field(
        0.0,
        description="Where the cosine schedule ends; null is read as 1e-8, as published.",
        json_schema_extra={"allowed": "a number >= 0 and < 1000, or null for 1e-8"},
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description='SGD with momentum 0.9; "adam" means AdamW.')
    cache_views: int = Field(
        0,
        ge=0,
        le=1000,
        description="Fixed augmented views of an image for training; 0 = new ones every epoch, as published.",
    )
    head: Literal["fc", "cosine", "ranpac"] = Field(
        "fc", description="What classifies: the trained classifier, class means by cosine, or RanPAC's ridge."
    )
    head_drift: Literal["none", "linear"] = Field(
        "none",
        description='Class statistics of earlier tasks when features move: kept, or carried along ("linear").',
    )

    def conflicts(self) -> list[Conflict]:
        """Adds a schedule that would raise a rate, and a first task that leaves classes out where there is no other."""
        found = super().conflicts() + falling_rate(self, self.rates)
        if self.one_task and not any("dataset" in keys for keys, _ in found):
            classes = self.known_classes()
            if classes not in (None, self.init_cls):
                sentence = f"{self.model_name} learns all classes at once; allowed: init_cls = {classes}"
                found.append((("init_cls", "dataset"), sentence))
        return found

    @property
    def trains(self) -> bool:
        """Whether there is any epoch of training."""
        return self.func_epoch > 0

    def idle_rules(self) -> list[IdleRule]:
        """Adds keys of later tasks where there are none, of training without epochs, of other heads, of equal views."""
        head = f'head is "{self.head}"'
        one_view = self.augmentation == "none" and (self.engine == "reference" or self.cache_gb == 0)
        training = ("batch_size", "augmentation", "weight_decay", "min_lr", "optimizer", "cache_views")
        return [
            (self.one_task, "there is one task", ("max_tasks", "checkpoints", "head_drift")),
            (not self.trains, "no epoch trains anything", training),
            (self.func_epoch == 0, "func_epoch is 0", ("init_lr", "grad_accumulation", "head_drift")),
            (self.head == "fc", head, ("head_drift", "ranpac_dim")),
            (self.head == "cosine", head, ("ranpac_dim",)),
            (one_view, 'augmentation is "none" and nothing is stored', ("cache_views",)),
            *super().idle_rules(),
        ]

    def one_class_advice(self, task: int) -> str:
        if self.head == "fc":
            return 'the classifier cannot tell such classes apart: set head to "cosine" or "ranpac", or enlarge tasks'
        return f'head "{self.head}" tells such classes apart all the same, by features that they leave as they are'


class AdapterConfig(TrainingConfig):
    """Adapters in the blocks of the ViT: one bottleneck each, or a fast and a slow one (Nested LoRA)."""

    known_as: ClassVar[dict[str, str]] = TrainingConfig.known_as | {
        "use_nested_lora": "ffn_adapter_type=nested_lora"
    }
    rates: ClassVar[tuple[str, ...]] = ("init_lr", "adapter_lr", "nested_lora_lr_fast", "nested_lora_lr_slow")

    ffn_adapter_type: Literal["adaptmlp", "lora", "nested_lora", "nested_lora_linear"] = Field(
        "adaptmlp",
        description='One ReLU bottleneck; one plain low-rank product without ReLU and biases ("lora"); or a fast and a '
        'slow one of either, summed ("nested_lora", "nested_lora_linear").',
    )
    ffn_num: int = Field(
        16, ge=1, le=8192, description='Bottleneck width of an "adaptmlp" adapter, rank of a "lora" one.'
    )
    adapter_lr: float | None = Field(
        None,
        ge=0,
        lt=1e3,
        description="Learning rate of adapters with one branch; null = init_lr, as published.",
    )
    ffn_adapter_scalar: Annotated[
        float, Field(ge=-1e3, le=1e3), AfterValidator(_not_zero), BeforeValidator(_number_in_quotes)
    ] = Field(1.0, description="Factor on an adapter's output; the published code names 0.1 and applies 1.")
    adapter_blocks: Literal["all", "growing"] = Field(
        "all", description="Blocks that carry adapters: all, as published, or only those that may grow."
    )
    adapt_start_layer: int = Field(9, ge=0, le=1000, description="First block that may grow, counted from 0.")
    adapt_end_layer: int = Field(11, ge=0, le=1000, description="Last block that may grow, inclusive.")

    nested_lora_rank: int = Field(16, ge=1, le=4096, description="Rank of each of the two branches.")
    nested_lora_lr_fast: float = Field(
        0.01, ge=0, lt=1e3, description="Learning rate of fast branches; 0: they stay silent."
    )
    nested_lora_lr_slow: float = Field(
        0.001, ge=0, lt=1e3, description="Learning rate of slow branches; 0: only consolidation moves them."
    )
    nested_lora_update_interval_slow: int = Field(
        1, ge=0, le=MOST, description="Slow branches step on every k-th step only; 0 and 1 mean every step."
    )
    nested_lora_slow_grad: Literal["discard", "accumulate"] = Field(
        "discard", description="Between slow steps, drop the gradients or use their mean at the k-th step."
    )

    @property
    def grows(self) -> bool:
        """Whether blocks may gain adapters."""
        return False

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are there to be trained."""
        return True

    def conflicts(self) -> list[Conflict]:
        """Adds, where adapters are trained, the order of blocks, the backbone's depth and width, and useless rates."""
        found = [*super().conflicts(), *self._rate_conflicts()]
        if not self.trains_adapters:
            return found
        if self.adapt_start_layer > self.adapt_end_layer:
            sentence = (
                "the first growing block comes after the last; allowed: adapt_start_layer <= adapt_end_layer"
            )
            found.append((("adapt_start_layer", "adapt_end_layer"), sentence))
        shape = self.known_backbone()
        if shape is not None:
            found += [*self._beyond_depth(shape.depth), *self._beyond_width(shape.width)]
        return found

    @property
    def nested(self) -> bool:
        """Whether an adapter has a fast and a slow branch."""
        return self.ffn_adapter_type.startswith("nested_lora")

    def _beyond_depth(self, depth: int) -> list[Conflict]:
        return [
            ((key, "backbone_type"), f"the backbone has {depth} blocks; allowed: {key} from 0 to {depth - 1}")
            for key in ("adapt_start_layer", "adapt_end_layer")
            if getattr(self, key) >= depth
        ]

    def _beyond_width(self, width: int) -> list[Conflict]:
        """Two branches of the largest rank have as many units as one adapter of twice that width."""
        key, most = ("nested_lora_rank", width) if self.nested else ("ffn_num", 2 * width)
        if getattr(self, key) <= most:
            return []
        return [((key, "backbone_type"), f"tokens have width {width}; allowed: {key} from 1 to {most}")]

    def _rate_conflicts(self) -> list[Conflict]:
        nothing = "adapters would learn nothing"
        if not self.trains_adapters:
            return []
        if self.nested and self.nested_lora_lr_fast == self.nested_lora_lr_slow == 0:
            keys = ("nested_lora_lr_fast", "nested_lora_lr_slow")
            return [(keys, f"{nothing}; allowed: a rate above 0 for one of the branches at least")]
        if not self.nested and self.adapter_lr == 0:
            return [(("adapter_lr",), f"{nothing}; allowed: a rate above 0, or null for init_lr")]
        return []

    def idle_rules(self) -> list[IdleRule]:
        """Adds keys of the other adapter type, of a slow branch that stays, and of blocks where none may grow."""
        kind = f'ffn_adapter_type is "{self.ffn_adapter_type}"'
        nested = [key for key in type(self).model_fields if key.startswith("nested_lora_")]
        rhythm = ("nested_lora_update_interval_slow", "nested_lora_slow_grad")
        everywhere = not self.grows and self.adapter_blocks == "all"
        return [
            (not self.nested, kind, nested),
            (self.nested, "nested_lora_rank is the width", ("ffn_num",)),
            (self.nested, "nested_lora_lr_fast and nested_lora_lr_slow are the rates", ("adapter_lr",)),
            (self.func_epoch == 0, "func_epoch is 0", (*AdapterConfig.rates, *rhythm)),
            (self.nested_lora_lr_slow == 0, "nested_lora_lr_slow is 0", rhythm),
            (self.nested_lora_update_interval_slow <= 1, "slow steps every step", ("nested_lora_slow_grad",)),
            (
                everywhere,
                "all blocks have an adapter and none grows",
                ("adapt_start_layer", "adapt_end_layer"),
            ),
            *super().idle_rules(),
        ]

    def remarks(self) -> list[str]:
        """Warns of a scale that the published code names but does not apply."""
        if self.ffn_adapter_scalar == 1.0:
            return super().remarks()
        scale = f"ffn_adapter_scalar = {self.ffn_adapter_scalar:g} is applied here"
        return [*super().remarks(), f"{scale}; the published code names such a scale and applies 1"]
