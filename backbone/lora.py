"""SD-LoRA on a frozen timm Vision Transformer: low-rank directions on q and v, their magnitudes, a gate.

    net = LoRAVisionTransformer(timm_vit)
    net.grow(rank=10)                # a new adapter with zero output: the features stay timm's, bit for bit
    features = net(x, beta=beta)     # (B, 3, S, S) -> (B, d); directions and magnitudes learn
    net.freeze_newest()              # its direction is final; the function stays as it is
    net.merge(beta)                  # all adapters in the weights: a forward costs what timm's does
    net.unmerge()

What is added where, in every block (A: d -> r, B: r -> d, one pair for q and one for v):

    x (B, N, d) --+--> W x + b -------------------------------> q | k | v (B, N, 3d) --> attention
                  |                                             ^       ^
                  +--> A_q --> B_q --> beta_k m_k  (adapter k) -+       |
                  +--> A_v --> B_v --> beta_k m_k  (adapter k) ---------+

Sources: SD-LoRA (Wu et al., ICLR 2025); LoRA (Hu et al., ICLR 2022). The weights beta of the gate are plain
tensors here: the caller computes them from the gate's logits.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from backbone.frozen_block import product, take_saved_sizes
from backbone.frozen_vit import AddedModule, FrozenViT

INIT_MAGNITUDE = 0.8  # of a new adapter, as published


class LowRank(nn.Module):
    """The matrices of LoRA,  x -> [B_1 A_1 x; ...; B_S A_S x],  (..., d) -> (..., S o).

    `down` holds A, (S, r, d), Kaiming-uniform(a = sqrt 5) at the start; `up` holds B, (S, o, r), zero at the
    start; both on the device and in the dtype of `like`. S is `copies`.
    """

    def __init__(self, like: Tensor, copies: int, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_empty(copies, rank, inputs))
        for matrix in self.down.data:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.up = nn.Parameter(like.new_zeros(copies, outputs, rank))

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.flatten(0, 1)), torch.block_diag(*self.up))


class GumbelGate(nn.Module):
    """Logits g of a gate  beta = sparsemax((g + noise) / tau)  over K adapters: (K,), or per layer (L, K).

    L is `layers`, None for one gate of the whole network. K is state: a fresh gate takes it from the logits
    it loads.
    """

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty((0,) if layers is None else (layers, 0)))
        take_saved_sizes(self, logits=-1)

    @torch.no_grad()
    def grow(self, logits: Tensor) -> None:
        """Add one adapter with logits (1,) or (L, 1)."""
        self.logits = nn.Parameter(torch.cat([self.logits, logits.to(self.logits)], dim=-1))

    def stored_numbers(self) -> int:
        return self.logits.numel()

    def keep(self, chosen: list[int]) -> None:
        self.logits = nn.Parameter(self.logits.detach()[..., chosen].clone())


class SDLoRALinear(AddedModule):
    """timm's fused qkv projection with low-rank adapters on q and v (s = 0 and 1):

        y = W x + b,   y_s += sum_k w_k B_sk A_sk x,   w_k = beta_k m_k

    The network sets the weights w before a forward. Frozen adapters are a stack of R rank-one terms, `down`
    (2, R, d) and `up` (2, d, R), scaled to |A_sk| = 1 (Frobenius). They are added to W before the product
    with the tokens, so that more of them cost no more per token, except for the gradient of w. The learning
    adapter `new` is computed beside W.
    """

    down: Tensor
    up: Tensor
    new: LowRank | None
    merged: Tensor | None  # W with all adapters added, between merge and unmerge
    term_weights: Tensor | None  # (R,): w_k of the adapter that each frozen term belongs to
    newest_weight: Tensor | None  # w_k of `new`

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        if qkv.out_features != 3 * self.width:
            raise ValueError(f"q, k and v of width {self.width} are not {qkv.out_features} numbers")
        self.register_buffer("down", qkv.weight.new_zeros(2, 0, self.width))
        self.register_buffer("up", qkv.weight.new_zeros(2, self.width, 0))
        self.register_module("new", None)
        self.register_buffer("merged", None, persistent=False)
        self.term_weights = self.newest_weight = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.qkv.bias)
        if self.new is None and not self.down.shape[1]:
            return self.qkv(x)
        terms = (self.down, self.up, self.term_weights) if self.down.shape[1] else (None, None, None)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        new = (None, None)
        if self.new is not None:
            new = self.new.down.to(x.dtype), (self.newest_weight * self.new.up).to(x.dtype)
        return _AdaptedProduct.apply(x, self.qkv, *terms, *new)

    def resize(self, terms: int, new_rank: int | None) -> None:
        """Resize to a saved shape: the number of frozen terms, and the rank of `new`, None without one."""
        self.down = self.down.new_zeros(2, terms, self.width)
        self.up = self.up.new_zeros(2, self.width, terms)
        self.new = self.merged = None
        if new_rank is not None:
            self.grow(new_rank)

    def grow(self, rank: int) -> None:
        """Add a learning adapter at the LoRA start."""
        self.new = LowRank(self.qkv.weight, 2, rank, self.width, self.width)

    @torch.no_grad()
    def freeze_newest(self) -> None:
        """Move `new` to the frozen stack, with |A| moved into B, which leaves the product B A as it is."""
        size = self.new.down.norm(dim=(1, 2), keepdim=True)
        self.down = torch.cat([self.down, self.new.down / size], dim=1)
        self.up = torch.cat([self.up, self.new.up * size], dim=2)
        self.new = None

    def keep(self, terms: Tensor) -> None:
        """Remove all but these rank-one terms of the frozen stack, indices (n,)."""
        self.down, self.up = self.down[:, terms].clone(), self.up[:, :, terms].clone()

    def normalise(self, ranks: list[int]) -> None:
        """Scale the B of every frozen adapter to |B| = 1 (Frobenius); zero stays zero."""
        for part in self.up.split(ranks, dim=2):  # views
            part /= part.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)

    @torch.no_grad()
    def merge(self) -> None:
        """Add all adapters, by the weights w that are set, to a copy of W."""
        down, up, weights = self.down, self.up, self.term_weights
        if self.new is not None:
            down, up = torch.cat([down, self.new.down], 1), torch.cat([up, self.new.up], 2)
            weights = torch.cat([weights, self.newest_weight.expand(self.new.rank)])
        self.merged = _with_terms(self.qkv.weight, down, up, weights)

    def merged_weight(self) -> Tensor | None:
        """As in `AddedModule`; None while the adapters are beside W."""
        return self.merged

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A and B of the adapter that learns its direction."""
        return {"lora": [] if self.new is None else [self.new.down, self.new.up]}


class LoRAVisionTransformer(FrozenViT):
    """A frozen timm ViT with LoRA adapters; an adapter is one low-rank direction on q and v in every block.

    Adapter k adds to projection s of block l, with Frobenius norms,
        beta_k alpha_lsk (B_lsk A_lsk x) / (|B_lsk| |A_lsk|),   alpha_lsk = m_k |B_lsk| |A_lsk|.
    Once frozen, its direction and its size |B| |A| stay. m_k (`magnitudes`, as published one number for the
    whole network) goes on learning. beta_k is the weight of a gate, 1 without a gate.

    The adapters and their ranks are state: a fresh network takes them from the tensors it loads.

    Args:
        vit: a timm VisionTransformer without classifier (`num_classes=0`); it becomes part of this module.
    """

    owner: Tensor  # (R,) int64: the adapter that each frozen rank-one term belongs to

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__(vit)
        for i, block in enumerate(vit.blocks):
            block.attn.qkv = self.modules_by_block[i] = SDLoRALinear(block.attn.qkv)
        self.magnitudes = nn.Parameter(torch.empty(0))
        self.register_buffer("owner", torch.empty(0, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_take_saved_shape)

    def forward(
        self, x: Tensor, start: int = 0, stop: int | None = None, beta: Tensor | None = None
    ) -> Tensor:
        """As in `FrozenViT`.

        Args:
            beta: weights of the adapters, (K,) or per block (L, K); None for 1. Ignored by a merged network,
                whose weights include them.
        """
        if self.is_merged:
            return super().forward(x, start, stop)
        with self._weighted(beta):
            return super().forward(x, start, stop)

    @contextmanager
    def _weighted(self, beta: Tensor | None) -> Iterator[None]:
        """Context in which every projection has the weights w_k = beta_k m_k."""
        weights = self.magnitudes if beta is None else beta * self.magnitudes
        by_block = weights.expand(len(self.projections), len(self.magnitudes))  # (L, K)
        for projection, terms, own in zip(self.projections, by_block[:, self.owner], by_block, strict=True):
            projection.term_weights, projection.newest_weight = terms, own[-1] if self.is_open else None
        try:
            yield
        finally:
            for projection in self.projections:
                projection.term_weights = projection.newest_weight = None

    @property
    def projections(self) -> list[SDLoRALinear]:
        return list(self.modules_by_block.values())

    @property
    def is_open(self) -> bool:
        """Whether the newest adapter still learns its direction."""
        return self.projections[0].new is not None

    @property
    def ranks(self) -> list[int]:
        """Ranks of all adapters, oldest first."""
        frozen = self.owner.bincount(minlength=len(self.magnitudes) - self.is_open).tolist()
        return [*frozen, self.projections[0].new.rank] if self.is_open else frozen

    # --- merging --------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        return self.projections[0].merged is not None

    def merge(self, beta: Tensor | None = None) -> None:
        """Add all adapters, weighted by beta as in `forward`, to the weights; does nothing when merged."""
        if self.is_merged:
            return
        with self._weighted(beta):
            for projection in self.projections:
                projection.merge()

    def unmerge(self) -> None:
        """Return to adapters beside the weights; those were never changed."""
        for projection in self.projections:
            projection.merged = None

    # --- growing, freezing, pruning -------------------------------------------------------------------------

    def grow(self, rank: int) -> None:
        """Add an adapter with zero output, which learns until `freeze_newest`."""
        self.unmerge()
        for projection in self.projections:
            projection.grow(rank)
        first = self.magnitudes.new_full((1,), INIT_MAGNITUDE)
        self.magnitudes = nn.Parameter(torch.cat([self.magnitudes.detach(), first]))

    def freeze_newest(self) -> None:
        """Freeze the direction of the newest adapter; the function stays as it is."""
        self.unmerge()
        newest = self.owner.new_full((self.ranks[-1],), len(self.magnitudes) - 1)
        self.owner = torch.cat([self.owner, newest])
        for projection in self.projections:
            projection.freeze_newest()

    def keep(self, chosen: list[int]) -> None:
        """Remove all but the chosen adapters, of which none may be learning."""
        self.unmerge()
        terms = torch.cat([(self.owner == k).nonzero()[:, 0] for k in chosen])
        ranks = torch.tensor([self.ranks[k] for k in chosen], device=self.owner.device)
        self.owner = torch.arange(len(chosen), device=self.owner.device).repeat_interleave(ranks)
        for projection in self.projections:
            projection.keep(terms)
        self.magnitudes = nn.Parameter(self.magnitudes.detach()[chosen].clone())

    def reset_magnitudes(self) -> None:
        """Set alpha = 0.8 for every adapter, all of them frozen, as the published code does at every task."""
        self.unmerge()
        for projection in self.projections:
            projection.normalise(self.ranks)
        nn.init.constant_(self.magnitudes, INIT_MAGNITUDE)

    # --- parameters and state -------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups lora, the direction that learns, and alpha, the magnitudes."""
        return super().parameter_groups() | {"alpha": [self.magnitudes]}

    def added_tensors(self) -> dict[int, dict[str, Tensor]]:
        """The merged weights, by block."""
        return {block: {"merged": p.merged} for block, p in self.modules_by_block.items() if self.is_merged}

    def adapters_per_block(self) -> dict[int, int]:
        return dict.fromkeys(self.modules_by_block, len(self.magnitudes))

    def parameter_counts(self) -> dict[str, int]:
        directions = self.directions_of_rank(sum(self.ranks))
        return {"adapters": directions, "magnitudes": self.magnitudes.numel()}

    def directions_of_rank(self, rank: int) -> int:
        """Parameters of the directions of an adapter of this rank, over all blocks."""
        return 4 * rank * sum(projection.width for projection in self.projections)


def _take_saved_shape(
    network: LoRAVisionTransformer, state: dict[str, Tensor], prefix: str, *hook_args: object
) -> None:
    """Load-state-dict pre-hook: adapters of the saved number and ranks."""
    owner, new = state.get(f"{prefix}owner"), state.get(f"{prefix}vit.blocks.0.attn.qkv.new.down")
    if owner is None:
        return
    for projection in network.projections:
        projection.resize(len(owner), None if new is None else new.shape[1])
    adapters = (int(owner.max()) + 1 if len(owner) else 0) + (new is not None)
    network.magnitudes = nn.Parameter(network.magnitudes.detach().new_zeros(adapters))
    network.owner = network.owner.new_zeros(len(owner))


def _with_terms(weight: Tensor, down: Tensor, up: Tensor, weights: Tensor) -> Tensor:
    """W + [E_q; 0; E_v], E_s = up_s diag(weights) down_s: (3d, d) from W (3d, d) and R rank-one terms."""
    width = weight.shape[1]
    extra = (up * weights) @ down
    result = weight.clone()
    result[:width] += extra[0]
    result[-width:] += extra[1]
    return result


class _AdaptedProduct(torch.autograd.Function):
    """y = W' x + b + [B_q A_q; 0; B_v A_v] x  with W' = W + [E_q; 0; E_v] as in `_with_terms`.

    Differentiable in x, in the weights w of the frozen terms, and in A (2, r, d) and B (2, d, r); terms or
    A and B may be None. With g the gradient of y, a term of row a and column u in projection s has
        dL/dw = sum over tokens of (a x) (u g_s) = u (sum over tokens of g_s x^T) a.
    For R terms the first form takes 4 R d operations per token and the second 2 d^2: the cheaper one is
    taken.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear: nn.Linear,
        down: Tensor | None,
        up: Tensor | None,
        weights: Tensor | None,
        new_down: Tensor | None,
        new_up: Tensor | None,
    ) -> Tensor:
        merged, hidden = None, []
        if down is None:
            y = product(linear, x)
        else:
            merged = _with_terms(linear.weight, down, up, weights).to(x.dtype)
            y = F.linear(x, merged, None if linear.bias is None else linear.bias.to(x.dtype))
        if new_down is not None:
            tokens = x.flatten(0, -2)
            for a, b, part in zip(new_down, new_up, _of_q_and_v(y), strict=True):
                hidden.append(tokens @ a.T)
                part.addmm_(hidden[-1], b.T)
        ctx.linear = linear
        ctx.save_for_backward(x, merged, down, up, new_down, new_up, *hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, down, up, new_down, new_up, *hidden = ctx.saved_tensors
        gradient = gradient.contiguous()
        tokens, parts = x.flatten(0, -2), _of_q_and_v(gradient)
        for_x = for_weights = for_down = for_up = None
        if ctx.needs_input_grad[0]:
            for_x = product(ctx.linear, gradient, transposed=True) if merged is None else gradient @ merged
        if new_down is not None:
            for_hidden = [g @ b for g, b in zip(parts, new_up, strict=True)]
            for_down = torch.stack([h.T @ tokens for h in for_hidden])
            for_up = torch.stack([g.T @ h for g, h in zip(parts, hidden, strict=True)])
            if for_x is not None:
                for_x.flatten(0, -2).addmm_(torch.cat(for_hidden, dim=1), new_down.flatten(0, 1))
        if ctx.needs_input_grad[4]:
            for_weights = 0
            for a, u, g in zip(down.to(x.dtype), up.to(x.dtype), parts, strict=True):
                if 2 * len(a) < x.shape[-1]:
                    for_weights = for_weights + _sum_of_products(tokens @ a.T, g @ u, dim=0)
                else:
                    for_weights = for_weights + _sum_of_products(a, u.T @ (g.T @ tokens), dim=1)
        return for_x, None, None, None, for_weights, for_down, for_up


def _of_q_and_v(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of q and v, (tokens, d) each, of a contiguous (..., 3d); views."""
    q, _, v = qkv.flatten(0, -2).chunk(3, dim=1)
    return q, v


def _sum_of_products(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Sum along a dimension of elementwise products, at least in float32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) * right.to(wide)).sum(dim=dim)
