"""A network for 8x8 grids: encoder, bottleneck h, sparse autoencoder z, decoder, and a head that names primitives.

    model = GridModel(GridShape(colours=5, steps=56, slots=3, primitives=14), encoder="transformer")
    output = model(grids, program)        # (B, 8, 8), (B, S) -> logits (B, C, 8, 8), h (B, 128), z (B, k), ...
    model.insert("lora", rank=4)          # next to the bottleneck; everything else is frozen
    model.remove_adapters()

The encoder reads the program's steps and the grid's patches as one sequence and gives a token for each; the tokens of
the patches make h, which is normalised so that neither a subspace nor a sparse code can profit from its size. The
decoder reads h alone. A new encoder is a subclass of `Encoder` and a line in `ENCODERS`.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.shared_subspace.adapters import ADAPTATIONS

SIDE = 8  # cells along an edge of a grid
TO_HIDDEN, FROM_HIDDEN = "to_hidden", "from_hidden"  # the linear layers on both sides of the bottleneck


class GridShape(NamedTuple):
    """Sizes that follow from the tasks: colours C, kinds of steps, slots S of a program, primitives P."""

    colours: int
    steps: int
    slots: int
    primitives: int


class GridOutput(NamedTuple):
    """What the network says of a batch.

    logits (B, C, 8, 8) of the target's colours; hidden (B, d); named (B, P), logits of the primitives; sparse (B, k),
    the code of hidden, and rebuilt (B, d), hidden as read off it: None without an autoencoder.
    """

    logits: Tensor
    hidden: Tensor
    named: Tensor
    sparse: Tensor | None
    rebuilt: Tensor | None


class Encoder(nn.Module):
    """Layers (B, N, d) -> (B, N, d), one after the other, and a norm."""

    def __init__(self, layers: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The tokens after each layer."""
        return list(accumulate(self.layers, lambda tokens, layer: layer(tokens), initial=tokens))[1:]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.states(tokens)[-1])


class TransformerEncoder(Encoder):
    """A pre-norm transformer."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        super().__init__(
            (nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(depth)), width
        )


class GRUEncoder(Encoder):
    """Gated recurrent units in both directions, d / 2 each. They have no heads."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__((GRULayer(width) for _ in range(depth)), width)


class GRULayer(nn.Module):
    """One layer of `GRUEncoder`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.units(tokens)[0]


class DeconvolutionDecoder(nn.Module):
    """Features (B, inputs) as 2x2 cells, doubled twice by transposed convolutions: (B, C, 8, 8)."""

    def __init__(self, width: int, colours: int) -> None:
        super().__init__()
        self.inputs = 2 * width * 4
        self.grow = nn.Sequential(
            nn.GELU(),
            nn.Unflatten(1, (2 * width, 2, 2)),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, colours, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.grow(features)


class MLPDecoder(nn.Module):
    """Features (B, inputs) through one hidden layer to all cells at once: (B, C, 8, 8)."""

    def __init__(self, width: int, colours: int) -> None:
        super().__init__()
        self.inputs = 8 * width
        self.cells = nn.Sequential(
            nn.GELU(), nn.Linear(self.inputs, colours * SIDE * SIDE), nn.Unflatten(1, (colours, SIDE, SIDE))
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.cells(features)


ENCODERS: dict[str, type[Encoder]] = {"transformer": TransformerEncoder, "gru": GRUEncoder}
DECODERS: dict[str, type[nn.Module]] = {"deconvolution": DeconvolutionDecoder, "mlp": MLPDecoder}


class SparseAutoencoder(nn.Module):
    """z = relu(W_e (h - b) + c),   h' = D z + b,   the columns of D of length one; h is (B, d), z (B, k).

    Columns of length one keep the L1 of z from being lowered by making D larger. The weight of that L1 is a buffer
    which `steer` moves until the share of active units is what is wanted.

    Args:
        width: d.
        units: k.
        target: wanted share of units that are active, z > 0, over units and samples.

    Source: Bricken et al., *Towards Monosemanticity*, 2023, for the autoencoder.
    """

    l1_weight: Tensor
    RATE = 0.05  # of `steer`
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
        """The code and what is rebuilt from it: (B, d) -> (B, k), (B, d)."""
        sparse = F.relu(self.encoder(hidden - self.bias))
        return sparse, F.linear(sparse, F.normalize(self.dictionary, dim=0), self.bias)

    @torch.no_grad()
    def steer(self, activity: float) -> None:
        """After a step: L1 weighs more where more units were active than wanted, less where fewer.

        weight <- weight exp(RATE clip(activity / target - 1, -1, 1)), within `BOUNDS`.
        """
        excess = min(1.0, max(-1.0, activity / self.target - 1))
        self.l1_weight.mul_(torch.tensor(self.RATE * excess).exp()).clamp_(*self.BOUNDS)


class GridModel(nn.Module):
    """Encoder, bottleneck, sparse autoencoder, decoder and primitive head.

    Args:
        shape: sizes that follow from the tasks.
        encoder: a key of `ENCODERS`.
        decoder: a key of `DECODERS`.
        width: d of the tokens; that of the decoder follows.
        depth: layers of the encoder.
        heads: of attention, where there is attention.
        patch: cells along an edge of a patch.
        hidden: width of the bottleneck h.
        units: k of the sparse autoencoder; 0: there is none.
        activity: wanted share of its active units.
    """

    def __init__(
        self,
        shape: GridShape,
        *,
        encoder: str = "transformer",
        decoder: str = "deconvolution",
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        patch: int = 2,
        hidden: int = 128,
        units: int = 512,
        activity: float = 0.05,
    ) -> None:
        super().__init__()
        self.shape = shape
        patches = (SIDE // patch) ** 2
        self.patches = nn.Conv2d(shape.colours, width, patch, stride=patch)
        self.steps = nn.Embedding(shape.steps + 1, width)  # 0: a slot at rest
        self.positions = nn.Parameter(0.02 * torch.randn(shape.slots + patches, width))
        self.encoder = ENCODERS[encoder](width, depth, heads)
        self.decoder = DECODERS[decoder](width, shape.colours)
        self.near = nn.ModuleDict(
            {
                TO_HIDDEN: nn.Linear(patches * width, hidden),
                FROM_HIDDEN: nn.Linear(hidden, self.decoder.inputs),
            }
        )
        self.names = nn.Linear(hidden, shape.primitives)
        self.autoencoder = SparseAutoencoder(hidden, units, activity) if units else None

    def forward(self, grids: Tensor, program: Tensor) -> GridOutput:
        """Grids (B, 8, 8) and programs (B, S), both int64."""
        hidden = self.encode(grids, program)
        sparse, rebuilt = (None, None) if self.autoencoder is None else self.autoencoder(hidden)
        return GridOutput(self.decode(hidden), hidden, self.names(hidden), sparse, rebuilt)

    def encode(self, grids: Tensor, program: Tensor) -> Tensor:
        """h, (B, d): of mean 0 and variance 1 over its d numbers."""
        return self._bottleneck(self.encoder(self._tokens(grids, program)))

    def layers(self, grids: Tensor, program: Tensor) -> dict[str, Tensor]:
        """What each layer makes of the samples, a vector (B, ...) each: its patches' tokens in a row; h; z, if any."""
        states = self.encoder.states(self._tokens(grids, program))
        found = {f"layer {i}": self._patches(state) for i, state in enumerate(states, start=1)}
        found["h"] = hidden = self._bottleneck(self.encoder.norm(states[-1]))
        if self.autoencoder is not None:
            found["z"] = self.autoencoder(hidden)[0]
        return found

    def _tokens(self, grids: Tensor, program: Tensor) -> Tensor:
        """What the encoder reads, (B, S + N, width)."""
        seen = (
            F.one_hot(grids, self.shape.colours).permute(0, 3, 1, 2).to(self.positions.dtype)
        )  # (B, C, 8, 8)
        patches = self.patches(seen).flatten(2).transpose(1, 2)  # (B, N, width)
        return torch.cat([self.steps(program), patches], dim=1) + self.positions

    def _patches(self, read: Tensor) -> Tensor:
        """The patches' tokens in a row, (B, S + N, width) -> (B, N width)."""
        return read[:, self.shape.slots :].flatten(1)

    def _bottleneck(self, read: Tensor) -> Tensor:
        hidden = self.near[TO_HIDDEN](self._patches(read))
        return F.layer_norm(hidden, hidden.shape[1:])

    def decode(self, hidden: Tensor) -> Tensor:
        """Logits of every cell's colour, (B, d) -> (B, C, 8, 8)."""
        return self.decoder(self.near[FROM_HIDDEN](hidden))

    # --- adapters -----------------------------------------------------------------------------------------------------

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are inserted."""
        return not isinstance(self.near[TO_HIDDEN], nn.Linear)

    def insert(self, kind: str, rank: int) -> None:
        """Put new, silent adapters on both linear layers at the bottleneck; only they learn from here on.

        Raises:
            RuntimeError: there are adapters already.
        """
        if self.is_adapted:
            raise RuntimeError("there are adapters at the bottleneck: remove them first")
        self.requires_grad_(False)
        for name, linear in list(self.near.items()):
            self.near[name] = ADAPTATIONS[kind](linear, rank)

    def remove_adapters(self) -> None:
        """Back to the model as it was before `insert`; everything learns again."""
        for name, adapted in list(self.near.items()):
            self.near[name] = adapted.linear
        self.requires_grad_(True)

    def adapters(self) -> list[nn.Parameter]:
        """The parameters of the inserted adapters."""
        return (
            [parameter for parameter in self.near.parameters() if parameter.requires_grad]
            if self.is_adapted
            else []
        )

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters by part, adapters apart."""
        parts = {
            "encoder": nn.ModuleList([self.patches, self.steps, self.encoder]),
            "bottleneck": self.near,
            "decoder": self.decoder,
            "names": self.names,
            "autoencoder": nn.ModuleList() if self.autoencoder is None else self.autoencoder,
        }
        counts = {
            name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()
        }
        counts["encoder"] += self.positions.numel()
        return counts
