"""Config keys of the shared-subspace experiment on 8x8 grids.

config = SharedSubspaceConfig(model_name="shared_subspace", alpha=0.5, encoder="gru")

A weight of a loss is a number, or points `[[share, weight], ...]` with straight lines between them: what it is after
that share of the training steps. `[[0, 0], [0.3, 1]]` rises from 0 to 1 over the first three tenths and stays.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.shared_subspace.metrics import GRIDS
from models.shared_subspace.primitives import FEWEST_COLOURS, MOST_COLOURS, PRIMITIVES
from models.shared_subspace.tasks import LEAST_GROUP, split_problems
from utils.config.schema import MOST, Conflict, IdleRule, RunConfig, falling_rate
from utils.metric_catalogue import MetricSpec


def _as_points(value: Any) -> Any:
    """A number as the points of a constant weight."""
    return [[0.0, value]] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rising_shares(points: list[list[float]]) -> list[list[float]]:
    if not points or any(len(point) != 2 for point in points):
        raise ValueError("holds no points [share, weight]")
    shares = [share for share, _ in points]
    if shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise ValueError("shares are not in ascending order from 0 to 1")
    if any(not 0 <= weight <= MOST for _, weight in points):
        raise ValueError(f"a weight is not between 0 and {MOST}")
    return points


def _no_boolean(value: Any) -> Any:
    """`true` equals 1, and is no number of cells."""
    if isinstance(value, bool):
        raise ValueError("a wrong type (a boolean)")
    return value


def _distinct(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"holds {', '.join(twice)} more than once")
    return names


MOST_SAMPLES = 2 * 10**7  # of an epoch: 4 GB
WEIGHT_ALLOWED = (
    f"a number from 0 to {MOST}, or points [[share, weight], ...], shares of training from 0 to 1 ascending"
)
Weight = Annotated[list[list[float]], AfterValidator(_rising_shares), BeforeValidator(_as_points)]
Names = Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]
Length = Annotated[int, Field(ge=1, le=len(PRIMITIVES))]
Lengths = Annotated[list[Length], Field(min_length=1)]


def _weight(default: float, description: str) -> Any:
    return Field([[0.0, default]], description=description, json_schema_extra={"allowed": WEIGHT_ALLOWED})


class SharedSubspaceConfig(RunConfig):
    """Do subspaces shared between tasks help on new combinations of them?"""

    metrics: ClassVar[tuple[MetricSpec, ...]] = GRIDS
    editable_keys: ClassVar[frozenset[str]] = RunConfig.editable_keys | {"save_every"}
    model_name: Literal["shared_subspace"] = Field("shared_subspace", description="The method.")

    colours: int = Field(
        5, ge=FEWEST_COLOURS, le=MOST_COLOURS, description="Colours there are, the background too."
    )
    primitives: Names = Field(
        list(PRIMITIVES),
        description="The primitives that tasks are composed of.",
        json_schema_extra={"allowed": f"a list of at least two different ones of {', '.join(PRIMITIVES)}"},
    )
    train_lengths: Lengths = Field([1, 2], description="Numbers of steps of the compositions to train on.")
    test_length: Length = Field(3, description="Number of steps of the unseen compositions.")
    held_out_pairs: int = Field(
        12,
        ge=1,
        le=math.comb(len(PRIMITIVES), 2),
        description="Pairs of primitives that training never combines.",
    )
    test_compositions: int = Field(
        200, ge=1, le=MOST, description="Unseen compositions; all where there are fewer."
    )
    validation_samples: int = Field(512, ge=1, le=MOST, description="Samples that choose the best epoch.")
    test_samples: int = Field(1024, ge=1, le=MOST, description="Samples of each table's line.")

    encoder: Literal["transformer", "gru"] = Field(
        "transformer", description="What reads program and patches."
    )
    decoder: Literal["deconvolution", "mlp"] = Field("mlp", description="What makes a grid of h.")
    width: int = Field(64, ge=2, le=4096, description="Width of the tokens; that of the decoder follows.")
    depth: int = Field(2, ge=1, le=100, description="Layers of the encoder.")
    heads: int = Field(4, ge=1, le=4096, description="Heads of a transformer's attention.")
    patch: Annotated[Literal[1, 2, 4], BeforeValidator(_no_boolean)] = Field(
        2, description="Cells along an edge of a patch."
    )
    hidden: int = Field(128, ge=2, le=4096, description="Width of the bottleneck h.")
    sparse_units: int = Field(
        512, ge=0, le=65536, description="Units of the sparse autoencoder of h; 0: there is none."
    )
    sparse_activity: float = Field(0.05, gt=0, lt=1, description="Share of its units that shall be active.")

    task_loss: Literal["ce", "iou"] = Field("ce", description="Cross-entropy of the cells, or 1 - IoU.")
    alpha: Weight = _weight(0.1, "Weight of the sharing loss.")
    beta: Weight = _weight(0.1, "Weight of the sparse autoencoder's loss.")
    gamma: Weight = _weight(0.1, "Weight of naming the primitives.")
    sharing_rank: int = Field(4, ge=1, le=4096, description="Dimensions of a group's subspace.")
    sharing_ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of a running mean to pull towards; 0: none."
    )
    sharing_detach: bool = Field(False, description="Whether what is pulled towards stands still.")

    batch_size: int = Field(
        128, ge=1, le=MOST, description="Samples in a training step: a multiple of group_size."
    )
    group_size: int = Field(
        16, ge=LEAST_GROUP, le=MOST, description="Samples of a group: of the same primitives."
    )
    eval_batch_size: int = Field(512, ge=1, le=MOST, description="Samples in a batch without gradients.")
    epochs: int = Field(
        60, ge=1, le=MOST, description="Epochs; each draws new samples, is validated, and moves the rate on."
    )
    steps_per_epoch: int = Field(100, ge=1, le=MOST, description="Training steps of an epoch.")
    optimizer: Literal["sgd", "adam", "fused_adam"] = Field(
        "fused_adam",
        description='SGD with momentum 0.9, or AdamW; "fused_adam" is AdamW in one kernel, the fastest.',
    )
    init_lr: float = Field(0.001, gt=0, lt=1e3, description="Learning rate at the start.")
    min_lr: float = Field(0.0, ge=0, lt=1e3, description="Where its cosine ends.")
    weight_decay: float = Field(0.01, ge=0, lt=1e3, description="Weight decay.")
    clip_norm: float = Field(
        1.0, gt=0, le=1e9, description="Longest gradient, as one vector; longer ones are shortened to it."
    )
    save_every: int = Field(10, ge=1, le=MOST, description="Epochs after which a checkpoint is written.")

    few_shot_tasks: int = Field(
        12, ge=0, le=MOST, description="Unseen compositions that adapters are fitted to, one by one."
    )
    few_shot_method: Literal["lora", "adapter"] = Field("lora", description="What is put at the bottleneck.")
    few_shot_rank: int = Field(4, ge=1, le=4096, description="Its rank, or hidden units.")
    few_shot_samples: int = Field(32, ge=1, le=MOST, description="Samples of the new task to learn from.")
    few_shot_queries: int = Field(256, ge=1, le=MOST, description="Other samples of it to look at.")
    few_shot_steps: int = Field(100, ge=1, le=MOST, description="Steps on them, all samples in each.")
    few_shot_every: int = Field(5, ge=1, le=MOST, description="Steps between two looks at the others.")
    few_shot_lr: float = Field(0.01, gt=0, lt=1e3, description="Learning rate of the adapters.")
    few_shot_target: float = Field(90.0, gt=0, le=100, description="IoU in percent that counts as reached.")

    @property
    def groups(self) -> int:
        """Groups in a training step."""
        return self.batch_size // self.group_size

    def folder_names(self, seed: int) -> list[str]:
        return [self.model_name, "grids", f"{self.prefix}_{seed}_{self.encoder}"]

    def conflicts(self) -> list[Conflict]:
        """Adds splits there cannot be, groups too small for a subspace, and sizes that do not divide."""
        splits = split_problems(self.primitives, self.train_lengths, self.test_length, self.held_out_pairs)
        rates = falling_rate(self, ["init_lr"])
        return [*super().conflicts(), *splits, *self._group_conflicts(), *self._size_conflicts(), *rates]

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
        for key, length in (("train_lengths", max(self.train_lengths)), ("test_length", self.test_length)):
            orders = math.perm(len(self.primitives), length)
            if orders > MOST:
                fault = f"{len(self.primitives)} primitives make {orders} compositions of length {length}"
                found.append(((key, "primitives"), f"{fault}; allowed: at most {MOST} compositions"))
        samples = self.steps_per_epoch * self.batch_size
        if samples > MOST_SAMPLES:
            fault = f"the {samples} samples of an epoch are drawn at once"
            found.append(
                (("steps_per_epoch", "batch_size"), f"{fault}; allowed: at most {MOST_SAMPLES} together")
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
            fault = "there would be no look"
            found.append(
                (("few_shot_every", "few_shot_steps"), f"{fault}; allowed: from 1 to {self.few_shot_steps}")
            )
        return found

    def idle_rules(self) -> list[IdleRule]:
        """Adds keys of losses without weight and of parts that are not there."""
        few_shot = [
            key for key in type(self).model_fields if key.startswith("few_shot_") and key != "few_shot_tasks"
        ]
        codes = any(weight > 0 for _, weight in self.beta)
        return [
            (self.encoder == "gru", 'encoder is "gru"', ("heads",)),
            (self.sparse_units == 0, "sparse_units is 0", ("beta", "sparse_activity")),
            (not codes, "beta is 0", ("sparse_activity",)),
            (not self.shares, "alpha is 0", ("sharing_ema", "sharing_detach")),
            (self.few_shot_tasks == 0, "few_shot_tasks is 0", few_shot),
            *super().idle_rules(),
        ]

    @property
    def shares(self) -> bool:
        """Whether the sharing loss ever has weight."""
        return any(weight > 0 for _, weight in self.alpha)
