"""The adapters of one transformer block, and how they mix, grow, freeze and consolidate.

    modules = SEMAModules(AdapterSpec(width=768, kind="adaptmlp", bottleneck=16), block=9, growable=True)
    delta = modules(tokens)                     # (B, N, d): router-weighted sum of the adapters, changes nothing
    if modules.novelty(tokens.mean(dim=1)) > threshold:
        modules.grow()                          # one more adapter, descriptor and router row

Source: SEMA (Wang et al., CVPR 2025), as its published code computes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.consolidation import Consolidation, ConsolidationReport, consolidate
from backbone.sema_components import ADAPTERS, AE, NestedLoRAAdapter, Records


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter of this network looks like: plain numbers only.

    Attributes:
        width: d of the residual stream.
        kind: a key of `ADAPTERS`.
        bottleneck: hidden units ("adaptmlp"), rank ("lora"), or rank of each branch ("nested_lora...").
        scale: factor on every adapter's output.
        rd_dim: hidden units of the representation descriptor.
        buffer_size: how many reconstruction errors its records keep.
        aligned: a nested adapter's fast branch starts on the hidden units of slow, as the rule "interpolate" needs.
        stacked: compute the adapters of a block as one matrix product pair; False computes one after the other.
    """

    width: int
    kind: str
    bottleneck: int
    scale: float = 1.0
    rd_dim: int = 128
    buffer_size: int = 500
    aligned: bool = False
    stacked: bool = True


class AdapterModule(nn.Module):
    """One adapter (`functional`) and, in a growing block, its descriptor (`rd`) with its running statistics."""

    def __init__(self, spec: AdapterSpec, described: bool) -> None:
        super().__init__()
        self.functional = ADAPTERS[spec.kind](spec.width, spec.bottleneck, spec.scale)
        if spec.aligned:
            self.functional.align()
        self.rd = AE(spec.width, spec.rd_dim) if described else None
        self.rd_loss_record = Records(spec.buffer_size) if described else None

    def forward(self, x: Tensor) -> Tensor:
        return self.functional(x)


class SEMAModules(nn.Module):
    """Mixture of the adapters of one block.

    For tokens x (B, N, d) with token mean m (B, d) and K adapters A_k:
        w = softmax(router(m))                 (B, K)
        out = sum_k w_k A_k(x)                 (B, N, d)
    A block outside the growing range holds one adapter, no router and no descriptor: out = A_0(x).

    Args:
        spec: what an adapter looks like.
        block: the block's index, for names in logs.
        growable: whether the block is in [adapt_start_layer, adapt_end_layer].
    """

    def __init__(self, spec: AdapterSpec, block: int, growable: bool) -> None:
        super().__init__()
        self.spec, self.block, self.growable = spec, block, growable
        self.adapters = nn.ModuleList([AdapterModule(spec, described=growable)])
        self.router = nn.Linear(spec.width, 1) if growable else None
        self.new_router: nn.Linear | None = (
            None  # the row of an adapter grown in this task, merged when it freezes
        )
        self.register_buffer("added_for_task", torch.tensor(True))  # the newest began to learn in this task
        self.register_load_state_dict_pre_hook(_grow_as_saved)

    def forward(self, x: Tensor) -> Tensor:
        if not self.growable:
            return self.adapters[0](x)
        weights = self.mixing_weights(x.mean(dim=1)).to(x.dtype)
        return self.mix_stacked(x, weights) if self.spec.stacked else self.mix_one_by_one(x, weights)

    def mix_one_by_one(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum_k w_k A_k(x), an adapter at a time: the reference. x (B, N, d), weights (B, K)."""
        return sum(weights[:, k, None, None] * adapter(x) for k, adapter in enumerate(self.adapters))

    def mix_stacked(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same sum from one pair of matrix products over the hidden units of all adapters.

        Where some are frozen and some learn, each of the two kinds has a pair of its own: no gradient is computed for
        what is frozen.
        """
        if len(self.adapters) == 1:  # its weight is 1
            return self.adapters[0](x)
        kinds = {True: [], False: []}
        for k, adapter in enumerate(self.adapters):
            kinds[is_learning(adapter.functional)].append(k)
        return sum(self._stack(x, weights, chosen) for chosen in kinds.values() if chosen)

    def _stack(self, x: Tensor, weights: Tensor, chosen: list[int]) -> Tensor:
        """sum_k w_k A_k(x) over the chosen k, with R hidden units in all.

        The weights multiply the hidden units, (B, 1, R + K), not the outputs; where adapters have biases, one unit more
        per adapter is always 1 and carries its output bias.
        """
        parts = [self.adapters[k].functional.factors() for k in chosen]
        downs, ups, down_bias = [part.down for part in parts], [part.up for part in parts], None
        owners = [
            k for k, down in zip(chosen, downs, strict=True) for _ in down
        ]  # whose weight a hidden unit takes
        if parts[0].up_bias is not None:
            downs.append(x.new_zeros(len(parts), x.shape[-1]))
            down_bias = torch.cat([*(part.down_bias for part in parts), x.new_ones(len(parts))])
            ups.append(torch.stack([part.up_bias for part in parts], dim=1))
            owners += chosen
        hidden = parts[0].activation(F.linear(x, torch.cat(downs), down_bias))  # (B, N, R + K)
        mixed = hidden * weights[:, None, torch.tensor(owners, device=x.device)].to(hidden.dtype)
        return F.linear(mixed, torch.cat(ups, dim=1))

    def mixing_weights(self, token_mean: Tensor) -> Tensor:
        """softmax over the adapters of the router's logits; (B, d) -> (B, K), rows sum to 1."""
        logits = self.router(token_mean)
        if self.new_router is not None:
            logits = torch.cat([logits, self.new_router(token_mean)], dim=1)
        return logits.softmax(dim=1)

    # --- representation descriptors -----------------------------------------------------------------------------------

    def descriptor_loss(self, token_mean: Tensor) -> Tensor:
        """Mean error of the newest adapter's descriptor on token means (B, d); zero once that is frozen."""
        newest = self.adapters[-1].rd
        return newest(token_mean).mean() if is_learning(newest) else token_mean.new_zeros(())

    @torch.no_grad()
    def observe(self, token_mean: Tensor) -> None:
        """Record the errors on token means (B, d) of every descriptor that is still learning."""
        for adapter in self.adapters:
            if is_learning(adapter.rd):
                adapter.rd_loss_record.push(adapter.rd(token_mean))

    @torch.no_grad()
    def novelty(self, token_mean: Tensor) -> float:
        """How new a batch of token means (B, d) looks: the smallest over adapters of the mean of their z-scores."""
        return min(float(a.rd_loss_record.z_scores(a.rd(token_mean)).mean()) for a in self.adapters)

    # --- growing and freezing -----------------------------------------------------------------------------------------

    def grow(self) -> AdapterModule:
        """Add one adapter with its descriptor and a router row of its own. The older ones stay as they are."""
        if not self.growable or self.new_router is not None:
            raise ValueError(
                f"block {self.block} cannot grow: it is outside the growing range or its last row is not merged"
            )
        like = self.router.weight
        module = AdapterModule(self.spec, described=True).to(like.device)
        self.adapters.append(module)
        self.new_router = nn.Linear(self.spec.width, 1).to(like.device)
        self.added_for_task.fill_(True)
        return module

    def freeze_functional(self, adapters: bool = True) -> None:
        """Stop the adapters (unless `adapters` is False) and the router; a new row becomes part of the router."""
        if adapters:
            for adapter in self.adapters:
                freeze(adapter.functional)
        if self.new_router is not None:
            self._merge_router()
        if self.router is not None:
            freeze(self.router)

    def freeze_rd(self) -> None:
        """Stop every descriptor and, with it, its records."""
        for adapter in self.adapters:
            if adapter.rd is not None:
                freeze(adapter.rd)

    def end_of_task_training(
        self,
        freeze_adapters: bool = True,
        consolidation: Consolidation | None = None,
        tokens: Tensor | None = None,
    ) -> dict[int, ConsolidationReport]:
        """Close a task: consolidate what learned in it, merge the router, freeze.

        Args:
            freeze_adapters: SEMA's rule; False (`nested_lora_freeze: "never"`) leaves all adapters learning.
            consolidation: None, or how fast goes into slow.
            tokens: the block's inputs (N, d) on the task's last features; needed with `consolidation`.

        Returns:
            A report for each adapter that was consolidated.
        """
        reports = {}
        if consolidation is not None:
            reports = self.consolidate_nested_lora(consolidation, tokens, every=not freeze_adapters)
        self.freeze_functional(adapters=freeze_adapters)
        self.freeze_rd()
        self.added_for_task.fill_(False)
        return reports

    def consolidate_nested_lora(
        self, consolidation: Consolidation, tokens: Tensor, every: bool = False
    ) -> dict[int, ConsolidationReport]:
        """Fold fast into slow in the adapter added in this task, or in `every` one; keyed by the adapter's index."""
        newest = len(self.adapters) - 1
        chosen = range(newest + 1) if every else [newest] if self.added_for_task else []
        return {
            k: consolidate(self.adapters[k].functional, tokens, consolidation)
            for k in chosen
            if isinstance(self.adapters[k].functional, NestedLoRAAdapter)
        }

    def _merge_router(self) -> None:
        """Append the new row to the router: the same logits from one Linear."""
        merged = nn.Linear(self.spec.width, len(self.adapters)).to(self.router.weight.device)
        with torch.no_grad():
            merged.weight.copy_(torch.cat([self.router.weight, self.new_router.weight]))
            merged.bias.copy_(torch.cat([self.router.bias, self.new_router.bias]))
        self.router, self.new_router = merged, None

    # --- ownership and structure --------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The functional side, by time scale: adapters as they say, routers in "other". Descriptors are not in it."""
        groups: dict[str, list[nn.Parameter]] = {"other": []}
        for adapter in self.adapters:
            for name, parameters in adapter.functional.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        groups["other"] += self.router_parameters()
        return groups

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters of the router and of a row not merged yet."""
        return [
            p for router in (self.router, self.new_router) if router is not None for p in router.parameters()
        ]

    def is_learning(self) -> bool:
        """Whether anything on the functional side learns now."""
        return any(p.requires_grad for parameters in self.parameter_groups().values() for p in parameters)

    def descriptor_parameters(self) -> list[nn.Parameter]:
        """The parameters of all descriptors."""
        return [p for adapter in self.adapters if adapter.rd is not None for p in adapter.rd.parameters()]

    def structure(self) -> dict[str, int | bool]:
        """What `rebuild` needs to give a fresh module the same shape (JSON)."""
        return {
            "adapters": len(self.adapters),
            "new_router": self.new_router is not None,
            "added_for_task": bool(self.added_for_task),
            "errors": [len(adapter.rd_loss_record or ()) for adapter in self.adapters],
        }

    def rebuild(self, structure: dict[str, int | bool]) -> None:
        """Grow a fresh module to a saved structure; its tensors are loaded afterwards."""
        while len(self.adapters) < structure["adapters"]:
            self.grow()
            last = len(self.adapters) == structure["adapters"]
            if not (last and structure["new_router"]):
                self._merge_router()
        self.added_for_task.fill_(structure["added_for_task"])
        for adapter, stored in zip(self.adapters, structure["errors"], strict=True):
            if adapter.rd_loss_record is not None:
                adapter.rd_loss_record.errors = torch.zeros(
                    stored, device=adapter.rd_loss_record.errors.device
                )


def _grow_as_saved(
    modules: SEMAModules,
    state: dict[str, Tensor],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    faults: list[str],
) -> None:
    """Before loading: the adapters and router rows that the tensors are of. torch refuses what does not fit then."""
    router = state.get(f"{prefix}router.weight")
    if not modules.growable or router is None:
        return
    spec, device = modules.spec, modules.router.weight.device
    while any(name.startswith(f"{prefix}adapters.{len(modules.adapters)}.") for name in state):
        modules.adapters.append(AdapterModule(spec, described=True).to(device))
    new_row = f"{prefix}new_router.weight" in state
    if len(router) + new_row != len(modules.adapters):
        faults.append(
            f"{prefix}router: {len(router)} + {int(new_row)} rows of {len(modules.adapters)} adapters"
        )
    modules.router = nn.Linear(spec.width, len(router)).to(device)
    modules.new_router = nn.Linear(spec.width, 1).to(device) if new_row else None


def freeze(module: nn.Module) -> None:
    """No parameter of the module learns from here on."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def is_learning(module: nn.Module) -> bool:
    """Whether the module's parameters receive gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())
