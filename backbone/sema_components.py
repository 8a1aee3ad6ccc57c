"""The parts a SEMA block is made of: adapters, the representation descriptor and its running statistics.

    adapter = ADAPTERS["nested_lora"](width=768, bottleneck=16, scale=1.0)
    delta = adapter(tokens)                      # (B, N, d) -> (B, N, d)

An adapter owns its parameters and says which time scale each belongs to (`parameter_groups`). Consolidation and
reset of the nested adapter are in `backbone/consolidation.py`.

Sources: SEMA (Wang et al., CVPR 2025), AdaptFormer (Chen et al., NeurIPS 2022), LoRA (Hu et al., ICLR 2022).
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """No activation."""
    return x


class Factors(NamedTuple):
    """An adapter as one bottleneck  x -> up phi(down x + down_bias) + up_bias  of R hidden units, scale folded in.

    Shapes: down (R, d), down_bias (R,), up (d, R), up_bias (d,). An adapter without biases has None for both. phi is
    the activation.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    activation: Activation

    def apply(self, x: Tensor) -> Tensor:
        """The function itself, (..., d) -> (..., d)."""
        return F.linear(self.activation(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


class Adapter(nn.Module):
    """Bottleneck adapter  A(x) = s (W_up relu(W_down x + b_down) + b_up).

    W_down is (r, d) and W_up is (d, r); x is (..., d). At the LoRA start W_down is Kaiming-uniform(a = sqrt 5) and
    everything else zero, so the output is exactly zero and W_up has a gradient.

    Args:
        width: d, the width of the residual stream.
        bottleneck: r, the number of hidden units.
        scale: s; the published SEMA code names 0.1 in its configs and applies 1.
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
        """Return to the LoRA start: the output is exactly zero and the adapter can learn."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def factors(self) -> Factors:
        """The same function as one bottleneck of r units, for mixtures that stack their adapters."""
        down, up = self.down_proj, self.up_proj
        return Factors(
            down.weight,
            down.bias,
            scaled(self.scale, up.weight),
            scaled(self.scale, up.bias),
            self.activation,
        )

    @torch.no_grad()
    def effect(self) -> float:
        """||W_up W_down||_F, the size of the linear map that the hidden units gate; through r x r products only."""
        up, down = self.up_proj.weight.double(), self.down_proj.weight.double()
        return abs(self.scale) * math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One time scale."""
        return {"adapter": list(self.parameters())}


class LoRAAdapter(Adapter):
    """Plain low-rank adapter  A(x) = s W_up W_down x: no activation, no biases (LoRA, Hu et al. 2022, beside the MLP).

    A linear map: sums and means of such adapters are those of their matrices W_up W_down.
    """

    biased = False
    activation = staticmethod(identity)


class NestedLoRAAdapter(nn.Module):
    """Two adapters on two time scales  Delta(x) = slow(x) + fast(x), always both, no gate between them.

    Computed as one adapter of bottleneck 2r on the stacked weights: two matrix products instead of four.
    Rank r costs the parameters of one `Adapter` with bottleneck 2r plus one output bias of d numbers. Both branches
    start silent (LoRA start) but with different down-projections. `Branch` is the class of both.

    Args:
        width: d, the width of the residual stream.
        bottleneck: r, the rank of each branch (`nested_lora_rank`).
        scale: applied to both branches.
    """

    Branch: ClassVar[type[Adapter]] = Adapter

    def __init__(self, width: int, bottleneck: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.slow = self.Branch(width, bottleneck, scale)
        self.fast = self.Branch(width, bottleneck, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.factors().apply(x)

    def factors(self) -> Factors:
        """Both branches as one bottleneck of 2r units: those of slow first."""
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
        """Start fast on slow's hidden units: the same down-projection, no output. Units i of both belong together."""
        self.fast.reset()
        self.fast.down_proj.load_state_dict(self.slow.down_proj.state_dict())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The two time scales, each tensor in exactly one."""
        return {"slow": list(self.slow.parameters()), "fast": list(self.fast.parameters())}

    def norms(self) -> dict[str, float]:
        """Sizes of the branches: "fast", "slow" = ||theta||, "fast_effect", "slow_effect" = ||W_up W_down||_F.

        theta holds the random down-projection, so ||theta|| hardly moves; the product is zero for a silent branch.
        """
        norms = {name: l2_norm(params) for name, params in self.parameter_groups().items()}
        return norms | {f"{name}_effect": branch.effect() for name, branch in self.named_children()}


class NestedLinearLoRAAdapter(NestedLoRAAdapter):
    """`NestedLoRAAdapter` of two plain low-rank branches: rank r has exactly the parameters of one of rank 2r."""

    Branch = LoRAAdapter


ADAPTERS: dict[str, type[nn.Module]] = {
    "adaptmlp": Adapter,
    "lora": LoRAAdapter,
    "nested_lora": NestedLoRAAdapter,
    "nested_lora_linear": NestedLinearLoRAAdapter,
}


class AE(nn.Module):
    """Representation descriptor (RD): a linear auto-encoder of token means.

    error(m) = mean_j (m - W_dec (W_enc m + b_enc) - b_dec)_j^2, one number a sample; m is (B, d), the result (B,).
    A small error says that the samples resemble those its adapter was trained on. Weights start Kaiming-uniform(a =
    sqrt 5), biases zero.
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
    """The last `capacity` reconstruction errors of one descriptor; mean and deviation for z-scores.

    The errors (n,), oldest first, are a buffer that grows to n = `capacity`: saved and resumed with the model.
    z = |error - mean| / std with the unbiased std, and zero while two errors or fewer are stored. Errors on what the
    descriptor has trained on are smaller than others and would make z of everything else too large: the learner pushes
    errors on views that are new to it.
    """

    errors: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("errors", torch.zeros(0))
        self.register_load_state_dict_pre_hook(_size_as_saved)

    def __len__(self) -> int:
        return len(self.errors)

    @torch.no_grad()
    def push(self, errors: Tensor) -> None:
        """Append errors (B,). As published, the batch that fills the buffer is cut to the room left."""
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
        """|error - mean| / std for errors (B,) -> (B,); zeros until more than two errors are stored.

        Where the stored errors are all alike (images repeated), an error like them has z = 0, any other infinite z.
        """
        if len(self) <= 2:
            return torch.zeros_like(errors)
        distance = (errors.double() - self.mean).abs()
        return torch.where(distance == 0, 0.0, distance / self.stddev).to(errors.dtype)


def _size_as_saved(
    records: Records,
    state: dict[str, Tensor],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    faults: list[str],
) -> None:
    """Before loading: as many places as errors were saved."""
    saved = state.get(f"{prefix}errors", records.errors)
    if saved.dim() == 1 and len(saved) <= records.capacity:
        records.errors = records.errors.new_zeros(len(saved))
    else:
        faults.append(
            f"{prefix}errors: shape {tuple(saved.shape)}, but at most {records.capacity} errors are kept"
        )


def scaled(scale: float, tensor: Tensor | None) -> Tensor | None:
    """The tensor times the scale; itself when that is 1 or there is none."""
    return tensor if scale == 1.0 or tensor is None else scale * tensor


def l2_norm(tensors: list[nn.Parameter]) -> float:
    """Euclidean norm of several tensors taken as one vector."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))
