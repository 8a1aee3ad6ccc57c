"""Config of the shared-subspace experiment on 8x8 grids.

config = SharedSubspaceConfig(model_name="shared_subspace", alpha=0.5, encoder="gru")

The weight of a loss is a number, or a piecewise linear schedule `[[share, weight], ...]`: its values after
these shares of the training steps. `[[0, 0], [0.3, 1]]` rises from 0 to 1 over the first 30 % of them.
"""

import math
from collections.abc import Iterator
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
from utils.wording import counted

MAX_SAMPLES = 2 * 10**7  # of an epoch: 4 GB
WEIGHT_ALLOWED = (
    f"a number from 0 to {MAX_COUNT}, or points [[share, weight], ...], "
    "shares of training from 0 to 1 ascending"
)


def _as_points(value: Any) -> Any:
    """A number as the points of a constant weight."""
    return [[0.0, value]] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rising_shares(points: list[list[float]]) -> list[list[float]]:
    pairs = bool(points) and all(len(point) == 2 for point in points)
    shares = [point[0] for point in points] if pairs else []
    rising = shares == sorted(set(shares)) and all(0 <= share <= 1 for share in shares)
    if not pairs or not rising or any(not 0 <= weight <= MAX_COUNT for _, weight in points):
        raise ValueError("not points [share, weight] with shares in ascending order")
    return points


def _no_boolean(value: Any) -> Any:
    """Refusal of `true`, which equals 1."""
    if isinstance(value, bool):
        raise ValueError("a wrong type (a boolean)")
    return value


Weight = Annotated[list[list[float]], AfterValidator(_rising_shares), BeforeValidator(_as_points)]
Names = Annotated[list[str], Field(min_length=2), AfterValidator(distinct)]
Length = Annotated[int, Field(ge=1, le=len(PRIMITIVES))]
Lengths = Annotated[list[Length], Field(min_length=1), AfterValidator(distinct)]


class SharedSubspaceConfig(RunConfig):
    """Grids, network, losses, training and few-shot adaptation of the shared-subspace experiment."""

    metrics: ClassVar[tuple[MetricSpec, ...]] = GRIDS
    editable_keys: ClassVar[frozenset[str]] = RunConfig.editable_keys | {"save_every"}
    model_name: Literal["shared_subspace"] = key(
        "shared_subspace",
        "Shared-subspace experiment: do tasks on 8x8 grids that share primitives share a subspace.",
    )

    colours: int = key(5, "Number of colours, the background included.", ge=MIN_COLOURS, le=MAX_COLOURS)
    primitives: Names = key(
        list(PRIMITIVES),
        "The primitives that tasks are composed of.",
        f"a list of at least two different ones of {', '.join(PRIMITIVES)}",
    )
    train_lengths: Lengths = key([1, 2], "Numbers of primitives in the compositions to train on.")
    test_length: Length = key(3, "Number of primitives in the unseen compositions.")
    held_out_pairs: int = key(
        12, "Pairs of primitives that training never combines.", ge=1, le=math.comb(len(PRIMITIVES), 2)
    )
    test_compositions: Count = key(200, "Number of unseen compositions; all if there are fewer.")
    validation_samples: Count = key(512, "Samples that choose the best epoch.")
    test_samples: Count = key(1024, "Samples of each split that the network is tested on.")

    encoder: Literal["transformer", "gru"] = key("transformer", "Encoder of program and patches.")
    decoder: Literal["deconvolution", "mlp"] = key("mlp", "Decoder of h into a grid.")
    width: int = key(64, "Width of the tokens; the decoder's is derived from it.", ge=2, le=4096)
    depth: int = key(2, "Layers of the encoder.", ge=1, le=100)
    heads: int = key(4, "Heads of a transformer's attention.", ge=1, le=4096)
    patch: Annotated[Literal[1, 2, 4], BeforeValidator(_no_boolean)] = key(
        2, "Cells along an edge of a patch."
    )
    hidden: int = key(128, "Width of the bottleneck h.", ge=2, le=4096)
    sparse_units: int = key(512, "Units of the sparse autoencoder of h; 0: there is none.", ge=0, le=65536)
    sparse_activity: float = key(0.05, "Target for the fraction of active sparse units.", gt=0, lt=1)

    task_loss: Literal["ce", "iou"] = key("ce", "Cross-entropy of the cells, or 1 - IoU.")
    alpha: Weight = key([[0.0, 0.1]], "Weight of the sharing loss.", WEIGHT_ALLOWED)
    beta: Weight = key([[0.0, 0.1]], "Weight of the sparse autoencoder's loss.", WEIGHT_ALLOWED)
    gamma: Weight = key([[0.0, 0.1]], "Weight of the auxiliary (primitive) loss.", WEIGHT_ALLOWED)
    sharing_rank: int = key(4, "Dimensions of a group's subspace.", ge=1, le=4096)
    sharing_ema: float = key(
        0.0, "Decay of the running mean of subspaces that groups are pulled towards; 0: none.", ge=0, lt=1
    )
    sharing_detach: bool = key(False, "No gradient through the subspace that groups are pulled towards.")

    batch_size: Count = key(128, "Samples in a training step: a multiple of group_size.")
    grad_accumulation: Count = key(
        1, "Parts a training step is cut into to save memory; the sharing loss compares groups of one part."
    )
    group_size: int = key(16, "Samples of a group: of the same primitives.", ge=2, le=MAX_COUNT)
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
        1.0, "Largest norm of the gradient, over all parameters; larger ones are scaled down.", gt=0, le=1e9
    )
    save_every: Count = key(10, "Epochs after which a checkpoint is written.")

    few_shot_tasks: CountOrZero = key(12, "Unseen compositions that adapters are fitted to, one by one.")
    few_shot_method: Literal["lora", "adapter"] = key("lora", "Kind of adapter at the bottleneck.")
    few_shot_rank: int = key(4, "Rank of a LoRA, hidden units of an adapter.", ge=1, le=4096)
    few_shot_samples: Count = key(32, "Samples of the new task that are trained on.")
    few_shot_queries: Count = key(256, "Samples of the new task that are tested on.")
    few_shot_steps: Count = key(100, "Training steps, each on all samples.")
    few_shot_every: Count = key(5, "Steps between two tests; the last step is tested, too.")
    few_shot_lr: Rate = key(0.01, "Learning rate of the adapters.")
    few_shot_target: float = key(90.0, "IoU in percent that adapters are to reach.", gt=0, le=100)

    @property
    def groups(self) -> int:
        """Groups in a training step."""
        return self.batch_size // self.group_size

    @property
    def slots(self) -> int:
        """Length S of a program."""
        return max(*self.train_lengths, self.test_length)

    def uses(self, weight: str) -> bool:
        """Whether a weight, such as "alpha", is ever positive."""
        return any(value > 0 for _, value in getattr(self, weight))

    def folder_names(self, seed: int) -> list[str]:
        return [self.model_name, "grids", f"{self.prefix}_{seed}_{self.encoder}"]

    def tested_on(self, tasks: int, seen: int, classes: int) -> dict[str, Any]:
        """What decides, with the seed, the held-out and unseen compositions and their test samples."""
        names = {"colours", "primitives", "test_length", "held_out_pairs", "test_compositions"}
        keys = self.model_dump(mode="json", include={*names, "test_samples"})
        return keys | {"longest composition": self.slots}

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self._split_conflicts()
        yield from self._size_conflicts()
        yield from self.min_lr_conflicts(["init_lr"])

    def _split_conflicts(self) -> Iterator[Conflict]:
        """Compositions that do not exist, are too many, or leave a split empty."""
        number = len(self.primitives)
        unknown = [name for name in self.primitives if name not in PRIMITIVES]
        if unknown:
            fault = f"no such primitive: {', '.join(unknown)}"
            yield ("primitives",), f"{fault}; allowed: {', '.join(PRIMITIVES)}"
        for name, length in (("train_lengths", max(self.train_lengths)), ("test_length", self.test_length)):
            compositions = math.perm(number, length)
            if length > number:
                fault = f"a composition holds different primitives, and there are {number}"
                yield (name, "primitives"), f"{fault}; allowed: lengths from 1 to {number}"
            if compositions > MAX_COUNT:
                fault = f"{number} primitives make {compositions} compositions of length {length}"
                yield (name, "primitives"), f"{fault}; allowed: at most {MAX_COUNT} compositions"
        if self.test_length in self.train_lengths:
            fault = "it would not be unseen; allowed: a length not in training"
            yield ("test_length", "train_lengths"), fault
        most = _most_held_out_pairs(number, min(self.train_lengths))
        if self.held_out_pairs > most:
            pairs = math.comb(number, 2)
            fault = f"training of {number} primitives might be left no composition without such a pair"
            if self.held_out_pairs > pairs:
                fault = f"{number} primitives make {counted(pairs, 'pair')}"
            allowed = f"from 1 to {most}" if most > 0 else "more primitives, or a shorter length in training"
            yield ("held_out_pairs", "primitives", "train_lengths"), f"{fault}; allowed: {allowed}"

    def _size_conflicts(self) -> Iterator[Conflict]:
        """Groups too small for a subspace, and sizes that do not divide or exceed another."""
        size, rank, hidden = self.group_size, self.sharing_rank, self.hidden
        if rank >= size:
            fault = f"the subspace of {size} samples has at most {size - 1} dimensions"
            yield ("sharing_rank", "group_size"), f"{fault}; allowed: sharing_rank below group_size"
        if self.batch_size % size or self.groups < 2:
            fault = f"a step takes whole groups, at least two; allowed: such as {max(2, self.groups) * size}"
            yield ("batch_size", "group_size"), fault
        elif self.grad_accumulation > (most := self.groups // 2 if self.uses("alpha") else self.groups):
            needed = "two groups at least, to be compared" if self.uses("alpha") else "a whole group at least"
            fault = f"a part of a step has {needed}; allowed: from 1 to {most}"
            yield ("grad_accumulation", "batch_size"), fault
        if self.steps_per_epoch * self.batch_size > MAX_SAMPLES:
            fault = f"the samples of an epoch are drawn at once; allowed: at most {MAX_SAMPLES} together"
            yield ("steps_per_epoch", "batch_size"), fault
        if self.encoder == "transformer" and self.width % self.heads:
            fault = "each head takes an equal share of the width; allowed: a width that heads divides"
            yield ("width", "heads"), fault
        if self.encoder == "gru" and self.width % 2:
            yield ("width", "encoder"), "each direction takes half of the width; allowed: an even width"
        if rank >= hidden - 1:
            fault = f"h is normalised, so that it lies in {hidden - 1} dimensions whatever the task"
            allowed = f"from 1 to {hidden - 2}" if hidden > 2 else "a larger hidden"
            yield ("sharing_rank", "hidden"), f"{fault}; allowed: {allowed}"
        if not self.few_shot_tasks:
            return
        unseen = min(self.test_compositions, math.perm(len(self.primitives), self.test_length))
        if self.few_shot_tasks > unseen > 0:
            fault = f"each few-shot task is another unseen composition; allowed: from 0 to {unseen}"
            yield ("few_shot_tasks", "test_compositions"), fault
        if self.few_shot_rank > hidden:
            yield ("few_shot_rank", "hidden"), f"h has {hidden} dimensions; allowed: from 1 to {hidden}"

    def unused_rules(self) -> list[UnusedRule]:
        few_shot = {name for name in type(self).model_fields if name.startswith("few_shot_")}
        return [
            (self.encoder == "gru", 'encoder is "gru"', ("heads",)),
            (self.sparse_units == 0, "sparse_units is 0", ("beta", "sparse_activity")),
            (not self.uses("beta"), "beta is 0", ("sparse_activity",)),
            (not self.uses("alpha"), "alpha is 0", ("sharing_ema", "sharing_detach")),
            (self.few_shot_tasks == 0, "few_shot_tasks is 0", few_shot - {"few_shot_tasks"}),
            *super().unused_rules(),
        ]


def _most_held_out_pairs(primitives: int, length: int) -> int:
    """Largest n such that, whichever n pairs are held out, some composition of a length combines none.

    The fewest pairs that leave none are all within length - 1 groups of nearly equal size (Turán, 1941).
    """
    if length == 1:
        return math.comb(primitives, 2)
    sizes = [(primitives + group) // (length - 1) for group in range(length - 1)]
    return sum(math.comb(size, 2) for size in sizes) - 1
