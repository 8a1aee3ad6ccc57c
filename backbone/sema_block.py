"""The adapters of one transformer block: their mixture, growth, freezing and consolidation.

    modules = SEMAModules(AdapterSpec(width=768, kind="adaptmlp", bottleneck=16), growable=True)
    delta = modules(tokens)                                  # (B, N, d): router-weighted sum of the adapters
    if modules.novelty(tokens.mean(dim=1)) > threshold:
        modules.grow()                                       # one more adapter, descriptor and router row

Source: SEMA (Wang et al., CVPR 2025), as its published code computes it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.consolidation import Consolidation, ConsolidationReport, consolidate
from backbone.frozen_block import freeze, is_learning, joined_groups
from backbone.frozen_vit import AddedModule
from backbone.sema_components import ADAPTERS, AE, Activation, NestedLoRAAdapter, Records, common_factors


@dataclass(frozen=True)
class AdapterSpec:
    """Kind and sizes of the adapters and descriptors of a network.

    Attributes:
        width: d of the residual stream.
        kind: a key of `ADAPTERS`.
        bottleneck: hidden units ("adaptmlp"), rank ("lora"), or rank of each branch ("nested_lora...").
        scale: factor on every adapter's output.
        rd_dim: hidden units of the representation descriptor.
        buffer_size: capacity of the descriptor's error records.
        aligned: whether the fast branch starts on the hidden units of slow, as the rule "interpolate" needs.
        stacked: whether the adapters of a block are computed as one pair of matrix products.
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
    """One adapter (`functional`) and, in a growing block, its descriptor (`rd`) with its error records."""

    def __init__(self, spec: AdapterSpec, described: bool) -> None:
        super().__init__()
        self.functional = ADAPTERS[spec.kind](spec.width, spec.bottleneck, spec.scale)
        if spec.aligned:
            self.functional.align()
        self.rd = AE(spec.width, spec.rd_dim) if described else None
        self.rd_loss_record = Records(spec.buffer_size) if described else None

    def forward(self, x: Tensor) -> Tensor:
        return self.functional(x)


class Stack(NamedTuple):
    """Several adapters of a block as one bottleneck of R hidden units, each weighted as its adapter is.

    Shapes: down (R, d), down_bias (R,) or None, up (d, R), owners (R,), the adapter of each unit. An adapter
    with biases has one more unit, whose pre-activation is always 1 and which carries its output bias.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    owners: Tensor
    activation: Activation

    def to(self, dtype: torch.dtype) -> "Stack":
        bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return self._replace(down=self.down.to(dtype), down_bias=bias, up=self.up.to(dtype))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum_k w_k A_k(x) over its adapters, x (B, N, d), weights (B, K): they multiply the hidden units."""
        hidden = self.activation(F.linear(x, self.down, self.down_bias))  # (B, N, R)
        mixed = hidden * weights[:, None, self.owners].to(hidden.dtype)
        return F.linear(mixed, self.up)


class SEMAModules(AddedModule):
    """Mixture of the adapters of one block.

    For tokens x (B, N, d) with token mean m (B, d) and K adapters A_k:
        w = softmax(router(m))                 (B, K)
        out = sum_k w_k A_k(x)                 (B, N, d)
    A block outside the growing range holds one adapter, no router and no descriptor: out = A_0(x).
    K and the rows of the router are state: a fresh module takes them from the tensors it loads.
    """

    tasks_learned: Tensor  # (K,) int64: tasks that each adapter has learned in, the open one not counted
    new_router: nn.Linear | None  # the row of an adapter grown in this task, until it is frozen

    def __init__(self, spec: AdapterSpec, growable: bool) -> None:
        super().__init__()
        self.spec, self.growable = spec, growable
        self.adapters = nn.ModuleList([AdapterModule(spec, described=growable)])
        self.router = nn.Linear(spec.width, 1) if growable else None
        self.new_router = None
        self._tensors: list[list[nn.Parameter]] = []  # of each adapter's functional
        self._frozen: tuple[Any, list[Tensor], Stack | None] = (None, [], None)  # state, its tensors, stack
        self.register_buffer("tasks_learned", torch.zeros(1, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_take_saved_shape)

    # --- mixture --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, kept: int | None = None) -> Tensor:
        """The mixture for the first `kept` of the tokens x (B, N, d); by default for all."""
        if not self.is_mixed:
            return self.adapters[0](x[:, :kept])
        weights = self.mixing_weights(x.mean(dim=1)).to(x.dtype)
        mix = self.mix_stacked if self.spec.stacked else self.mix_one_by_one
        return mix(x[:, :kept], weights)

    @property
    def is_mixed(self) -> bool:
        """Whether the router's weights are needed; that of a single adapter is 1."""
        return self.growable and not (self.spec.stacked and len(self.adapters) == 1)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether all tokens are read, by the router or a hook; adapters read the first `kept` alone."""
        return self.is_mixed or bool(self._forward_pre_hooks)

    def mixing_weights(self, token_mean: Tensor) -> Tensor:
        """Softmax of the router's logits over the adapters, (B, d) -> (B, K)."""
        logits = self.router(token_mean)
        if self.new_router is not None:
            logits = torch.cat([logits, self.new_router(token_mean)], dim=1)
        return logits.softmax(dim=1)

    def mix_one_by_one(self, x: Tensor, weights: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """The reference: sum_k w_k A_k(x), one adapter at a time; x (B, N, d), weights (B, K)."""
        chosen = range(len(self.adapters)) if chosen is None else chosen
        return sum(weights[:, k, None, None] * self.adapters[k](x) for k in chosen)

    def mix_stacked(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same sum from one pair of matrix products over the hidden units of all adapters.

        Frozen and learning adapters have a pair each, so that no gradient is computed for frozen ones.
        Adapters without `common_factors` are mixed one by one.
        """
        if len(self._tensors) != len(self.adapters):  # no adapter's parameters are ever replaced
            self._tensors = [list(adapter.functional.parameters()) for adapter in self.adapters]
        tensors = self._tensors
        by_learning: dict[bool, list[int]] = {False: [], True: []}
        for k, own in enumerate(tensors):
            by_learning[any(tensor.requires_grad for tensor in own)].append(k)
        parts = []
        for learning, chosen in by_learning.items():
            if chosen:
                own = itertools.chain.from_iterable(tensors[k] for k in chosen)
                stack = self._stack(chosen, x) if learning else self._frozen_stack(chosen, x, list(own))
                parts.append(stack.mix(x, weights) if stack else self.mix_one_by_one(x, weights, chosen))
        return sum(parts)

    def _frozen_stack(self, chosen: list[int], x: Tensor, tensors: list[Tensor]) -> Stack | None:
        """`_stack` in the dtype of matrix products, cached until one of its tensors changes.

        The tensors are held with it, so that no other tensor can get the address of one of them.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._stack(chosen, x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        state = chosen, dtype, [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._frozen[0] != state:
            with torch.no_grad():
                stack = self._stack(chosen, x)
            self._frozen = state, tensors, stack and stack.to(dtype)
        return self._frozen[2]

    def _stack(self, chosen: list[int], x: Tensor) -> Stack | None:
        """The chosen adapters as one bottleneck for tokens x; None where they have no `common_factors`."""
        parts = common_factors([self.adapters[k].functional for k in chosen])
        if parts is None:
            return None
        downs, ups, down_bias = [part.down for part in parts], [part.up for part in parts], None
        owners = [k for k, down in zip(chosen, downs, strict=True) for _ in down]
        if parts[0].up_bias is not None:
            downs.append(x.new_zeros(len(parts), x.shape[-1]))
            down_bias = torch.cat([*(part.down_bias for part in parts), x.new_ones(len(parts))])
            unit = parts[0].activation(x.new_ones(()))  # 1 for ReLU
            ups.append(torch.stack([part.up_bias for part in parts], dim=1) / unit)
            owners += chosen
        up, owner = torch.cat(ups, dim=1), torch.tensor(owners, device=x.device)
        return Stack(torch.cat(downs), down_bias, up, owner, parts[0].activation)

    # --- representation descriptors -------------------------------------------------------------------------

    def descriptor_loss(self, token_mean: Tensor) -> Tensor:
        """Mean error of the newest adapter's descriptor on token means (B, d); zero once that is frozen."""
        newest = self.adapters[-1].rd
        return newest(token_mean).mean() if is_learning(newest) else token_mean.new_zeros(())

    @torch.no_grad()
    def observe(self, token_mean: Tensor) -> None:
        """Record the errors on token means (B, d) of every descriptor that is still learning: the newest."""
        for adapter in itertools.takewhile(lambda each: is_learning(each.rd), reversed(self.adapters)):
            adapter.rd_loss_record.push(adapter.rd(token_mean))

    @torch.no_grad()
    def novelty(self, token_mean: Tensor) -> float:
        """Novelty of a batch of token means (B, d): the smallest batch-mean z-score over adapters."""
        return min(float(a.rd_loss_record.z_scores(a.rd(token_mean)).mean()) for a in self.adapters)

    # --- growing and freezing -------------------------------------------------------------------------------

    def grow(self) -> AdapterModule:
        """Add one adapter with its descriptor and a router row of its own; older ones stay as they are."""
        device = self.router.weight.device
        self.adapters.append(AdapterModule(self.spec, described=True).to(device))
        self.new_router = nn.Linear(self.spec.width, 1).to(device)
        self.tasks_learned = torch.cat([self.tasks_learned, self.tasks_learned.new_zeros(1)])
        return self.adapters[-1]

    @property
    def added_for_task(self) -> bool:
        """Whether the newest adapter began to learn in the open task."""
        return not self.tasks_learned[-1]

    def freeze_functional(self, adapters: bool = True) -> None:
        """Freeze the adapters (unless `adapters` is False) and the router, with a new row merged into it."""
        if adapters:
            for adapter in self.adapters:
                freeze(adapter.functional)
        if self.new_router is not None:  # the same logits from one Linear
            merged = nn.Linear(self.spec.width, len(self.adapters)).to(self.router.weight.device)
            with torch.no_grad():
                merged.weight.copy_(torch.cat([self.router.weight, self.new_router.weight]))
                merged.bias.copy_(torch.cat([self.router.bias, self.new_router.bias]))
            self.router, self.new_router = merged, None
        if self.router is not None:
            freeze(self.router)

    def freeze_rd(self) -> None:
        """Freeze every descriptor and, with it, its records."""
        for adapter in self.adapters:
            if adapter.rd is not None:
                freeze(adapter.rd)

    def end_of_task_training(
        self,
        freeze_adapters: bool = True,
        consolidation: Consolidation | None = None,
        tokens: Tensor | None = None,
    ) -> dict[int, ConsolidationReport]:
        """Consolidate the adapters of the task, merge the router, freeze.

        Args:
            freeze_adapters: SEMA's rule; False (`nested_lora_freeze: "never"`) leaves all adapters learning.
            consolidation: how fast goes into slow; None for not at all.
            tokens: the block's inputs (N, d) on the task's last features; needed with `consolidation`.

        Returns:
            A report for each consolidated adapter, by index.
        """
        reports = {}
        if consolidation is not None:
            reports = self.consolidate_nested_lora(consolidation, tokens, every=not freeze_adapters)
        self.freeze_functional(adapters=freeze_adapters)
        self.freeze_rd()
        self.tasks_learned[self.adapters_of_task(every=not freeze_adapters)] += 1
        return reports

    def adapters_of_task(self, every: bool = False) -> list[int]:
        """Indices of adapters that learned in the open task: the newest if added in it; with `every` all."""
        newest = len(self.adapters) - 1
        return list(range(newest + 1)) if every else [newest] if self.added_for_task else []

    def consolidate_nested_lora(
        self, consolidation: Consolidation, tokens: Tensor, every: bool = False
    ) -> dict[int, ConsolidationReport]:
        """Fold fast into slow in the adapter added in this task, or in `every` one; reports by index."""
        return {
            k: consolidate(self.adapters[k].functional, tokens, consolidation, int(self.tasks_learned[k]))
            for k in self.adapters_of_task(every)
            if isinstance(self.adapters[k].functional, NestedLoRAAdapter)
        }

    # --- parameters -----------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Functional parameters by time scale: those of the adapters, and "other" of the routers."""
        groups = {"other": []} | joined_groups(adapter.functional for adapter in self.adapters)
        groups["other"] += self.router_parameters()
        return groups

    def router_parameters(self) -> list[nn.Parameter]:
        """Parameters of the router and of a row not merged yet."""
        routers = [router for router in (self.router, self.new_router) if router is not None]
        return [p for router in routers for p in router.parameters()]

    def descriptor_parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters if adapter.rd is not None for p in adapter.rd.parameters()]

    def is_learning(self) -> bool:
        """Whether any functional parameter learns now."""
        return any(p.requires_grad for parameters in self.parameter_groups().values() for p in parameters)


def _take_saved_shape(
    modules: SEMAModules, state: dict[str, Tensor], prefix: str, *hook_args: object
) -> None:
    """Load-state-dict pre-hook: as many adapters and router rows as were saved."""
    if not modules.growable:
        return
    spec, device = modules.spec, modules.router.weight.device
    while any(name.startswith(f"{prefix}adapters.{len(modules.adapters)}.") for name in state):
        modules.adapters.append(AdapterModule(spec, described=True).to(device))
    new_row = f"{prefix}new_router.weight" in state
    modules.router = nn.Linear(spec.width, len(modules.adapters) - new_row).to(device)
    modules.new_router = nn.Linear(spec.width, 1).to(device) if new_row else None
    modules.tasks_learned = torch.zeros(len(modules.adapters), dtype=torch.int64, device=device)
