"""Classifiers by the config key `head`."""

from torch import nn

from models.ranpac import RanPACHead
from models.vit.closed_form import ClosedFormHead, PrototypeHead
from models.vit.config import HeadKeys
from models.vit.gaussians import AlignedHead, FeCAMHead
from utils.inc_net import IncrementalHead


def build_heads(config: HeadKeys, width: int) -> dict[str, nn.Module]:
    """Classifier rows for training and, unless `head` is "fc", the closed-form head that classifies.

    Returns:
        "head" and, unless `head` is "fc", "closed_form".
    """
    rows = IncrementalHead(width)
    closed_form: ClosedFormHead | None = {
        "fc": lambda: None,
        "aligned": lambda: AlignedHead(
            width,
            rows,
            seed=config.seed,
            samples=config.ca_samples,
            epochs=config.ca_epochs,
            lr=config.ca_lr,
            restart=config.ca_restart,
        ),
        "cosine": lambda: PrototypeHead(width),
        "fecam": lambda: FeCAMHead(width, config.alpha1, config.alpha2),
        "ranpac": lambda: RanPACHead(width, config.seed, config.ranpac_dim),
    }[config.head]()
    return {"head": rows} if closed_form is None else {"head": rows, "closed_form": closed_form}
