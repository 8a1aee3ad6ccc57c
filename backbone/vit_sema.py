"""SEMA's network: a frozen timm Vision Transformer with adapters, routers and descriptors in its blocks.

    net = SEMAVisionTransformer(timm_vit, spec, growing=range(9, 12), adapted=range(12))
    features = net(images)                               # (B, 3, S, S) -> (B, d)
    with net.capture_inputs(net.growing, token_mean) as means:
        net(images)                                      # means[9]: (B, d), input of router and descriptor

Without growing blocks it holds plain adapters, without routers and descriptors.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone.frozen_vit import FrozenViT
from backbone.sema_block import AdapterSpec, SEMAModules


class SEMAVisionTransformer(FrozenViT):
    """A frozen timm ViT with `SEMAModules` in the adapted blocks.

    Those among them that may grow have a router and descriptors.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        spec: AdapterSpec,
        growing: Iterable[int] = (),
        adapted: Iterable[int] = (),
    ) -> None:
        growing = tuple(growing)
        modules = {i: SEMAModules(spec, growable=i in growing) for i in sorted(adapted)}
        super().__init__(vit, modules)
        self.spec, self.growing = spec, growing

    @torch.no_grad()
    def token_means(self, x: Tensor, start: int, blocks: Iterable[int]) -> dict[int, Tensor]:
        """Inputs of the blocks' routers and descriptors, {block: (B, d)}, float32, for x of depth `start`.

        It runs to the depth of the deepest of the blocks, whose tokens are its adapters' inputs.
        """
        *before, last = sorted(blocks)
        with self.capture_inputs(before if last else blocks, token_mean) as means:
            x = self(x, start, max(last, 1))
        return means | {last: token_mean(x)} if last else means

    @contextmanager
    def capture_inputs(
        self, blocks: Iterable[int], reduce: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[int, Tensor]]:
        """Context whose dict every forward fills with `reduce(x)` of the adapters' inputs x (B, N, d)."""
        captured: dict[int, Tensor] = {}

        def keep(block: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured[block] = reduce(inputs[0])

        with ExitStack() as hooks:
            for block in blocks:
                modules = self.modules_by_block[block]
                hooks.enter_context(modules.register_forward_pre_hook(partial(keep, block)))
            yield captured

    def descriptor_loss(self, token_means: dict[int, Tensor]) -> Tensor:
        """Sum over blocks of the newest descriptor's mean error on its token means (B, d); a scalar."""
        return sum(self.modules_by_block[block].descriptor_loss(mean) for block, mean in token_means.items())

    def observe(self, token_means: dict[int, Tensor]) -> None:
        """Record the descriptors' errors on token means (B, d), block by block."""
        for block, mean in token_means.items():
            self.modules_by_block[block].observe(mean)

    def descriptor_parameters(self) -> list[nn.Parameter]:
        """Parameters of all descriptors, frozen ones included."""
        return [p for modules in self.modules_by_block.values() for p in modules.descriptor_parameters()]

    def parameter_counts(self) -> dict[str, int]:
        """Numbers in adapters, descriptors and routers, and of recorded errors."""
        blocks = self.modules_by_block.values()
        records = [adapter.rd_loss_record for modules in blocks for adapter in modules.adapters]
        parts = {
            "descriptors": self.descriptor_parameters(),
            "routers": [p for modules in blocks for p in modules.router_parameters()],
            "records": [record.errors for record in records if record is not None],
        }
        numbers = {part: sum(tensor.numel() for tensor in tensors) for part, tensors in parts.items()}
        return super().parameter_counts() | numbers


def token_mean(x: Tensor) -> Tensor:
    """Mean over tokens, (B, N, d) -> (B, d), in float32: the input of routers and descriptors."""
    return x.detach().float().mean(dim=1)
