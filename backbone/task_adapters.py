"""Frozen timm ViT with one adapter per task in its blocks; its features are those of all adapters, joined.

    net = TaskAdapterViT(timm_vit, spec, adapted=range(12), plain=True)
    net.grow()                       # adapter 0 learns: features are those of the ViT with it, (B, d)
    net.freeze()
    features = net(images)           # (B, 2 d): without adapters, and with adapter 0

Blocks before the first adapted one run once for all subspaces.
"""

from collections.abc import Iterable, Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone.frozen_block import joined_groups
from backbone.frozen_vit import AddedModule, FrozenViT
from backbone.sema_block import AdapterModule, AdapterSpec


class TaskAdapters(AddedModule):
    """The adapters of one block, one per task, of which only k = `chosen` is applied: A_k(x), (B, N, d).

    While `chosen` is None the output is zero. Their number is state: a fresh module takes it from the tensors
    that it loads.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.adapters = nn.ModuleList()
        self.chosen: int | None = None
        self.register_load_state_dict_pre_hook(_take_saved_number)

    def forward(self, x: Tensor, kept: int | None = None) -> Tensor:
        """The output for the first `kept` of the tokens; by default for all."""
        x = x[:, :kept]
        return torch.zeros_like(x) if self.chosen is None else self.adapters[self.chosen](x)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether anything but the adapters reads the input: a hook."""
        return bool(self._forward_pre_hooks)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return joined_groups(adapter.functional for adapter in self.adapters)


class TaskAdapterViT(FrozenViT):
    """The ViT with `TaskAdapters` in the `adapted` blocks, at least one.

    Each adapter gives a subspace of the features; while one learns, `forward` gives its subspace alone. With
    `plain` the first subspace is that of the ViT without adapters.
    """

    def __init__(
        self, vit: VisionTransformer, spec: AdapterSpec, adapted: Iterable[int], plain: bool = False
    ) -> None:
        super().__init__(vit, {block: TaskAdapters(spec) for block in sorted(adapted)})
        self.spec, self.plain = spec, plain
        self.first = min(self.modules_by_block)
        self._open: list[int | None] = []  # the one subspace of a round of `each_subspace`, or empty

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As in `FrozenViT`, but features are those of all subspaces, (B, subspaces * d)."""
        if stop is not None and stop <= self.first:
            return super().forward(x, start, stop)
        if start < self.first:
            x, start = super().forward(x, start, self.first), self.first
        features = []
        for adapter in self.subspaces():
            for modules in self.modules_by_block.values():
                modules.chosen = adapter
            features.append(super().forward(x, start, stop))
        return torch.cat(features, dim=-1)

    def subspaces(self) -> list[int | None]:
        """The adapters whose features `forward` joins, the newest last; None for the ViT without adapters."""
        modules = self.modules_by_block[self.first]
        found = [*([None] if self.plain else []), *range(len(modules.adapters))]
        return self._open or (found[-1:] if modules.is_learning() else found)

    def each_subspace(self) -> Iterator[None]:
        try:
            for adapter in self.subspaces():
                self._open = [adapter]
                yield
        finally:
            self._open = []

    def added_tensors(self) -> dict[int, dict[str, Tensor]]:
        """As in `FrozenViT`, of the adapters whose features `forward` joins."""
        chosen = [adapter for adapter in self.subspaces() if adapter is not None]
        return {
            block: {
                f"{adapter}.{name}": tensor
                for adapter in chosen
                for name, tensor in modules.adapters[adapter].named_parameters()
            }
            for block, modules in self.modules_by_block.items()
        }

    @property
    def feature_width(self) -> int:
        return self.vit.num_features * len(self.subspaces())

    def grow(self) -> None:
        """Add an adapter with zero output, which learns, to every adapted block."""
        device = next(self.vit.parameters()).device
        for modules in self.modules_by_block.values():
            modules.adapters.append(AdapterModule(self.spec, described=False).to(device))


def _take_saved_number(
    modules: TaskAdapters, state: dict[str, Tensor], prefix: str, *hook_args: object
) -> None:
    """Load-state-dict pre-hook: as many adapters as were saved."""
    while any(name.startswith(f"{prefix}adapters.{len(modules.adapters)}.") for name in state):
        modules.adapters.append(AdapterModule(modules.spec, described=False))
