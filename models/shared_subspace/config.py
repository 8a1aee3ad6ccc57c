"""Config of the shared-subspace experiment on 8x8 grids.

config = SharedSubspaceConfig(model_name="shared_subspace", alpha=0.5, encoder="gru")

The weight of a loss is a number, or points `[[share, weight], ...]` with straight lines between them: its
value after that share of the training steps. `[[0, 0], [0.3, 1]]` rises from 0 to 1 over the first three
tenths and stays.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.shared_subspace.metrics import GRIDS
from models.shared_subspace.primitives import MAX_COLOURS, MIN_COLOURS, PRIMITIVES
from utils.config.schema import (
    MAX_COUNT,
    Conflict,
    Count,
    CountOrZero,
    Rate,
    RateOrZero,
    RunConfig,
    UnusedRule,
    distinct,
    key,
)
from utils.metric_catalogue import MetricSpec

MIN_GROUP_SIZE = 2  # a single sample spans no subspace
MAX_SAMPLES = 2 * 10**7  # of an epoch: 4 GB
WEIGHT_ALLOWED = (
    f"a number from 0 to {MAX_COUNT}, or points [[share, weight], ...], "
    "shares of training from 0 to 1 ascending"
)


def _as_points(value: Any) -> Any:
    """A number as the points of a constant weight."""
    return [[0.0, value]] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rising_shares(points: list[list[float]]) -> list[list[float]]:
    if not points or any(len(point) != 2 for point in points):
        raise ValueError("holds no points [share, weight]")
    shares = [share for share, _ in points]
    if shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise ValueError("shares are not in ascending order from 0 to 1")
    if any(not 0 <= weight <= MAX_COUNT for _, weight in points):
        raise ValueError(f"a weight is not between 0 and {MAX_COUNT}")
    return points


def _no_boolean(value: Any) -> Any:
    """`true` equals 1, and is no number of cells."""
    if isinstance(value, bool):
        raise ValueError("a wrong type (a boolean)")
    return value


Weight = Annotated[list[list[float]], AfterValidator(_rising_shares), BeforeValidator(_as_points)]
Names = Annotated[list[str], Field(min_length=2), AfterValidator(distinct)]
Length = Annotated[int, Field(ge=1, le=len(PRIMITIVES))]
Lengths = Annotated[list[Length], Field(min_length=1)]


def _weight(default: float, meaning: str) -> Any:
    return key([[0.0, default]], meaning, WEIGHT_ALLOWED)


class SharedSubspaceConfig(RunConfig):
    """Grids, network, losses, training and few-shot adaptation of the shared-subspace experiment."""

    metrics: ClassVar[tuple[MetricSpec, ...]] = GRIDS
    editable_keys: ClassVar[frozenset[str]] = RunConfig.editable_keys | {"save_every"}
    model_name: Literal["shared_subspace"] = key("shared_subspace", "The method.")

    colours: int = key(5, "Number of colours, the background included.", ge=MIN_COLOURS, le=MAX_COLOURS)
    primitives: Names = key(
        list(PRIMITIVES),
        "The primitives that tasks are composed of.",
        f"a list of at least two different ones of {', '.join(PRIMITIVES)}",
    )
    train_lengths: Lengths = key([1, 2], "Numbers of steps of the compositions to train on.")
    test_length: Length = key(3, "Number of steps of the unseen compositions.")
    held_out_pairs: int = key(
        12, "Pairs of primitives that training never combines.", ge=1, le=math.comb(len(PRIMITIVES), 2)
    )
    test_compositions: Count = key(200, "Unseen compositions; all where there are fewer.")
    validation_samples: Count = key(512, "Samples that choose the best epoch.")
    test_samples: Count = key(1024, "Samples of each table's line.")

    encoder: Literal["transformer", "gru"] = key("transformer", "Encoder of program and patches.")
    decoder: Literal["deconvolution", "mlp"] = key("mlp", "Decoder of h into a grid.")
    width: int = key(64, "Width of the tokens; that of the decoder follows.", ge=2, le=4096)
    depth: int = key(2, "Layers of the encoder.", ge=1, le=100)
    heads: int = key(4, "Heads of a transformer's attention.", ge=1, le=4096)
    patch: Annotated[Literal[1, 2, 4], BeforeValidator(_no_boolean)] = key(
        2, "Cells along an edge of a patch."
    )
    hidden: int = key(128, "Width of the bottleneck h.", ge=2, le=4096)
    sparse_units: int = key(512, "Units of the sparse autoencoder of h; 0: there is none.", ge=0, le=65536)
    sparse_activity: float = key(0.05, "Target for the share of its units that are active.", gt=0, lt=1)

    task_loss: Literal["ce", "iou"] = key("ce", "Cross-entropy of the cells, or 1 - IoU.")
    alpha: Weight = _weight(0.1, "Weight of the sharing loss.")
    beta: Weight = _weight(0.1, "Weight of the sparse autoencoder's loss.")
    gamma: Weight = _weight(0.1, "Weight of the auxiliary (primitive) loss.")
    sharing_rank: int = key(4, "Dimensions of a group's subspace.", ge=1, le=4096)
    sharing_ema: float = key(
        0.0, "Decay of the running mean of subspaces that groups are pulled towards; 0: none.", ge=0, lt=1
    )
    sharing_detach: bool = key(False, "No gradient through the subspace that groups are pulled towards.")

    batch_size: Count = key(128, "Samples in a training step: a multiple of group_size.")
    grad_accumulation: Count = key(1, "Parts a training step is cut into to save memory.")
    group_size: int = key(16, "Samples of a group: of the same primitives.", ge=MIN_GROUP_SIZE, le=MAX_COUNT)
    eval_batch_size: Count = key(512, "Samples in a batch without gradients.")
    epochs: Count = key(60, "Epochs; each draws new samples, and is validated.")
    steps_per_epoch: Count = key(100, "Training steps of an epoch.")
    optimizer: Literal["sgd", "adam", "fused_adam"] = key(
        "fused_adam", 'SGD with momentum 0.9, or AdamW; "fused_adam" is AdamW in one kernel, the fastest.'
    )
    init_lr: Rate = key(0.001, "Learning rate at the start.")
    min_lr: RateOrZero = key(0.0, "Learning rate at the end of the cosine schedule.")
    weight_decay: RateOrZero = key(0.01, "Weight decay.")
    clip_norm: float = key(
        1.0,
        "Largest norm of the gradient, over all parameters; larger ones are scaled down to it.",
        gt=0,
        le=1e9,
    )
    save_every: Count = key(10, "Epochs after which a checkpoint is written.")

    few_shot_tasks: CountOrZero = key(12, "Unseen compositions that adapters are fitted to, one by one.")
    few_shot_method: Literal["lora", "adapter"] = key("lora", "Kind of adapter at the bottleneck.")
    few_shot_rank: int = key(4, "Rank of a LoRA, hidden units of an adapter.", ge=1, le=4096)
    few_shot_samples: Count = key(32, "Samples of the new task that are trained on.")
    few_shot_queries: Count = key(256, "Samples of the new task that are tested on.")
    few_shot_steps: Count = key(100, "Training steps, each on all samples.")
    few_shot_every: Count = key(5, "Steps between two tests.")
    few_shot_lr: Rate = key(0.01, "Learning rate of the adapters.")
    few_shot_target: float = key(90.0, "IoU in percent that counts as reached.", gt=0, le=100)

    @property
    def groups(self) -> int:
        """Groups in a training step."""
        return self.batch_size // self.group_size

    def folder_names(self, seed: int) -> list[str]:
        return [self.model_name, "grids", f"{self.prefix}_{seed}_{self.encoder}"]

    def conflicts(self) -> list[Conflict]:
        """Impossible splits, groups too small for a subspace, and sizes that do not divide."""
        splits = split_problems(self.primitives, self.train_lengths, self.test_length, self.held_out_pairs)
        own = [
            *splits,
            *self._group_conflicts(),
            *self._size_conflicts(),
            *self.min_lr_conflicts(["init_lr"]),
        ]
        return [*super().conflicts(), *own]

    def _group_conflicts(self) -> list[Conflict]:
        size, rank = self.group_size, self.sharing_rank
        found: list[Conflict] = []
        if rank >= size:
            fault = f"the subspace of {size} samples has at most {size - 1} dimensions"
            found.append((("sharing_rank", "group_size"), f"{fault}; allowed: sharing_rank below group_size"))
        if self.batch_size % size or self.groups < 2:
            fault = "a step takes whole groups, at least two"
            found.append(
                (("batch_size", "group_size"), f"{fault}; allowed: such as {max(2, self.groups) * size}")
            )
        elif self.grad_accumulation > self.groups:
            fault = f"parts of a step are whole groups, and there are {self.groups}"
            found.append((("grad_accumulation", "batch_size"), f"{fault}; allowed: from 1 to {self.groups}"))
        return found

    def _size_conflicts(self) -> list[Conflict]:
        found: list[Conflict] = []
        for name, length in (("train_lengths", max(self.train_lengths)), ("test_length", self.test_length)):
            orders = math.perm(len(self.primitives), length)
            if orders > MAX_COUNT:
                fault = f"{len(self.primitives)} primitives make {orders} compositions of length {length}"
                found.append(((name, "primitives"), f"{fault}; allowed: at most {MAX_COUNT} compositions"))
        samples = self.steps_per_epoch * self.batch_size
        if samples > MAX_SAMPLES:
            fault = f"the {samples} samples of an epoch are drawn at once"
            found.append(
                (("steps_per_epoch", "batch_size"), f"{fault}; allowed: at most {MAX_SAMPLES} together")
            )
        if self.encoder == "transformer" and self.width % self.heads:
            fault = "each head takes an equal share of the width"
            found.append((("width", "heads"), f"{fault}; allowed: a width that heads divides"))
        if self.encoder == "gru" and self.width % 2:
            found.append(
                (("width", "encoder"), "each direction takes half of the width; allowed: an even width")
            )
        if self.sharing_rank >= self.hidden:
            fault = f"h has {self.hidden} dimensions"
            found.append((("sharing_rank", "hidden"), f"{fault}; allowed: from 1 to {self.hidden - 1}"))
        unseen = min(self.test_compositions, math.perm(len(self.primitives), self.test_length))
        if self.few_shot_tasks > unseen > 0:
            fault = f"each few-shot task is another unseen composition, and there are {unseen}"
            found.append((("few_shot_tasks", "test_compositions"), f"{fault}; allowed: from 0 to {unseen}"))
        if self.few_shot_tasks and self.few_shot_rank > self.hidden:
            fault = f"h has {self.hidden} dimensions"
            found.append((("few_shot_rank", "hidden"), f"{fault}; allowed: from 1 to {self.hidden}"))
        if self.few_shot_tasks and self.few_shot_every > self.few_shot_steps:
            fault = "there would be no test"
            found.append(
                (("few_shot_every", "few_shot_steps"), f"{fault}; allowed: from 1 to {self.few_shot_steps}")
            )
        return found

    def unused_rules(self) -> list[UnusedRule]:
        names = type(self).model_fields.keys() - {"few_shot_tasks"}
        few_shot = [name for name in names if name.startswith("few_shot_")]
        sparse = any(weight > 0 for _, weight in self.beta)
        return [
            (self.encoder == "gru", 'encoder is "gru"', ("heads",)),
            (self.sparse_units == 0, "sparse_units is 0", ("beta", "sparse_activity")),
            (not sparse, "beta is 0", ("sparse_activity",)),
            (not self.shares, "alpha is 0", ("sharing_ema", "sharing_detach")),
            (self.few_shot_tasks == 0, "few_shot_tasks is 0", few_shot),
            *super().unused_rules(),
        ]

    @property
    def shares(self) -> bool:
        """Whether the sharing loss ever has weight."""
        return any(weight > 0 for _, weight in self.alpha)


def split_problems(
    primitives: Sequence[str], train_lengths: Sequence[int], test_length: int, held_out_pairs: int
) -> list[Conflict]:
    """Reasons why such splits are impossible: the config keys, and a sentence that says what is allowed."""
    found: list[Conflict] = []
    unknown = [name for name in primitives if name not in PRIMITIVES]
    if unknown:
        names = f"no such primitive: {', '.join(unknown)}; allowed: {', '.join(PRIMITIVES)}"
        found.append((("primitives",), names))
    number, pairs = len(primitives), len(primitives) * (len(primitives) - 1) // 2
    within = (
        f"a composition holds different primitives, and there are {number}; "
        f"allowed: lengths from 1 to {number}"
    )
    if not all(1 <= length <= number for length in train_lengths):
        found.append((("train_lengths", "primitives"), within))
    if not 1 <= test_length <= number:
        found.append((("test_length", "primitives"), within))
    if test_length in train_lengths:
        fault = "it would not be unseen; allowed: a length not in training"
        found.append((("test_length", "train_lengths"), fault))
    most = pairs - (list(train_lengths) == [2])
    if not 1 <= held_out_pairs <= most:
        made = f"{pairs} pair{'' if pairs == 1 else 's'}"
        fault = f"{number} primitives make {made}, and neither training nor the held-out set may be empty"
        found.append((("held_out_pairs", "primitives"), f"{fault}; allowed: from 1 to {most}"))
    return found
