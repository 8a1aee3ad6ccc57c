"""Faster blocks for a timm ViT with frozen weights: the same function and the same tensor names.

    speed_up(vit)            # before adapters are added
    features = vit(images)   # timm's output up to rounding

Weights are cast, scaled and laid out once instead of in every forward, and the last block computes only what
the class token needs, the one token that the network's feature reads.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Attention, LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_SCORES = 2**20  # attention scores held at once where no backward pass needs them: 2 MiB in bf16


def speed_up(vit: VisionTransformer) -> None:
    """Replace the blocks by `FrozenBlock`s, which hold the same tensors under the same names.

    From then on nothing in the blocks may learn, and the class token alone leaves the last block.
    """
    last = len(vit.blocks) - 1
    for i, block in enumerate(vit.blocks):
        vit.blocks[i] = FrozenBlock(block, kept=1 if i == last else None)


class FrozenBlock(Block):
    """timm's block in evaluation mode, built from one whose modules it takes over.

    Args:
        kept: the number of leading tokens that it returns; None for all.
    """

    def __init__(self, block: Block, kept: int | None = None) -> None:
        nn.Module.__init__(self)
        self.kept = kept
        for name, module in block.named_children():
            setattr(self, name, module)
        self.eval()
        for scale, branch, last in (("ls1", self.attn, "proj"), ("ls2", self.mlp, "fc2")):
            folded = None
            if isinstance(getattr(self, scale), LayerScale) and hasattr(branch, last):
                folded = FoldedScale(getattr(self, scale).gamma)
                setattr(self, scale, folded)
            for name, module in branch.named_children():
                if type(module) is nn.Linear:
                    setattr(branch, name, FrozenLinear(module, folded if name == last else None))
        if type(self.mlp) is Mlp and type(self.mlp.act) is nn.GELU:
            self.mlp.act = InPlaceGELU(self.mlp.act.approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = attend(self, x, self.kept)
        y = mlp_branch(self, x)
        return x + y if x.requires_grad else x.add_(y)


def freeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def is_learning(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def joined_groups(modules: Iterable[Any]) -> dict[str, list[nn.Parameter]]:
    """The `parameter_groups()` of several modules, concatenated by group name."""
    groups: dict[str, list[nn.Parameter]] = {}
    for module in modules:
        for name, parameters in module.parameter_groups().items():
            groups.setdefault(name, []).extend(parameters)
    return groups


def take_saved_sizes(module: nn.Module, **dimensions: int) -> None:
    """Let `load_state_dict` resize some tensors of a module, each along one dimension: name -> dimension.

    Such a parameter is replaced by a new one, which requires a gradient. Other differences are still refused.
    """
    module.register_load_state_dict_pre_hook(functools.partial(_take_sizes, dimensions))


def _take_sizes(
    dimensions: dict[str, int], module: nn.Module, state: dict[str, Tensor], prefix: str, *hook_args: object
) -> None:
    for name, dimension in dimensions.items():
        saved, tensor = state.get(f"{prefix}{name}"), getattr(module, name)
        if saved is not None and saved.dim() == tensor.dim():
            shape = list(tensor.shape)
            shape[dimension] = saved.shape[dimension]
            resized = tensor.detach().new_zeros(shape)
            setattr(module, name, nn.Parameter(resized) if isinstance(tensor, nn.Parameter) else resized)


def attend(block: Block, x: Tensor, kept: int | None = None) -> Tensor:
    """x + ls1(attn(norm1(x))) of a block in evaluation mode, for the first `kept` tokens; by default all."""
    if isinstance(block, FrozenBlock):
        y = _attention(block.attn, block.norm1(x), kept)
    else:
        y = block.attn(block.norm1(x))[:, :kept]
    return x[:, :kept] + block.ls1(y)


def mlp_branch(block: Block, x: Tensor) -> Tensor:
    return block.ls2(block.mlp(block.norm2(x)))


def _attention(attention: nn.Module, x: Tensor, kept: int | None) -> Tensor:
    """The first `kept` tokens of an attention's output, (B, N, d) -> (B, kept, d).

    On CPUs torch's fused kernel is slow in bf16, except in forward passes with AMX: matrix products and a
    softmax take its place there.
    """
    if getattr(attention, "prefix", attention) is None:  # a `PrefixAttention` without a prefix
        attention = attention.attention
    special = getattr(attention, "gate", None) or getattr(attention, "q_norm", None)
    if type(attention) is not Attention or not isinstance(special, nn.Identity):
        return attention(x)[:, :kept]
    qkv, heads = attention.qkv(x), attention.num_heads
    slow = qkv.requires_grad or not torch.cpu.get_capabilities().get("amx_bf16", False)
    on_cpu = qkv.device.type == "cpu" and not torch.jit.is_tracing()
    if on_cpu and (qkv.dtype == torch.bfloat16 and slow or not attention.fused_attn):
        if qkv.requires_grad:
            y = _PlainAttention.apply(qkv, heads, kept)
        else:
            parts = qkv.split(max(1, MAX_SCORES // (heads * qkv.shape[1] ** 2)))
            y = torch.cat([_attend_plainly(part, heads, kept)[0] for part in parts]).flatten(2)
    else:
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))
        y = F.scaled_dot_product_attention(q[:, :, :kept], k, v).transpose(1, 2).flatten(2)
    return attention.proj(attention.norm(y))


def _attend_plainly(qkv: Tensor, heads: int, kept: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention as matrix products and a softmax, from the fused q, k and v (B, N, 3d).

    Returns the first `kept` tokens of its output (B, kept, heads, d / heads), q, k and v by head
    (3, B heads, N, d / heads) and the attention weights (B heads, kept, N).
    """
    batch, tokens, _ = qkv.shape
    parts = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    parts = parts.reshape(3, batch * heads, tokens, -1)
    q, k, v = parts[0, :, :kept], parts[1], parts[2]
    weights = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    torch.softmax(weights, dim=-1, out=weights)
    return torch.bmm(weights, v).view(batch, heads, -1, q.shape[-1]).transpose(1, 2), parts, weights


class _PlainAttention(torch.autograd.Function):
    """`_attend_plainly`, differentiable: (B, N, 3d) -> (B, kept, d). It saves the attention weights."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, kept: int | None) -> Tensor:
        y, parts, weights = _attend_plainly(qkv, heads, kept)
        ctx.save_for_backward(parts, weights)
        return y.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts, weights = ctx.saved_tensors
        kept, (_, _, tokens, size) = weights.shape[1], parts.shape
        q, k, v = parts[0, :, :kept], parts[1], parts[2]
        batch, heads = len(gradient), gradient.shape[-1] // size
        gradient = gradient.unflatten(-1, (heads, size)).transpose(1, 2).reshape(batch * heads, kept, size)
        result = torch.empty_like(parts) if kept == tokens else torch.zeros_like(parts)
        torch.bmm(weights.mT, gradient, out=result[2])
        scores = torch._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype).mul_(size**-0.5)
        torch.bmm(scores, k, out=result[0, :, :kept])
        torch.bmm(scores.mT, q, out=result[1])
        result = result.view(3, batch, heads, tokens, size).permute(1, 3, 0, 2, 4)
        return result.reshape(batch, tokens, -1), None, None


class InPlaceGELU(nn.GELU):
    """GELU, in place where no backward pass needs its input: one tensor less to write."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x) if x.requires_grad else torch.ops.aten.gelu_(x, approximate=self.approximate)
        )


class FoldedScale(nn.Module):
    """A layer scale whose gamma is folded into the `FrozenLinear` before it: here the identity."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x


class FrozenLinear(nn.Linear):
    """y = s (W x + b)  with weights that do not learn; s scales each output, or is 1.

    Under autocast it computes in the lower precision, as every Linear does. Weights are prepared once per
    dtype, and again when they have changed: cast, scaled, and on CPUs with AVX512 reordered into oneDNN's
    blocked layout, with which its products are the fastest.

    Args:
        linear: the Linear whose parameters it takes over.
        scale: the module that holds s.
    """

    def __init__(self, linear: nn.Linear, scale: FoldedScale | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._scale = (scale,)  # a tuple: the scale is the block's, not a part of this module
        self._prepared: dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor | None]] = {}
        self._prepared_from: list[tuple[Tensor, int]] = []  # held, so that their addresses are not reused

    def __getstate__(self) -> dict[str, Any]:
        """The state without prepared weights: tensors in oneDNN's layout can be neither copied nor saved."""
        return self.__dict__ | {"_prepared": {}, "_prepared_from": []}

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return F.linear(x, *self._scaled())
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _FrozenProduct.apply(x, self) if x.requires_grad else product(self, x)

    def weights(self, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor | None]:
        """s W and s b, or (s W)^T and None, in a dtype; weights in oneDNN's layout have `is_mkldnn`."""
        tensors = [t for t in (self.weight, self.bias, *(s.gamma for s in self._scale if s)) if t is not None]
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if state != [(tensor.data_ptr(), version) for tensor, version in self._prepared_from]:
            self._prepared = {}
            self._prepared_from = [(tensor.detach(), tensor._version) for tensor in tensors]
        key = dtype, transposed
        if key not in self._prepared:
            with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
                self._prepared[key] = self._prepare(dtype, transposed)
        return self._prepared[key]

    def _prepare(self, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor | None]:
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in self._scaled())
        if transposed:
            weight, bias = weight.T, None
        if weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _reorders_weights():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return weight, bias

    def _scaled(self) -> tuple[Tensor, Tensor | None]:
        """s W and s b."""
        (scale,) = self._scale
        if scale is None:
            return self.weight, self.bias
        bias = None if self.bias is None else self.bias * scale.gamma
        return self.weight * scale.gamma[:, None], bias


def product(linear: nn.Linear, x: Tensor, transposed: bool = False) -> Tensor:
    """Output of a Linear for x; with `transposed` x is the output's gradient, and the result the input's.

    Without autograd, in the dtype of x.
    """
    if isinstance(linear, FrozenLinear):
        weight, bias = linear.weights(x.dtype, transposed)
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        weight, bias = (
            None if tensor is None else tensor.to(x.dtype) for tensor in (linear.weight, linear.bias)
        )
        weight, bias = (weight.T, None) if transposed else (weight, bias)
    return F.linear(x, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    """`product`, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return product(linear, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(ctx.linear, gradient, transposed=True), None


@functools.cache
def _reorders_weights() -> bool:
    """Whether oneDNN's weight layout pays: with AVX512, but not with AVX2 (also where a config chose it)."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
