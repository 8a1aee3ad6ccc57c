"""Adapters, representation descriptors and their error records: the parts of a SEMA block.

    adapter = ADAPTERS["nested_lora"](width=768, bottleneck=16, scale=1.0)
    delta = adapter(tokens)                      # (B, N, d) -> (B, N, d)
    adapter.parameter_groups()                   # {"slow": [...], "fast": [...]}: parameters by time scale

Sources: SEMA (Wang et al., CVPR 2025), AdaptFormer (Chen et al., NeurIPS 2022), LoRA (Hu et al., ICLR 2022).
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


class Factors(NamedTuple):
    """An adapter as one bottleneck  x -> up phi(down x + down_bias) + up_bias  of R units, scale included.

    Shapes: down (R, d), down_bias (R,), up (d, R), up_bias (d,); both biases are None where an adapter has
    none. phi is the activation, a function of each unit alone with phi(1) != 0.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    activation: Activation

    def apply(self, x: Tensor) -> Tensor:
        """The output of the bottleneck, (..., d) -> (..., d)."""
        return F.linear(self.activation(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


class Adapter(nn.Module):
    """Bottleneck adapter  A(x) = s (W_up relu(W_down x + b_down) + b_up),  (..., d) -> (..., d).

    W_down is (r, d), W_up is (d, r). It starts as LoRA does: W_down Kaiming-uniform(a = sqrt 5), all else
    zero, so that the output is zero and W_up has a gradient.

    Args:
        width: d, the width of the residual stream.
        bottleneck: r, the number of hidden units.
        scale: s; published SEMA configs name 0.1, published SEMA code applies 1.
    """

    biased: ClassVar[bool] = True
    activation: ClassVar[Activation] = staticmethod(F.relu)

    def __init__(self, width: int, bottleneck: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down_proj = nn.Linear(width, bottleneck, bias=self.biased)
        self.up_proj = nn.Linear(bottleneck, width, bias=self.biased)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Return to the LoRA start: zero output, able to learn."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def factors(self) -> Factors:
        """The adapter as one bottleneck of r units."""
        down, up, up_bias = self.down_proj, self.up_proj.weight, self.up_proj.bias
        if self.scale != 1.0:
            up, up_bias = self.scale * up, None if up_bias is None else self.scale * up_bias
        return Factors(down.weight, down.bias, up, up_bias, self.activation)

    @torch.no_grad()
    def effect(self) -> float:
        """||s W_up W_down||_F, the size of the linear map inside the activation; costs two r x r products."""
        up, down = self.up_proj.weight.double(), self.down_proj.weight.double()
        return abs(self.scale) * math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"adapter": list(self.parameters())}


class LoRAAdapter(Adapter):
    """Linear low-rank adapter  A(x) = s W_up W_down x, without activation and biases: LoRA beside the MLP.

    Sums and means of such adapters are those of their matrices W_up W_down.
    """

    biased = False
    activation = staticmethod(identity)


class NestedLoRAAdapter(nn.Module):
    """Two adapters on two time scales  Delta(x) = slow(x) + fast(x): a plain sum, no gate between them.

    Computed as one bottleneck of 2r units. Rank r has the parameters of one `Adapter` with bottleneck 2r plus
    one output bias of d numbers. Both branches (of class `Branch`) start with zero output and different
    down-projections.

    Args:
        width: d, the width of the residual stream.
        bottleneck: r, the rank of each branch (`nested_lora_rank`).
        scale: s of both branches.
    """

    Branch: ClassVar[type[Adapter]] = Adapter

    def __init__(self, width: int, bottleneck: int, scale: float = 1.0) -> None:
        super().__init__()
        self.slow = self.Branch(width, bottleneck, scale)
        self.fast = self.Branch(width, bottleneck, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def factors(self) -> Factors:
        """Both branches as one bottleneck of 2r units, those of slow first."""
        slow, fast = self.slow.factors(), self.fast.factors()
        biased = self.Branch.biased
        return Factors(
            torch.cat([slow.down, fast.down]),
            torch.cat([slow.down_bias, fast.down_bias]) if biased else None,
            torch.cat([slow.up, fast.up], dim=1),
            slow.up_bias + fast.up_bias if biased else None,
            slow.activation,
        )

    @torch.no_grad()
    def align(self) -> None:
        """Restart fast on the hidden units of slow: the same down-projection, zero output."""
        self.fast.reset()
        self.fast.down_proj.load_state_dict(self.slow.down_proj.state_dict())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"slow": list(self.slow.parameters()), "fast": list(self.fast.parameters())}

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Sizes of both branches: "slow", "fast" = ||theta||, "slow_effect", "fast_effect" = `effect`.

        theta includes the random down-projection, so ||theta|| hardly moves; the product is zero at the LoRA
        start.
        """
        groups = self.parameter_groups().items()
        squares = {name: sum(float(p.double().square().sum()) for p in group) for name, group in groups}
        norms = {name: math.sqrt(total) for name, total in squares.items()}
        return norms | {f"{name}_effect": branch.effect() for name, branch in self.named_children()}


class NestedLinearLoRAAdapter(NestedLoRAAdapter):
    """`NestedLoRAAdapter` with linear branches: rank r has exactly the parameters of one of rank 2r."""

    Branch = LoRAAdapter


def common_factors(adapters: Sequence[nn.Module]) -> list[Factors] | None:
    """The factors of adapters that can be computed as one bottleneck; None where they cannot.

    They must share one activation, and all or none of them have biases. A class that overrides `forward` but
    not `factors` is computed by its `forward`.
    """
    if not all(_gives_factors(type(adapter)) for adapter in adapters):
        return None
    factors = [adapter.factors() for adapter in adapters]
    return factors if len({(part.activation, part.up_bias is None) for part in factors}) == 1 else None


def _gives_factors(kind: type[nn.Module]) -> bool:
    """Whether the most derived class that defines `forward` or `factors` defines `factors`."""
    owner = next(parent for parent in kind.__mro__ if vars(parent).keys() & {"factors", "forward"})
    return "factors" in vars(owner)


ADAPTERS: dict[str, type[nn.Module]] = {
    "adaptmlp": Adapter,
    "lora": LoRAAdapter,
    "nested_lora": NestedLoRAAdapter,
    "nested_lora_linear": NestedLinearLoRAAdapter,
}


class AE(nn.Module):
    """Representation descriptor (RD): a linear auto-encoder of token means m, (B, d) -> errors (B,).

    error(m) = mean_j (m - W_dec (W_enc m + b_enc) - b_dec)_j^2, one per sample. A small error says that a
    sample resembles those its adapter was trained on. Weights start Kaiming-uniform(a = sqrt 5), biases zero.
    """

    def __init__(self, width: int, rd_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, rd_dim)
        self.decoder = nn.Linear(rd_dim, width)
        for linear in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            nn.init.zeros_(linear.bias)

    def forward(self, token_mean: Tensor) -> Tensor:
        return (token_mean - self.decoder(self.encoder(token_mean))).square().mean(dim=1)


class Records(nn.Module):
    """The last `capacity` reconstruction errors of one descriptor, as a buffer (n,), oldest first.

    z = |error - mean| / std with the unbiased std, zero while two errors or fewer are stored. A learner
    records errors on views the descriptor was not trained on: those of trained views are smaller and would
    make every other z too large.
    """

    errors: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("errors", torch.zeros(0))
        self.register_load_state_dict_pre_hook(_resize_records)

    def __len__(self) -> int:
        return len(self.errors)

    @torch.no_grad()
    def push(self, errors: Tensor) -> None:
        """Append errors (B,); as published, the batch that fills the buffer is cut to the room left."""
        new, room = errors.detach().to(self.errors), self.capacity - len(self)
        self.errors = torch.cat([self.errors, new[:room] if room else new])[-self.capacity :]

    @property
    def mean(self) -> Tensor:
        """Mean of the stored errors, a scalar in double precision."""
        return self.errors.double().mean()

    @property
    def stddev(self) -> Tensor:
        """Unbiased standard deviation of the stored errors, a scalar in double precision."""
        return self.errors.double().std()

    def z_scores(self, errors: Tensor) -> Tensor:
        """z of errors (B,) -> (B,); among equal stored errors, 0 for an equal error, else infinity."""
        if len(self) <= 2:
            return torch.zeros_like(errors)
        distance = (errors.double() - self.mean).abs()
        return torch.where(distance == 0, 0.0, distance / self.stddev).to(errors.dtype)


def _resize_records(records: Records, state: dict[str, Tensor], prefix: str, *hook_args: object) -> None:
    """Load-state-dict pre-hook: room for the saved errors; torch refuses more than `capacity`."""
    saved = state.get(f"{prefix}errors", records.errors)
    if saved.dim() == 1 and len(saved) <= records.capacity:
        records.errors = records.errors.new_zeros(len(saved))
