"""SD-LoRA on a frozen timm Vision Transformer: low-rank directions on q and v, their magnitudes, a gate over them.

    net = LoRAVisionTransformer(timm_vit)
    net.grow(rank=10)                     # a new adapter, silent: the output is timm's, bit for bit
    features = net(images)                # (B, 3, S, S) -> (B, d): directions and magnitudes learn
    net.freeze_newest()                   # the function stays as it is
    net.merge()                           # from here on a forward costs what timm's does, whatever was grown
    net.unmerge()

Sources: SD-LoRA (Wu et al., ICLR 2025); LoRA (Hu et al., ICLR 2022). The weights of a gate are plain tensors here: who
calls `forward` makes them from the gate's logits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FIRST_MAGNITUDE = 0.8  # of a new adapter, as published


class LowRank(nn.Module):
    """The matrices of LoRA,  x -> [B_1 A_1 x; ...; B_S A_S x],  (..., d) -> (..., S o).

    `down` holds A, (S, r, d), Kaiming-uniform(a = sqrt 5) at the start; `up` holds B, (S, o, r), zero: it is silent.

    Args:
        like: a tensor whose device and precision they take.
        copies: S.
        rank: r.
        inputs: d.
        outputs: o.
    """

    def __init__(self, like: Tensor, copies: int, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_empty(copies, rank, inputs))
        for one in self.down.data:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))
        self.up = nn.Parameter(like.new_zeros(copies, outputs, rank))

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.flatten(0, 1)), torch.block_diag(*self.up))


class GumbelGate(nn.Module):
    """The logits g of a gate beta = sparsemax((g + noise) / tau) over K adapters: (K,), or a row a layer, (L, K).

    Args:
        layers: L, or None for one gate of the whole network.
    """

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty((0,) if layers is None else (layers, 0)))
        self.register_load_state_dict_pre_hook(_width_as_saved)

    @torch.no_grad()
    def grow(self, logits: Tensor) -> None:
        """One more adapter, whose logits are (1,) or (L, 1)."""
        self.logits = nn.Parameter(torch.cat([self.logits, logits.to(self.logits)], dim=-1))

    def keep(self, chosen: Sequence[int]) -> None:
        """Leave only the chosen adapters."""
        self.logits = nn.Parameter(self.logits.detach()[..., list(chosen)].clone())

    def rebuild(self, adapters: int) -> None:
        """Give a fresh gate the shape of one over so many adapters."""
        self.logits = nn.Parameter(self.logits.detach().new_zeros(*self.logits.shape[:-1], adapters))


def _width_as_saved(gate: GumbelGate, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: a logit for every adapter of the saved gate."""
    saved = state.get(f"{prefix}logits", gate.logits)
    gate.rebuild(saved.shape[-1] if saved.dim() else 0)


class LoRALinear(nn.Module):
    """timm's fused qkv projection with low-rank adapters on q and v (s = 0 and 1):

        y = W x + b,   y_s += sum_k w_k B_sk A_sk x

    The network sets the weights w before a forward. Frozen adapters are a stack of R rank-one terms, `down` (2, R, d)
    and `up` (2, d, R), with every |A_sk| = 1 (Frobenius), so that |B_sk| is the size of the product. They are added to
    W before it meets the tokens: their number costs no work on tokens but the derivatives of w. The adapter that
    learns, `new`, is computed beside them.
    """

    down: Tensor
    up: Tensor
    new: LowRank | None
    merged: Tensor | None  # W with all adapters added, between merge and unmerge

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        if qkv.out_features != 3 * self.width:
            raise ValueError(f"q, k and v of width {self.width} are not {qkv.out_features} numbers")
        self.register_buffer("down", qkv.weight.new_zeros(2, 0, self.width))
        self.register_buffer("up", qkv.weight.new_zeros(2, self.width, 0))
        self.register_module("new", None)
        self.register_buffer("merged", None, persistent=False)
        self.term_weights: Tensor | None = None  # (R,): w_k of the adapter that each frozen term belongs to
        self.newest_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.merged is not None:
            return F.linear(x, self.merged, bias)
        if self.down.shape[1]:
            y = _FrozenSum.apply(x, weight, bias, self.down, self.up, self.term_weights)
        else:
            y = F.linear(x, weight, bias)
        if self.new is None:
            return y
        up_q, up_v = self.newest_weight * self.new.up
        none = torch.zeros_like(up_q)
        up = torch.cat(
            [torch.cat([up_q, none], 1), torch.cat([none, none], 1), torch.cat([none, up_v], 1)]
        )  # (3d, 2r)
        return y + F.linear(F.linear(x, self.new.down.flatten(0, 1)), up)

    def grow(self, rank: int) -> None:
        """A new adapter at the LoRA start."""
        self.new = LowRank(self.qkv.weight, 2, rank, self.width, self.width)

    @torch.no_grad()
    def freeze_newest(self) -> None:
        """What learned joins the frozen stack; the size of A goes over to B, which changes no product."""
        size = self.new.down.norm(dim=(1, 2), keepdim=True)
        self.down = torch.cat([self.down, self.new.down / size], dim=1)
        self.up = torch.cat([self.up, self.new.up * size], dim=2)
        self.new = None

    def keep(self, terms: Tensor) -> None:
        """Leave only these rank-one terms of the frozen stack, (n,) indices."""
        self.down, self.up = self.down[:, terms].clone(), self.up[:, :, terms].clone()

    def set_sizes_to_one(self, ranks: Sequence[int]) -> None:
        """Scale the B of every frozen adapter to Frobenius norm 1; one that never learned stays zero."""
        for part in self.up.split(list(ranks), dim=2):  # views
            part /= part.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)

    def rebuild(self, rank: int, new_rank: int | None) -> None:
        """Give a fresh module a saved shape: the frozen terms, and the rank of the adapter that learns, if one does."""
        self.down = self.down.new_zeros(2, rank, self.width)
        self.up = self.up.new_zeros(2, self.width, rank)
        self.new = None
        if new_rank is not None:
            self.grow(new_rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Add all adapters to a copy of W; the weights w must have been set."""
        down, up, weights = self.down, self.up, self.term_weights
        if self.new is not None:
            down, up = torch.cat([down, self.new.down], 1), torch.cat([up, self.new.up], 2)
            weights = torch.cat([weights, self.newest_weight.expand(self.new.down.shape[1])])
        self.merged = _with_terms(self.qkv.weight, down, up, weights)

    def unmerge(self) -> None:
        """Back to W and the adapters beside it; W was never changed."""
        self.merged = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything the adapters are made of, by name."""
        learning = {} if self.new is None else {"new_down": self.new.down, "new_up": self.new.up}
        return {"down": self.down, "up": self.up} | learning


class LoRAVisionTransformer(nn.Module):
    """A frozen timm ViT with LoRA adapters on q and v; an adapter is one low-rank direction in each block's q and v.

    Adapter k adds to projection s of block l, with Frobenius norms,
        beta_k alpha_lsk (B_lsk A_lsk x) / (|B_lsk| |A_lsk|),   alpha_lsk = m_k |B_lsk| |A_lsk|.
    Once frozen, its direction and its sizes |B| |A| stay. m_k (`magnitudes`), as published one number for the whole
    network, goes on learning. beta_k is a gate's weight, 1 without a gate.

    Args:
        vit: a timm VisionTransformer without classifier (`num_classes=0`); it becomes part of this module.
    """

    owner: Tensor

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        vit.requires_grad_(False)
        for block in vit.blocks:
            block.attn.qkv = LoRALinear(block.attn.qkv)
        self.vit = vit.eval()
        self.magnitudes = nn.Parameter(torch.empty(0))
        self.register_buffer(
            "owner", torch.empty(0, dtype=torch.int64)
        )  # (R,): the adapter of each frozen term
        self.register_load_state_dict_pre_hook(_grow_as_saved)

    def forward(self, images: Tensor, beta: Tensor | None = None) -> Tensor:
        """Features (B, d), class token after the final norm, of images (B, 3, S, S).

        Args:
            beta: weights of the adapters, (K,) or a row a block (L, K); None is 1 for all. A merged network has them in
                its weights and takes none.
        """
        if self.is_merged:
            return self.vit(images)
        with self._weighted(beta):
            return self.vit(images)

    @contextmanager
    def _weighted(self, beta: Tensor | None) -> Iterator[None]:
        """While open, every projection knows beta_k m_k of its adapters."""
        weights = self.magnitudes if beta is None else beta * self.magnitudes
        by_block = weights.expand(len(self.projections), len(self.magnitudes))  # (L, K)
        frozen = torch.arange(len(self.magnitudes) - self.is_open, device=self.owner.device)
        of_terms = by_block[:, : len(frozen)] @ (frozen[:, None] == self.owner).to(weights)  # (L, R)
        for projection, terms, own in zip(self.projections, of_terms, by_block, strict=True):
            projection.term_weights, projection.newest_weight = terms, own[-1] if self.is_open else None
        try:
            yield
        finally:
            for projection in self.projections:
                projection.term_weights = projection.newest_weight = None

    def train(self, mode: bool = True) -> "LoRAVisionTransformer":
        """The frozen transformer stays in evaluation mode; adapters have no mode of their own."""
        super().train(mode)
        self.vit.eval()
        return self

    @property
    def projections(self) -> list[LoRALinear]:
        """The adapted projection of every block, in depth order."""
        return [block.attn.qkv for block in self.vit.blocks]

    # --- merging ------------------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        return self.projections[0].merged is not None

    def merge(self, beta: Tensor | None = None) -> None:
        """Put all adapters, weighted by beta as in `forward`, into the projections; nothing where that is done."""
        if self.is_merged:
            return
        with self._weighted(beta):
            for projection in self.projections:
                projection.merge()

    def unmerge(self) -> None:
        """Back to adapters that can learn."""
        for projection in self.projections:
            projection.unmerge()

    # --- structure ----------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the newest adapter still learns its direction."""
        return self.projections[0].new is not None

    @property
    def ranks(self) -> list[int]:
        """Of all adapters, in the order in which they were grown."""
        frozen = self.owner.bincount(minlength=len(self.magnitudes) - self.is_open).tolist()
        return [*frozen, self.projections[0].new.rank] if self.is_open else frozen

    def grow(self, rank: int) -> None:
        """Add a silent adapter, which learns until `freeze_newest`."""
        self._require_open(False)
        self.unmerge()
        for projection in self.projections:
            projection.grow(rank)
        first = self.magnitudes.new_full((1,), FIRST_MAGNITUDE)
        self.magnitudes = nn.Parameter(torch.cat([self.magnitudes.detach(), first]))

    def freeze_newest(self) -> None:
        """The newest adapter's direction is final; the function stays as it is."""
        self._require_open(True)
        self.unmerge()
        newest = self.owner.new_full((self.projections[0].new.rank,), len(self.magnitudes) - 1)
        self.owner = torch.cat([self.owner, newest])
        for projection in self.projections:
            projection.freeze_newest()

    def keep(self, chosen: Sequence[int]) -> None:
        """Leave only the chosen of the frozen adapters: directions and magnitudes of the others are gone."""
        self._require_open(False)
        self.unmerge()
        kept = torch.cat([(self.owner == k).nonzero()[:, 0] for k in chosen])
        for projection in self.projections:
            projection.keep(kept)
        self.magnitudes = nn.Parameter(self.magnitudes.detach()[list(chosen)].clone())
        ranks = torch.tensor([self.ranks[k] for k in chosen], device=self.owner.device)
        self.owner = torch.arange(len(chosen), device=self.owner.device).repeat_interleave(ranks)

    def reset_magnitudes(self) -> None:
        """Forget how much each frozen adapter matters, as the published code does at every task: all alpha = 0.8."""
        self._require_open(False)
        self.unmerge()
        for projection in self.projections:
            projection.set_sizes_to_one(self.ranks)
        nn.init.constant_(self.magnitudes, FIRST_MAGNITUDE)

    def rebuild(self, ranks: Sequence[int], is_open: bool) -> None:
        """Give a fresh network a saved shape: the ranks of its adapters, and whether the newest one learns."""
        frozen = ranks[:-1] if is_open else ranks
        for projection in self.projections:
            projection.rebuild(sum(frozen), ranks[-1] if is_open else None)
        self.magnitudes = nn.Parameter(self.magnitudes.detach().new_zeros(len(ranks)))
        owner = torch.arange(len(frozen)).repeat_interleave(torch.tensor(frozen, dtype=torch.int64))
        self.owner = owner.to(self.owner.device)

    def _require_open(self, is_open: bool) -> None:
        if self.is_open != is_open:
            raise RuntimeError(
                f"the newest adapter {'is frozen' if is_open else 'still learns: freeze it first'}"
            )

    # --- parameters ---------------------------------------------------------------------------------------------------

    def directions(self) -> list[nn.Parameter]:
        """The parameters of the adapter that learns its direction; none where all are frozen."""
        learning = [projection.new for projection in self.projections if projection.new is not None]
        return [parameter for new in learning for parameter in (new.down, new.up)]

    def frozen_names(self) -> set[str]:
        """Names in the state dict of the pretrained transformer's own tensors, which no checkpoint holds."""
        own = {
            f"vit.blocks.{block}.attn.qkv.{name}"
            for block, projection in enumerate(self.projections)
            for name in projection.state_dict()
            if not name.startswith("qkv.")
        }
        return self.state_dict().keys() - own - {"magnitudes", "owner"}

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the frozen transformer, by name."""
        blocks = enumerate(self.projections)
        named = {
            f"block.{i}.{name}": tensor for i, block in blocks for name, tensor in block.tensors().items()
        }
        return {**named, "magnitudes": self.magnitudes}

    def adapters_per_block(self) -> dict[int, int]:
        """How many adapters each block holds: the same number in all."""
        return dict.fromkeys(range(len(self.projections)), len(self.ranks))

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters in directions and magnitudes."""
        directions = sum(t.numel() for projection in self.projections for t in projection.tensors().values())
        return {"adapters": directions, "magnitudes": self.magnitudes.numel()}


def _grow_as_saved(network: LoRAVisionTransformer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: the adapters that the tensors are of. torch refuses what does not fit then."""
    owner, new = state.get(f"{prefix}owner"), state.get(f"{prefix}vit.blocks.0.attn.qkv.new.down")
    if owner is None:
        return
    for projection in network.projections:
        projection.rebuild(len(owner), None if new is None else new.shape[1])
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


class _FrozenSum(torch.autograd.Function):
    """y = (W + [E_q; 0; E_v]) x + b as in `_with_terms`, with derivatives for x and the weights of the terms only.

    With g the gradient of y, a term of row a and column u in projection s has
        dL/dw = sum over tokens of (a x) (u g_s) = u (sum over tokens of g_s x^T) a.
    For R terms the first form takes 4 R d operations a token and the second 2 d^2: the cheaper one is taken.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, weights: Tensor
    ) -> Tensor:
        merged = _with_terms(weight, down, up, weights)
        ctx.save_for_backward(x, merged, down, up)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, down, up = (tensor.to(gradient.dtype) for tensor in ctx.saved_tensors)
        for_x = gradient @ merged if ctx.needs_input_grad[0] else None
        tokens, width = x.flatten(0, -2), x.shape[-1]
        of_qkv = gradient.flatten(0, -2)
        for_weights: Any = 0
        for a, u, g in ((down[0], up[0], of_qkv[:, :width]), (down[1], up[1], of_qkv[:, -width:])):
            if 2 * len(a) < width:
                for_weights = for_weights + _sum_of_products(tokens @ a.T, g @ u, dim=0)
            else:
                for_weights = for_weights + _sum_of_products(a, u.T @ (g.T @ tokens), dim=1)
        return for_x, None, None, None, None, for_weights


def _sum_of_products(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """The sum along a dimension of elementwise products, at least in float32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) * right.to(wide)).sum(dim=dim)
