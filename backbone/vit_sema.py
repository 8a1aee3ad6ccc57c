"""A frozen timm Vision Transformer with adapters parallel to the MLP of its blocks.

    net = SEMAVisionTransformer(timm_vit, spec, growing=range(9, 12), adapted=range(12))
    features = net(images)                               # (B, 3, S, S) -> (B, d)
    with net.capture_inputs(net.growing, token_mean) as means:
        net(images)                                      # means[9]: (B, d), input of router and descriptor

The transformer is timm's own, with its blocks wrapped. Block i computes

    x = x + attn(norm1(x));   y = mlp(norm2(x)) + adapter_i(x);   x = x + y

where adapter_i reads the un-normalised residual stream. Layer scale, where a model has it, applies to attn
and mlp only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbone.frozen_block import attend, mlp_branch
from backbone.sema_block import AdapterSpec, SEMAModules, freeze


class SEMABlock(nn.Module):
    """timm's block with adapters beside its MLP; without adapters exactly timm's block."""

    def __init__(self, block: Block, adapter_module: SEMAModules | None) -> None:
        super().__init__()
        self.block, self.adapter_module = block, adapter_module

    def forward(self, x: Tensor) -> Tensor:
        block, adapters, kept = self.block, self.adapter_module, getattr(self.block, "kept", None)
        if adapters is None:
            x = attend(block, x, kept)
            return x + mlp_branch(block, x)
        x = attend(block, x, None if adapters.reads_all_tokens else kept)
        delta, x = adapters(x, kept), x[:, :kept]
        return x + (mlp_branch(block, x) + delta)


class SEMAVisionTransformer(nn.Module):
    """A frozen timm ViT with adapters in chosen blocks; untrained ones leave timm's output bit for bit.

    Args:
        vit: a timm VisionTransformer with a class token and no classifier (`num_classes=0`); it becomes part
            of this module.
        spec: kind and sizes of an adapter; None where no block holds one.
        growing: the blocks that may grow (they have a router and descriptors).
        adapted: the blocks that hold adapters; must contain `growing`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        spec: AdapterSpec | None = None,
        growing: Iterable[int] = (),
        adapted: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.spec, self.growing, adapted = spec, tuple(growing), set(adapted)
        freeze(vit)
        for i, block in enumerate(vit.blocks):
            modules = SEMAModules(spec, block=i, growable=i in self.growing) if i in adapted else None
            vit.blocks[i] = SEMABlock(block, modules)
        self.vit = vit.eval()

    def train(self, mode: bool = True) -> "SEMAVisionTransformer":
        """Set the mode of everything but the frozen transformer, which stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The output of blocks start .. stop - 1; by default of all, from images to features.

        A depth names a tensor: 0 is images (B, 3, S, S), k the tokens that enter block k (B, N, d), and
        `self.depth` the features (B, d), class token after the final norm. x has depth `start`, the result
        has depth `stop`.
        """
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"blocks {start} to {stop}: depths lie in order between 0 and {self.depth}")
        if start == stop:
            return x
        if start == 0:
            x = self.embed(x)
        for block in self.vit.blocks[start:stop]:
            x = block(x)
        return self.vit.forward_head(self.vit.norm(x)) if stop == self.depth else x

    def embed(self, images: Tensor) -> Tensor:
        """Tokens with positions, (B, 3, S, S) -> (B, N, d): the input of block 0."""
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    @torch.no_grad()
    def token_means(self, x: Tensor, start: int, blocks: Iterable[int]) -> dict[int, Tensor]:
        """Inputs of the blocks' routers and descriptors, {block: (B, d)}, float32, for x of depth `start`.

        Runs no further than the deepest of the blocks.
        """
        with self.capture_inputs(blocks, token_mean) as means:
            self(x, start, max(blocks) + 1)
        return means

    @contextmanager
    def capture_inputs(
        self, blocks: Iterable[int], reduce: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[int, Tensor]]:
        """A dict that forwards fill, while open, with `reduce(x)` of the adapters' inputs x (B, N, d)."""
        captured: dict[int, Tensor] = {}

        def hook(block: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, inputs: captured.__setitem__(block, reduce(inputs[0]))

        handles = [self.modules_by_block[block].register_forward_pre_hook(hook(block)) for block in blocks]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    # --- depths ---------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def feature_width(self) -> int:
        """Length of a feature vector."""
        return self.vit.num_features

    def fixed_depth(self) -> int:
        """Depth up to which nothing changes any more: the first block that may grow or learns, or `depth`."""
        blocks = self.modules_by_block.items()
        return next((b for b, modules in blocks if modules.growable or modules.is_learning()), self.depth)

    def learning_depth(self) -> int:
        """Depth up to which nothing learns now: the first block with a learning adapter or router."""
        return next((b for b, modules in self.modules_by_block.items() if modules.is_learning()), self.depth)

    def tensors_below(self, depth: int) -> dict[str, Tensor]:
        """Functional parameters of all adapters in blocks before `depth`, by name."""
        return {
            f"{block}.{name}.{i}": tensor
            for block, modules in self.modules_by_block.items()
            if block < depth
            for name, tensors in modules.parameter_groups().items()
            for i, tensor in enumerate(tensors)
        }

    # --- adapters, descriptors and their parameters ---------------------------------------------------------

    @property
    def modules_by_block(self) -> dict[int, SEMAModules]:
        """The adapters of every adapted block, in depth order."""
        blocks = enumerate(self.vit.blocks)
        return {i: block.adapter_module for i, block in blocks if block.adapter_module is not None}

    def adapters_per_block(self) -> dict[int, int]:
        """Number of adapters in each adapted block."""
        return {block: len(modules.adapters) for block, modules in self.modules_by_block.items()}

    def descriptor_loss(self, token_means: dict[int, Tensor]) -> Tensor:
        """Sum over blocks of the newest descriptor's mean error on its token means (B, d); a scalar."""
        return sum(self.modules_by_block[block].descriptor_loss(mean) for block, mean in token_means.items())

    def observe(self, token_means: dict[int, Tensor]) -> None:
        """Record the descriptors' errors on token means (B, d), block by block."""
        for block, mean in token_means.items():
            self.modules_by_block[block].observe(mean)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All functional parameters by time scale (adapters and routers, frozen ones included)."""
        groups: dict[str, list[nn.Parameter]] = {}
        for modules in self.modules_by_block.values():
            for name, parameters in modules.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups

    def descriptor_parameters(self) -> list[nn.Parameter]:
        """Parameters of all descriptors, frozen ones included."""
        return [p for modules in self.modules_by_block.values() for p in modules.descriptor_parameters()]

    def parameter_counts(self) -> dict[str, int]:
        """Numbers in adapters, descriptors and routers, and of recorded errors."""
        blocks = self.modules_by_block.values()
        adapters = [adapter for modules in blocks for adapter in modules.adapters]
        parts = {
            "adapters": [p for adapter in adapters for p in adapter.functional.parameters()],
            "descriptors": self.descriptor_parameters(),
            "routers": [p for modules in blocks for p in modules.router_parameters()],
            "records": [a.rd_loss_record.errors for a in adapters if a.rd_loss_record is not None],
        }
        return {part: sum(tensor.numel() for tensor in tensors) for part, tensors in parts.items()}

    def plain_state(self) -> dict[str, Tensor] | None:
        """State dict of the timm ViT that computes the same; None where adapters make it another network."""
        if self.modules_by_block:
            return None
        return {name.replace(".block.", ".", 1): tensor for name, tensor in self.vit.state_dict().items()}

    def frozen_names(self) -> set[str]:
        """Names in the state dict of the pretrained transformer's own tensors, which no checkpoint holds."""
        blocks = self.modules_by_block.items()
        own = {f"vit.blocks.{i}.adapter_module.{name}" for i, m in blocks for name in m.state_dict()}
        return self.state_dict().keys() - own


def token_mean(x: Tensor) -> Tensor:
    """Mean over tokens, (B, N, d) -> (B, d), in float32: the input of routers and descriptors."""
    return x.detach().float().mean(dim=1)
