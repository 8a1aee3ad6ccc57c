"""Classifiers by the config key `head`."""

from torch import nn

from models.ranpac import RanPACHead
from models.vit.closed_form import ClosedFormHead, PrototypeHead
from models.vit.config import HeadKeys
from utils.inc_net import IncrementalHead


def build_heads(config: HeadKeys, width: int) -> dict[str, nn.Module]:
    """Classifier rows that training needs, and the head in closed form that classifies unless `head` is "fc".

    Returns:
        "head" and, but for "fc", "closed_form".
    """
    heads: dict[str, nn.Module] = {"head": IncrementalHead(width)}
    closed_form: ClosedFormHead | None = {
        "fc": lambda: None,
        "cosine": lambda: PrototypeHead(width),
        "ranpac": lambda: RanPACHead(width, config.seed, config.ranpac_dim),
    }[config.head]()
    return heads if closed_form is None else heads | {"closed_form": closed_form}
