"""A few parameters beside a trained linear layer, so that it can learn a new task without forgetting what it was.

    layer = ADAPTATIONS["lora"](nn.Linear(128, 64), rank=4)      # the same function, until its own parameters learn
    layer(x)                                                     # (..., 128) -> (..., 64)
    layer.linear                                                 # the layer as it was, never changed

Sources: LoRA (Hu et al., ICLR 2022); bottleneck adapters (Houlsby et al., ICML 2019).
"""

from torch import Tensor, nn

from backbone.lora import LowRank
from backbone.sema_components import Adapter


class LowRankLinear(nn.Module):
    """y = W x + b + B A x with W and b frozen, A (r, d_in) and B (d_out, r), at the LoRA start."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.low_rank = LowRank(linear.weight, 1, rank, linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.low_rank(x)


class AdaptedLinear(nn.Module):
    """y = u + A(u) with u = W x + b frozen and A a bottleneck adapter of r hidden units, silent at the start."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.adapter = Adapter(linear.out_features, rank).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.adapter(y)


ADAPTATIONS: dict[str, type[LowRankLinear] | type[AdaptedLinear]] = {
    "lora": LowRankLinear,
    "adapter": AdaptedLinear,
}
