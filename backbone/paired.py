"""A frozen timm ViT with adapters whose features are those of two sets of adapter weights, side by side.

    net = PairedViT(timm_vit, spec, adapted=range(12))
    merging = Merging(adapter_parameters, rule="ema")
    net.pair(merging)
    features = net(images)           # (B, 2 d): with the deployed weights, and with those carried on
    with net.unpaired():
        features = net(images)       # (B, d): with the weights as they are, to train them

Blocks before the first adapted one run once for both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from backbone.merging import Merging
from backbone.vit_sema import SEMAVisionTransformer


class PairedViT(SEMAVisionTransformer):
    """`SEMAVisionTransformer` whose features are f(x; m) and f(x; w), m the parameters as they are.

    w are the weights that the next task trains on from (`Merging.start_weights`). Until it is paired, and in
    `unpaired`, features are f(x; m) alone.
    """

    _merging: tuple[Merging, ...] = ()  # a tuple: its state is not this module's
    is_paired = False

    def pair(self, merging: Merging) -> None:
        """Give features of both weights from now on; `merging` is of all functional parameters."""
        self._merging, self.is_paired = (merging,), True
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        self._names = [names[id(p)] for group in self.parameter_groups().values() for p in group]

    @contextmanager
    def unpaired(self) -> Iterator[None]:
        """Features of the parameters as they are, while open."""
        before, self.is_paired = self.is_paired, False
        try:
            yield
        finally:
            self.is_paired = before

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As in `SEMAVisionTransformer`, but features are those of both weights, (B, 2 d)."""
        if not self.is_paired or stop not in (None, self.depth):
            return super().forward(x, start, stop)
        first = min(self.modules_by_block)
        if start < first:
            x, start = super().forward(x, start, first), first
        with self.unpaired():
            carried = functional_call(self, self._carried(), (x, start))  # first: hooks keep the last run
            return torch.cat([self(x, start), carried], dim=-1)

    def _carried(self) -> dict[str, Tensor]:
        """w, by the names of the parameters."""
        (merging,) = self._merging
        return dict(zip(self._names, merging.split(merging.start_weights), strict=True))

    @property
    def feature_width(self) -> int:
        return self.vit.num_features * (2 if self.is_paired else 1)

    def tensors_below(self, depth: int) -> dict[str, Tensor]:
        found = super().tensors_below(depth)
        return found | (self._carried() if found and self.is_paired else {})
