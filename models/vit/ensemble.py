"""Ensemble of two heads in closed form, in which the more certain one counts more for each image.

head = EntropyEnsemble(384, [RanPACHead(192, seed=1, dim=500), RanPACHead(192, seed=1, dim=500)])
head.add(features, targets)      # (n, 384): the features of both, side by side
log_p = head(features)           # (B, C)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.vit import calibration
from models.vit.closed_form import ClosedFormHead


class EntropyEnsemble(ClosedFormHead):
    """Heads of equal width on equal parts of a feature vector, weighted by the entropy of what they say.

        p_h = softmax(scores_h / T_h),    a_h = exp(-H(p_h)) / sum_k exp(-H(p_k)),    H(p) = -sum_c p_c ln p_c
        score_c = ln sum_h a_h p_h(c)

    T_h is fitted at task ends (`models/vit/calibration.py`), here on images of the newest task alone, which
    the head scores as unseen ones: no image of an older task decides what is predicted.

    Args:
        width: length of a whole feature vector.
        heads: with `unseen_scores`, and in agreement about `unseen_rows`.
    """

    temperatures: Tensor  # (heads,)

    def __init__(self, width: int, heads: Sequence[ClosedFormHead]) -> None:
        super().__init__(width)
        self.heads = nn.ModuleList(heads)
        self.unseen = heads[0].unseen
        self.register_buffer("temperatures", torch.ones(len(heads), dtype=torch.float64))

    def parts(self, features: Tensor) -> tuple[Tensor, ...]:
        """The features of each head, (n, width) -> (n, d) each."""
        return features.chunk(len(self.heads), dim=1)

    def refit(self, features: Tensor, targets: Tensor) -> None:
        rows = self.unseen_rows(len(features), len(self.counts))
        for number, (head, part) in enumerate(zip(self.heads, self.parts(features), strict=True)):
            head.add(part, targets)
            scores = head.unseen_scores(part[rows], targets[rows])
            if scores is not None:
                fitted = calibration.fit(scores, targets[rows], head.unseen)
                self.temperatures[number] = fitted.temperature

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        """As in `ClosedFormHead`, head by head; returns their mean."""
        moves = zip(self.heads, self.parts(before), self.parts(after), strict=True)
        return sum(head.compensate_drift(*features) for head, *features in moves) / len(self.heads)

    def forward(self, features: Tensor) -> Tensor:
        pairs = zip(self.heads, self.parts(features), strict=True)
        return combined([head(part) for head, part in pairs], self.temperatures)

    def unseen_rows(self, images: int, classes: int) -> Tensor:
        return self.heads[0].unseen_rows(images, classes)

    def unseen_scores(self, features: Tensor, targets: Tensor) -> Tensor | None:
        pairs = zip(self.heads, self.parts(features), strict=True)
        scores = [head.unseen_scores(part, targets) for head, part in pairs]
        return None if any(each is None for each in scores) else combined(scores, self.temperatures)


def combined(scores: Sequence[Tensor], temperatures: Tensor) -> Tensor:
    """ln of the weighted probabilities of several heads' scores (B, C), as above: (B, C), float32."""
    log_p = (torch.stack(list(scores)).double() / temperatures[:, None, None]).log_softmax(dim=2)
    log_weights = (log_p.exp() * log_p).sum(dim=2, keepdim=True).log_softmax(dim=0)  # (heads, B, 1)
    return (log_weights + log_p).logsumexp(dim=0).float()
