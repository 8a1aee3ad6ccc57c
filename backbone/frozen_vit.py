"""Frozen timm Vision Transformer with modules added to its blocks; it runs from any depth to any other.

    net = FrozenViT(timm_vit)
    tokens = net(images, stop=9)     # (B, 3, S, S) -> (B, N, d): the input of block 9
    features = net(tokens, 9)        # -> (B, d)

The transformer is timm's own. It is the base class of the networks of all methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbone.frozen_block import attend, freeze, is_learning, joined_groups, mlp_branch


class AddedModule(nn.Module, ABC):
    """What a network adds to one block of the frozen ViT: adapters, low-rank terms or prompts.

    One that takes the place of the block's fused qkv projection holds that as `qkv`.

    Attributes:
        growable: whether more may be added to the block in a later task.
    """

    growable = True

    def is_learning(self) -> bool:
        """Whether anything that shapes the block's output learns now."""
        return is_learning(self)

    def freeze(self) -> None:
        freeze(self)

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that shape the block's output by the name of their group, frozen ones included."""

    def merged_weight(self) -> Tensor | None:
        """Weight (3 d, d) of the qkv projection that computes the same alone; None where there is none."""
        return None


class AdaptedBlock(nn.Module):
    """timm's block with adapters beside its MLP, which read the un-normalised residual stream:

        x = x + attn(norm1(x));   y = mlp(norm2(x)) + adapters(x);   x = x + y

    Layer scale, where a model has it, applies to attn and mlp only.
    """

    def __init__(self, block: Block, adapter_module: AddedModule) -> None:
        super().__init__()
        self.block, self.adapter_module = block, adapter_module

    def forward(self, x: Tensor, attended: bool = False) -> Tensor:
        """The block's output for its input x or, with `attended`, for x + attn(norm1(x))."""
        block, adapters, kept = self.block, self.adapter_module, getattr(self.block, "kept", None)
        if not attended:
            x = attend(block, x, None if adapters.reads_all_tokens else kept)
        delta, x = adapters(x, kept), x[:, :kept]
        return x + (mlp_branch(block, x) + delta)


class FrozenViT(nn.Module):
    """A frozen timm ViT, optionally with adapters beside MLPs; untrained ones leave its output bit for bit.

    Attributes:
        modules_by_block: what is added to the blocks, in depth order; subclasses that add something else than
            adapters beside MLPs put it in.

    Args:
        vit: a timm VisionTransformer with a class token and no classifier (`num_classes=0`); it becomes part
            of this module.
        beside_mlp: the adapters of a block (`SEMAModules` or `TaskAdapters`), by block.
    """

    spec: Any = None  # `AdapterSpec`, where blocks hold adapters

    def __init__(self, vit: VisionTransformer, beside_mlp: Mapping[int, AddedModule] | None = None) -> None:
        super().__init__()
        freeze(vit)
        self.modules_by_block = dict(beside_mlp or {})
        for i, adapters in self.modules_by_block.items():
            vit.blocks[i] = AdaptedBlock(vit.blocks[i], adapters)
        self.vit = vit.eval()

    def train(self, mode: bool = True) -> "FrozenViT":
        """Set the mode of everything but the frozen transformer, which stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run from depth `start`, that of x, to depth `stop`; by default from images to features.

        A depth names a tensor: 0 is images (B, 3, S, S), k the tokens (B, N, d) of block k, and `self.depth`
        the features (B, d), class token after the final norm. The tokens of an adapted block are those after
        its attention, which its adapters do not change; of any other block its inputs.
        """
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"blocks {start} to {stop}: depths lie in order between 0 and {self.depth}")
        if start == stop:
            return x
        if start == 0:
            x = self.embed(x)
        for number, block in enumerate(self.vit.blocks[start:stop], start):
            x = block(x, attended=True) if number == start and self.begins_attended(start) else block(x)
        if stop == self.depth:
            return self.vit.forward_head(self.vit.norm(x))
        return attend(self.vit.blocks[stop].block, x) if self.begins_attended(stop) else x

    def begins_attended(self, depth: int) -> bool:
        """Whether the tokens of a depth are those after the attention of its block."""
        return 0 < depth < self.depth and isinstance(self.vit.blocks[depth], AdaptedBlock)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens with positions, (B, 3, S, S) -> (B, N, d): the input of block 0."""
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    # --- depths ---------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def feature_width(self) -> int:
        return self.vit.num_features

    def each_subspace(self) -> Iterator[None]:
        """Iterate over the subspaces of the features: in each round `forward` gives one alone. Here: one."""
        yield

    def fixed_depth(self) -> int:
        """Depth below which nothing changes any more: the first block that may grow or learns, or `depth`."""
        blocks = self.modules_by_block.items()
        return next((b for b, modules in blocks if modules.growable or modules.is_learning()), self.depth)

    def learning_depth(self) -> int:
        """Depth below which nothing learns now: the first block in which something does, or `depth`."""
        return next((b for b, modules in self.modules_by_block.items() if modules.is_learning()), self.depth)

    def tensors_below(self, depth: int) -> dict[str, Tensor]:
        """The `added_tensors` of the blocks before `depth`, by name."""
        return {
            f"{block}.{name}": tensor
            for block, tensors in self.added_tensors().items()
            if block < depth
            for name, tensor in tensors.items()
        }

    def added_tensors(self) -> dict[int, dict[str, Tensor]]:
        """Tensors beside the frozen ViT's that shape the output, by block and name: adapters' parameters."""
        return {
            block: {
                f"{name}.{i}": tensor
                for name, tensors in modules.parameter_groups().items()
                for i, tensor in enumerate(tensors)
            }
            for block, modules in self.modules_by_block.items()
        }

    # --- what is added to blocks ----------------------------------------------------------------------------

    def adapters_per_block(self) -> dict[int, int]:
        return {block: len(modules.adapters) for block, modules in self.modules_by_block.items()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All functional parameters by the name of their group, frozen ones included."""
        return joined_groups(self.modules_by_block.values())

    def freeze(self) -> None:
        for modules in self.modules_by_block.values():
            modules.freeze()

    def parameter_counts(self) -> dict[str, int]:
        """Stored numbers by part, beside the frozen transformer: those of adapters."""
        adapters = [adapter for modules in self.modules_by_block.values() for adapter in modules.adapters]
        return {"adapters": sum(p.numel() for a in adapters for p in a.functional.parameters())}

    def plain_state(self) -> dict[str, Tensor] | None:
        """State dict of the timm ViT that computes the same; None where what is added leaves no such ViT."""
        weights = {block: modules.merged_weight() for block, modules in self.modules_by_block.items()}
        if any(weight is None for weight in weights.values()):
            return None
        frozen = self.frozen_names()
        plain = {
            name.removeprefix("vit.").replace(".qkv.qkv.", ".qkv."): tensor
            for name, tensor in self.state_dict().items()
            if name in frozen
        }
        return plain | {f"blocks.{block}.attn.qkv.weight": weight for block, weight in weights.items()}

    def frozen_names(self) -> set[str]:
        """Names in the state dict of the pretrained transformer's own tensors, which no checkpoint holds."""
        added = set(self.modules_by_block.values())
        own = {
            f"{place}.{name}"
            for place, module in self.named_modules()
            if module in added
            for name in module.state_dict()
            if not name.startswith("qkv.")
        }
        return {name for name in self.state_dict() if name.startswith("vit.")} - own
