"""InfLoRA on a frozen timm Vision Transformer: low-rank terms of k and v orthogonal to earlier tasks' inputs.

    net = InfLoRAViT(timm_vit, rank=10, adapted=range(12))
    with net.second_moments() as moments:        # of the inputs of every adapted projection
        net(images_of_the_new_task)
    net.grow(moments)                            # directions orthogonal to old inputs; zero output
    features = net(images)                       # (B, 3, S, S) -> (B, d); B of the new terms learns
    net.freeze()                                 # merged into the weights: a forward costs what timm's does
    net.remember(moments_after, threshold=0.95)  # later directions are orthogonal to this task's inputs too

Source: Liang and Li, *InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning*, CVPR 2024.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.frozen_block import FrozenLinear, take_saved_sizes
from backbone.frozen_vit import AddedModule, FrozenViT

ROUNDING = 1e-6  # singular values below this share of the largest of float32 moments


class InfLoRALinear(AddedModule):
    """timm's fused qkv projection with a low-rank term of k and v per task,

        y = W x + b,   y_k += sum_t B_kt A_t x,   y_v += sum_t B_vt A_t x,

    A_t (r, d) fixed before the task, orthogonal to the inputs of older tasks, B (d, r) learned from zero.
    Terms of earlier tasks are merged into a copy of W. Everything but W and b is state: a fresh module takes
    the shapes of the tensors that it loads.
    """

    down: Tensor  # (T, r, d): A of the earlier tasks
    up: Tensor  # (T, 2, d, r): B of k and v of the earlier tasks
    new_down: Tensor  # (r, d) while a task learns, else (0, d)
    new_up: nn.Parameter  # (2, d, r) while a task learns, else (2, d, 0)
    basis: Tensor  # (d, m), float64: orthonormal, spans the inputs of older tasks

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        self.qkv, self.rank, self.width = qkv, rank, qkv.in_features
        width, like = self.width, qkv.weight
        self.register_buffer("down", like.new_zeros(0, rank, width))
        self.register_buffer("up", like.new_zeros(0, 2, width, rank))
        self.register_buffer("new_down", like.new_zeros(0, width))
        self.new_up = nn.Parameter(like.new_zeros(2, width, 0), requires_grad=False)
        self.register_buffer("basis", like.new_zeros(width, 0, dtype=torch.float64))
        take_saved_sizes(self, down=0, up=0, new_down=0, new_up=2, basis=1)
        self._merged: tuple[Tensor, FrozenLinear] | None = None  # `down`, and W with its terms

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        if not self.is_open:
            return y
        up = torch.cat([self.new_up.new_zeros(self.width, self.rank), self.new_up.flatten(0, 1)])  # (3 d, r)
        return y + F.linear(F.linear(x, self.new_down), up)

    def frozen(self, x: Tensor) -> Tensor:
        """The projection with the terms of earlier tasks."""
        if not len(self.down):
            return self.qkv(x)
        if self._merged is None or self._merged[0] is not self.down:
            linear = nn.Linear(self.width, 3 * self.width, device="meta")
            linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
            linear.bias = self.qkv.bias
            self._merged = self.down, FrozenLinear(linear)
        return self._merged[1](x)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with the terms of earlier tasks, (3 d, d), in full precision also under autocast."""
        weight = self.qkv.weight.detach().clone()
        with torch.autocast(weight.device.type, enabled=False):
            weight[self.width :] += torch.einsum("tsor,tri->soi", self.up, self.down).flatten(0, 1)
        return weight

    @property
    def is_open(self) -> bool:
        return len(self.new_down) > 0

    def grow(self, moments: Tensor) -> int:
        """Add a learning term with zero output for a task whose inputs have these second moments (d, d).

        With M the basis and C the moments, A holds the r largest left singular vectors of C - M M^T C, over
        sqrt(3); rows without a direction left are zero.

        Returns:
            The number of directions that were left.
        """
        rest = moments - self.basis @ (self.basis.T @ moments)
        left, values, _ = torch.linalg.svd(rest)
        kept = int((values[: self.rank] > ROUNDING * torch.linalg.matrix_norm(moments, 2)).sum())
        directions = torch.zeros(self.rank, self.width, dtype=torch.float64, device=moments.device)
        directions[:kept] = left[:, :kept].T / 3**0.5
        self.new_down = directions.to(self.down)
        self.new_up = nn.Parameter(self.down.new_zeros(2, self.width, self.rank))
        return kept

    @torch.no_grad()
    def freeze(self) -> None:
        """Move the learning term to the frozen ones."""
        self.down = torch.cat([self.down, self.new_down[None]])
        self.up = torch.cat([self.up, self.new_up.detach()[None]])
        self.new_down = self.new_down[:0]
        self.new_up = nn.Parameter(self.new_up.detach()[..., :0], requires_grad=False)

    def remember(self, moments: Tensor, threshold: float, power: int) -> None:
        """Extend the basis so that it holds a share of the energy of inputs with second moments C (d, d).

        With s(X) the singular values of a matrix, p the power and R = (I - M M^T) C, the basis gains the
        first k left singular vectors of R, for the smallest k with

            sum s(C)^p - sum s(R)^p + sum_(i <= k) s_i(R)^p  >=  threshold * sum s(C)^p

        With p = 1 these are energies of the inputs along directions, as in the paper; published code has 2.
        """
        rest = moments - self.basis @ (self.basis.T @ moments)
        left, values, _ = torch.linalg.svd(rest)
        of_all = torch.linalg.svdvals(moments)
        total = of_all.pow(power).sum()
        energies = values.pow(power)
        covered = (total - energies.sum()) + torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        needed = int((covered < threshold * total).sum())
        found = int((values > ROUNDING * of_all.max()).sum())
        self.basis, _ = torch.linalg.qr(torch.cat([self.basis, left[:, : min(needed, found)]], dim=1))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"lora": [self.new_up]}


class InfLoRAViT(FrozenViT):
    """A frozen timm ViT whose k and v learn in the `adapted` blocks, one at least, as `InfLoRALinear`."""

    def __init__(self, vit: VisionTransformer, rank: int, adapted: Iterable[int]) -> None:
        super().__init__(vit)
        for i in sorted(adapted):
            attention = self.vit.blocks[i].attn
            attention.qkv = self.modules_by_block[i] = InfLoRALinear(attention.qkv, rank)

    @contextmanager
    def second_moments(self) -> Iterator[dict[int, Tensor]]:
        """Sums of x x^T over inputs x of every adapted projection, while open: {block: (d, d)}, float64.

        Products are those of float32 numbers, also under autocast. Without inputs the sums are zero.
        """
        moments = {
            block: projection.qkv.weight.new_zeros(2 * (projection.width,), dtype=torch.float64)
            for block, projection in self.modules_by_block.items()
        }

        def add(block: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().float().flatten(0, -2)
            with torch.autocast(tokens.device.type, enabled=False):
                moments[block] += (tokens.T @ tokens).double()

        with ExitStack() as hooks:
            for block, projection in self.modules_by_block.items():
                hooks.enter_context(projection.register_forward_pre_hook(partial(add, block)))
            yield moments

    def grow(self, moments: Mapping[int, Tensor]) -> dict[int, int]:
        """Add a learning term to every projection; the number of its directions by block."""
        return {block: projection.grow(moments[block]) for block, projection in self.modules_by_block.items()}

    def remember(self, moments: Mapping[int, Tensor], threshold: float, power: int = 1) -> None:
        """Extend the basis of every block by the task's inputs (`InfLoRALinear.remember`)."""
        for block, projection in self.modules_by_block.items():
            projection.remember(moments[block], threshold, power)

    def added_tensors(self) -> dict[int, dict[str, Tensor]]:
        names = ("down", "up", "new_down", "new_up")
        return {
            block: {name: getattr(projection, name) for name in names}
            for block, projection in self.modules_by_block.items()
        }

    def adapters_per_block(self) -> dict[int, int]:
        return {block: len(p.down) + p.is_open for block, p in self.modules_by_block.items()}

    def parameter_counts(self) -> dict[str, int]:
        """Numbers in the factors B ("adapters"), the factors A ("directions") and the bases of old inputs."""
        parts = {"adapters": ("up", "new_up"), "directions": ("down", "new_down"), "bases": ("basis",)}
        projections = self.modules_by_block.values()
        return {
            part: sum(getattr(projection, name).numel() for projection in projections for name in names)
            for part, names in parts.items()
        }
