"""Prompts of CODA-Prompt on a frozen timm Vision Transformer: prefixes of keys and values in chosen blocks.

    net = PromptedViT(timm_vit, blocks=range(5), length=8)
    net.grow(10)                       # ten components of the open task in every block
    features = net(images)             # (B, 3, S, S) -> (B, d); its query is the class token without prompts
    loss = ... + net.penalty("sum")
    net.freeze()

Source: Smith et al., *CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free
Continual Learning*, CVPR 2023.
"""

from collections.abc import Iterable

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.frozen_block import take_saved_sizes
from backbone.frozen_vit import AddedModule, FrozenViT


class PrefixAttention(nn.Module):
    """timm's attention, with a prefix of keys and one of values, (B, L / 2, d) each, while these are set."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        if type(attention) is not Attention or getattr(attention, "gate", None) is not None:
            raise ValueError(f"prompts need timm's plain attention, not {type(attention).__name__}")
        self.attention = attention
        self.prefix: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, **masks: None) -> Tensor:
        """As timm's attention. `masks` are keyword arguments of timm's blocks, None in a ViT."""
        attention = self.attention
        if self.prefix is None:
            return attention(x)
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))  # (B, N, 3, heads, d / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        before = (part.to(k).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in self.prefix)
        k, v = (torch.cat([prefix, own], dim=2) for prefix, own in zip(before, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attention.proj(attention.norm(y))


class PromptPool(AddedModule):
    """The prompt of one block: a sum of M components, weighted by cosines of the query with their keys.

        p(q) = sum_m cos(q * A_m, K_m) P_m,   q (B, d) -> p (B, L, d), its halves prefixes of keys and values

    A_m, K_m (d,) and P_m (L, d), L (`length`) even; components of earlier tasks are frozen. New ones start
    orthonormal and orthogonal to all older ones while there is room, then as random unit vectors. M is state:
    a fresh pool takes it from the tensors that it loads.
    """

    keys: Tensor  # (M, d) of earlier tasks
    attention: Tensor  # (M, d)
    prompts: Tensor  # (M, L d)

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.width, self.length = width, length
        self.sizes = {"keys": width, "attention": width, "prompts": length * width}
        for name, size in self.sizes.items():
            self.register_buffer(name, torch.zeros(0, size))
            setattr(self, f"new_{name}", nn.Parameter(torch.zeros(0, size), requires_grad=False))
            take_saved_sizes(self, **{name: 0, f"new_{name}": 0})

    def all(self, name: str) -> Tensor:
        """A part of all components, those of earlier tasks first."""
        return torch.cat([getattr(self, name), getattr(self, f"new_{name}")])

    def forward(self, query: Tensor) -> Tensor:
        attended = F.normalize(query[:, None] * self.all("attention"), dim=2)  # (B, M, d)
        shares = torch.einsum("bmd,md->bm", attended, F.normalize(self.all("keys"), dim=1))
        return (shares @ self.all("prompts")).unflatten(1, (self.length, self.width))

    def penalty(self, reduction: str) -> Tensor:
        """||X X^T - I||^2 summed over X = K, A and P, as a sum or a mean over entries; a scalar."""
        total: Tensor = self.keys.new_zeros(())
        for name in self.sizes:
            part = self.all(name)
            squares = (part @ part.T - torch.eye(len(part), device=part.device)).square()
            total = total + (squares.sum() if reduction == "sum" else squares.mean())
        return total

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """Add components, which learn."""
        for name, size in self.sizes.items():
            old = getattr(self, name)
            new = torch.randn(count, size).to(old)
            if len(old) + count <= size:
                basis = torch.linalg.qr(old.T).Q
                new = torch.linalg.qr((new - new @ basis @ basis.T).T).Q.T
            else:
                new = F.normalize(new, dim=1)
            setattr(self, f"new_{name}", nn.Parameter(new.contiguous()))

    @torch.no_grad()
    def freeze(self) -> None:
        for name in self.sizes:
            every = self.all(name)
            setattr(self, name, every)
            setattr(self, f"new_{name}", nn.Parameter(every[:0].clone(), requires_grad=False))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"prompts": list(self.parameters())}


class PromptedViT(FrozenViT):
    """A frozen timm ViT with prompts, each of a `PromptPool`, in some blocks, one at least."""

    def __init__(self, vit: VisionTransformer, blocks: Iterable[int], length: int) -> None:
        super().__init__(vit)
        blocks = sorted(blocks)
        for i in blocks:
            block = self.vit.blocks[i]
            block.attn = PrefixAttention(block.attn)
        self.modules_by_block = {i: PromptPool(self.vit.embed_dim, length) for i in blocks}
        self.pools = nn.ModuleDict({str(i): pool for i, pool in self.modules_by_block.items()})

    def forward(
        self, x: Tensor, start: int = 0, stop: int | None = None, query: Tensor | None = None
    ) -> Tensor:
        """As in `FrozenViT`.

        Args:
            query: features (B, d) without prompts; by default they are computed from x.
        """
        last = self.depth if stop is None else stop
        pools = {i: pool for i, pool in self.modules_by_block.items() if start <= i < last}
        if not pools:
            return super().forward(x, start, stop)
        query = self.plain(x, start) if query is None else query
        attentions = {i: self.vit.blocks[i].attn for i in pools}
        try:
            for i, attention in attentions.items():
                attention.prefix = pools[i](query.float()).chunk(2, dim=1)
            return super().forward(x, start, stop)
        finally:
            for attention in attentions.values():
                attention.prefix = None

    @torch.no_grad()
    def plain(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return super().forward(x, start, stop)

    def penalty(self, reduction: str) -> Tensor:
        """Sum over blocks of `PromptPool.penalty`, a scalar."""
        return sum(pool.penalty(reduction) for pool in self.modules_by_block.values())

    def grow(self, count: int) -> None:
        for pool in self.modules_by_block.values():
            pool.grow(count)

    def added_tensors(self) -> dict[int, dict[str, Tensor]]:
        return {block: pool.state_dict() for block, pool in self.modules_by_block.items()}

    def adapters_per_block(self) -> dict[int, int]:
        return {i: len(pool.keys) + len(pool.new_keys) for i, pool in self.modules_by_block.items()}

    def parameter_counts(self) -> dict[str, int]:
        """Numbers in prompts, with their keys and attention vectors."""
        return {"prompts": sum(tensor.numel() for tensor in self.pools.state_dict().values())}
