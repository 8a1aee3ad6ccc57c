"""The classifier that grows with every task: what learns, and its state."""

import pytest
import torch

from utils.inc_net import IncrementalHead


def grown(*classes: int) -> IncrementalHead:
    head = IncrementalHead(6)
    for count in classes:
        head.grow(count)
    return head


def test_a_fresh_head_takes_the_saved_shape_from_names_and_shapes() -> None:
    head, fresh, features = grown(3, 1, 2), IncrementalHead(6), torch.randn(4, 6)
    fresh.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(fresh(features), head(features)) and fresh(features).shape == (4, 6)
    assert torch.equal(fresh.newest(features), head(features)[:, 4:])
    assert [id(p) for p in fresh.trainable()] == [id(p) for p in fresh.tasks[-1].parameters()]


def test_cosine_rows_are_scaled_cosines_and_the_scale_learns() -> None:
    head, features = IncrementalHead(6, kind="cosine"), torch.randn(4, 6)
    head.grow(2)
    head.grow(3)
    weight, scale = head.tasks[-1].weight, head.tasks[-1].scale
    assert scale.item() == 1 and scale.requires_grad and not head.tasks[0].scale.requires_grad
    with torch.no_grad():
        scale.fill_(2.5)
    by_hand = [
        [2.5 * float((f @ w).detach() / (f.norm() * w.detach().norm())) for w in weight] for f in features
    ]
    assert torch.allclose(head.newest(features), torch.tensor(by_hand), atol=1e-6)
    fresh = IncrementalHead(6, kind="cosine")
    fresh.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(fresh(features), head(features))


@pytest.mark.parametrize("name", ["tasks.0.weight", "tasks.1.bias", "tasks.3.weight", "foreign"])
def test_tensors_of_another_head_are_refused(name: str) -> None:
    state = grown(3, 1).state_dict()
    if state.pop(name, None) is None:
        state[name] = torch.zeros(2, 6)
    with pytest.raises(RuntimeError, match=name.split(".")[0]):
        IncrementalHead(6).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        IncrementalHead(5).load_state_dict(grown(3).state_dict())
