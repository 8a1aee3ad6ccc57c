"""The network for 8x8 grids: encoder, bottleneck h, sparse autoencoder z, decoder, and a primitive head.

    model = GridModel(config, operations=56)
    output = model(grids, program)              # (B, 8, 8), (B, S) -> `GridOutput`
    model.insert_adapters()                     # at the bottleneck; everything else is frozen
    model.remove_adapters()

The encoder reads the program's operations and the grid's patches as one sequence; the tokens of the patches
make h, which is normalised so that neither a subspace nor a sparse code can profit from its size. The decoder
reads h alone. A new encoder is a layer, a line in `LAYERS`, and its name among the choices in `config.py`.

Sources: sparse autoencoder, Bricken et al., *Towards Monosemanticity*, 2023; LoRA, Hu et al., ICLR 2022;
bottleneck adapters, Houlsby et al., ICML 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.lora import LowRank
from backbone.sema_components import Adapter
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.primitives import SIDE

# --- encoders and decoders ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Encoder (B, N, width) -> (B, N, width): layers of one kind (a key of `LAYERS`), and a final norm."""

    def __init__(self, kind: str, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind](width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The normalised tokens, and the tokens after each layer."""
        states = []
        for layer in self.layers:
            tokens = layer(tokens)
            states.append(tokens)
        return self.norm(tokens), states


def transformer_layer(width: int, heads: int) -> nn.Module:
    """A pre-norm layer of a transformer."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.TransformerEncoderLayer(width, heads, 4 * width, **options)


class GRULayer(nn.Module):
    """Bidirectional gated recurrent units, width / 2 in each direction; `heads` has no effect."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.units = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.units(tokens)[0]


def deconvolution_decoder(width: int, colours: int) -> nn.Module:
    """Features (B, 8 width) as 2x2 cells, doubled twice by transposed convolutions: (B, C, 8, 8)."""
    return nn.Sequential(
        nn.GELU(),
        nn.Unflatten(1, (2 * width, 2, 2)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(width, colours, 1),
    )


def mlp_decoder(width: int, colours: int) -> nn.Module:
    """Features (B, 8 width) through one linear layer to all cells: (B, C, 8, 8)."""
    cells = nn.Linear(8 * width, colours * SIDE * SIDE)
    return nn.Sequential(nn.GELU(), cells, nn.Unflatten(1, (colours, SIDE, SIDE)))


Build = Callable[[int, int], nn.Module]
LAYERS: dict[str, Build] = {"transformer": transformer_layer, "gru": GRULayer}  # of width and heads
DECODERS: dict[str, Build] = {"deconvolution": deconvolution_decoder, "mlp": mlp_decoder}

# --- parts at the bottleneck --------------------------------------------------------------------------------


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder of h (B, d) with latents z (B, k) and reconstruction h'.

        z = relu(W_e (h - b) + c),   h' = D z + b,   the columns of D of length one

    Columns of length one keep the L1 of z from being lowered by a larger D. The weight of that L1 is a
    buffer, moved by `update_l1_weight` until the fraction of active units, z > 0, is the target.
    """

    RATE = 0.05  # of `update_l1_weight`
    BOUNDS = (1e-5, 1e2)  # of the weight

    def __init__(self, width: int, units: int, target: float) -> None:
        super().__init__()
        self.target = target
        self.encoder = nn.Linear(width, units)
        self.dictionary = nn.Parameter(torch.randn(width, units))
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.encoder.weight.copy_(F.normalize(self.dictionary, dim=0).T)
            self.encoder.bias.zero_()
        self.register_buffer("l1_weight", torch.tensor(1e-2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z and reconstruction h': (B, d) -> (B, k), (B, d)."""
        latents = F.relu(self.encoder(hidden - self.bias))
        return latents, F.linear(latents, F.normalize(self.dictionary, dim=0), self.bias)

    @torch.no_grad()
    def update_l1_weight(self, active_fraction: float) -> None:
        """Step the weight: w <- w exp(RATE clip(active_fraction / target - 1, -1, 1)), within `BOUNDS`."""
        excess = min(1.0, max(-1.0, active_fraction / self.target - 1))
        self.l1_weight.mul_(torch.tensor(self.RATE * excess).exp()).clamp_(*self.BOUNDS)


class LoRALinear(nn.Module):
    """LoRA: y = W x + b + B A x with W and b frozen, A (r, d_in) and B (d_out, r); B = 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.low_rank = LowRank(linear.weight, 1, rank, linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.low_rank(x)


class AdapterLinear(nn.Module):
    """Adapter: y = u + A(u), u = W x + b frozen, A a bottleneck of r hidden units; A = 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.adapter = Adapter(linear.out_features, rank).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.adapter(y)


FEW_SHOT_ADAPTERS: dict[str, type[nn.Module]] = {"lora": LoRALinear, "adapter": AdapterLinear}

# --- the network --------------------------------------------------------------------------------------------


class GridOutput(NamedTuple):
    """The network's output for a batch."""

    logits: Tensor  # (B, C, 8, 8), of the target's colours
    hidden: Tensor  # (B, d)
    primitive_logits: Tensor  # (B, P)
    latents: Tensor | None  # (B, k) of the sparse autoencoder, None without one
    reconstruction: Tensor | None  # (B, d) of hidden
    layers: list[Tensor]  # the patches' tokens in a row after each layer of the encoder, (B, N width) each

    def representations(self) -> dict[str, Tensor]:
        """Every layer's vectors (B, ...) by name: "layer 1", ..., "h", and "z" with an autoencoder."""
        found = {f"layer {number}": vectors for number, vectors in enumerate(self.layers, start=1)}
        found["h"] = self.hidden
        return found if self.latents is None else found | {"z": self.latents}


class GridModel(nn.Module):
    """Encoder, bottleneck, sparse autoencoder, decoder and primitive head, for `operations` operations."""

    def __init__(self, config: SharedSubspaceConfig, operations: int) -> None:
        super().__init__()
        self.colours, self.slots = config.colours, config.slots
        self.adapter, self.adapter_rank = FEW_SHOT_ADAPTERS[config.few_shot_method], config.few_shot_rank
        width, hidden = config.width, config.hidden
        patches = (SIDE // config.patch) ** 2
        self.patches = nn.Conv2d(self.colours, width, config.patch, stride=config.patch)
        self.operations = nn.Embedding(operations + 1, width)  # 0: an empty slot
        self.positions = nn.Parameter(0.02 * torch.randn(self.slots + patches, width))
        self.encoder = Encoder(config.encoder, width, config.depth, config.heads)
        self.decoder = DECODERS[config.decoder](width, self.colours)
        down, up = nn.Linear(patches * width, hidden), nn.Linear(hidden, 8 * width)
        self.bottleneck = nn.ModuleDict({"down": down, "up": up})
        self.primitive_head = nn.Linear(hidden, len(config.primitives))
        units = config.sparse_units
        self.autoencoder = SparseAutoencoder(hidden, units, config.sparse_activity) if units else None
        self.register_load_state_dict_pre_hook(_insert_loaded_adapters)

    def forward(self, grids: Tensor, program: Tensor) -> GridOutput:
        """Integer grids (B, 8, 8) and int64 programs (B, S). h has mean 0 and variance 1 over its numbers."""
        cells = F.one_hot(grids.long(), self.colours).permute(0, 3, 1, 2)  # (B, C, 8, 8)
        patches = self.patches(cells.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # (B, N, width)
        tokens = torch.cat([self.operations(program), patches], dim=1) + self.positions  # (B, S + N, width)
        encoded, states = self.encoder(tokens)
        of_patches = (state[:, self.slots :].flatten(1) for state in (encoded, *states))
        patches, *layers = of_patches  # (B, N width) each
        hidden = self.bottleneck["down"](patches)
        hidden = F.layer_norm(hidden, hidden.shape[1:])
        latents, reconstruction = (None, None) if self.autoencoder is None else self.autoencoder(hidden)
        logits = self.decoder(self.bottleneck["up"](hidden))
        return GridOutput(logits, hidden, self.primitive_head(hidden), latents, reconstruction, layers)

    # --- adapters -------------------------------------------------------------------------------------------

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are inserted."""
        return not isinstance(self.bottleneck["down"], nn.Linear)

    def insert_adapters(self) -> None:
        """Put adapters on both linear layers of the bottleneck; freeze the rest."""
        self.requires_grad_(False)
        for name, linear in list(self.bottleneck.items()):
            self.bottleneck[name] = self.adapter(linear, self.adapter_rank)

    def remove_adapters(self) -> None:
        """Restore the model as it was before `insert_adapters`; everything is trainable again."""
        for name, adapted in list(self.bottleneck.items()):
            self.bottleneck[name] = adapted.linear
        self.requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters by part."""
        counts = dict.fromkeys(("encoder", "bottleneck", "decoder", "primitive_head", "autoencoder"), 0)
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            counts[part if part in counts else "encoder"] += parameter.numel()
        return counts


def _insert_loaded_adapters(model: GridModel, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: insert adapters where the tensors were saved with them."""
    if f"{prefix}bottleneck.down.linear.weight" in state and not model.is_adapted:
        model.insert_adapters()
