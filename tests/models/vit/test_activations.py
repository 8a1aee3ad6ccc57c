"""Test images and stores in full batches across classes; what did not change is not computed again."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backbone.frozen_vit import FrozenViT
from models.base import Learner
from tests.conftest import run_tasks
from utils.analysis import calibration
from utils.errors import Interrupted

Make = Callable[..., Learner]
Forwards = list[tuple[int, int, int]]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """(images, from depth, to depth) of every forward pass while the test runs."""
    seen: Forwards = []
    original = FrozenViT.forward

    def forward(self: FrozenViT, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        seen.append((len(x), start, self.depth if stop is None else stop))
        return original(self, x, start, stop)

    monkeypatch.setattr(FrozenViT, "forward", forward)
    return seen


def feature_files(learner: Learner) -> list[Path]:
    """Stored features, of whatever images."""
    return list(learner.cache.root.glob(f"*-{learner.network.depth}-*/*.safetensors"))


def test_images_of_several_classes_are_one_batch(make_sema: Make, forwards: Forwards) -> None:
    """Four tasks of two classes with 8 test images each, 20 images to a batch; every class has its file."""
    learner = make_sema(cache_views=1, adapter_blocks="growing", eval_batch_size=20)
    learner.begin_task(0)
    features = learner.inputs.seen_features(4, "test")
    assert forwards == 4 * [(16, 0, 4)] + 3 * [(20, 4, 6)] + [(4, 4, 6)]
    assert len(list(learner.cache.root.rglob("*.safetensors"))) == 8 and not feature_files(learner)
    of_tasks = torch.cat([learner.features_of(task, "test") for task in range(4)])
    torch.testing.assert_close(features, of_tasks)


def test_a_stop_before_the_first_file_leaves_no_group(make_sema: Make) -> None:
    """A group without tensors would be nobody's, and stay when the cache is emptied."""
    learner = make_sema(stop_requested=lambda: True, cache_views=1, adapter_blocks="growing")
    learner.begin_task(0)
    with pytest.raises(Interrupted):
        learner.inputs.seen_features(4, "test")
    assert not list(learner.cache.root.glob("*/*"))


def test_full_batches_are_kept_until_the_network_changes(make_sema: Make, forwards: Forwards) -> None:
    """A batch that was not full comes again, and all of them once an adapter is another."""
    learner = make_sema(cache_views=1, adapter_blocks="growing", eval_batch_size=20)
    learner.begin_task(0)
    for tasks, batches in ((2, [20, 12]), (3, [20, 8]), (3, [8]), (1, [16])):
        forwards.clear()
        kept = learner.inputs.seen_features(tasks, "test")
        assert [images for images, start, _ in forwards if start == 4] == batches
        assert torch.equal(kept, make_again(learner).seen_features(tasks, "test"))
    with torch.no_grad():
        next(learner.network.modules_by_block[4].adapters[0].functional.parameters()).add_(1)
    forwards.clear()
    changed = learner.inputs.seen_features(2, "test")
    assert [images for images, _, _ in forwards] == [20, 12]
    assert torch.equal(changed, make_again(learner).seen_features(2, "test"))


def test_features_in_old_subspaces_are_kept(make_sema: Make, forwards: Forwards) -> None:
    """Of two tasks of 16 test images the first has been through the first adapter already."""
    learner = make_sema(model_name="ease", cache_views=1, adapter_blocks="growing", eval_batch_size=16)
    for tasks, tails in ((1, 1), (2, 3)):
        run_tasks(learner, tasks)
        forwards.clear()
        features = learner.inputs.seen_features(tasks, "test")
        assert [images for images, start, _ in forwards if start == 4] == tails * [16]
    assert learner.network.feature_width == features.shape[1]
    assert torch.equal(features, make_again(learner).seen_features(2, "test"))


def make_again(learner: Learner) -> object:
    """Inputs of the same learner as a resumed run has them: nothing is kept."""
    del learner.inputs
    return learner.inputs


def test_evaluation_costs_as_many_batches_as_the_images_fill(make_sema: Make, forwards: Forwards) -> None:
    """After a growth all test images pass the growing blocks again, whichever tasks they belong to.

    Their features, which the next task drops, are not stored.
    """
    growing = {"cache_views": 1, "adapter_blocks": "growing", "expansion": "always", "rd_epoch": 1}
    learner = make_sema(**growing, eval_batch_size=32)
    for tasks in (1, 2, 3, 4):
        run_tasks(learner, tasks).evaluate()
        assert not [path for path in feature_files(learner) if path.parent.name.startswith("test")]
    assert learner.network.adapters_per_block() == {4: 4, 5: 4}
    forwards.clear()
    evaluation = learner.evaluate()
    assert forwards == []
    assert evaluation["total"] == 4 * [16] and sum(evaluation["class_correct"]) == sum(evaluation["correct"])
    with torch.no_grad():
        learner.network.modules_by_block[5].router.bias.add_(1)
    learner.evaluate()
    assert forwards == 2 * [(32, 4, 6)]


def test_files_are_used_though_there_is_no_room_for_more(make_sema: Make, forwards: Forwards) -> None:
    """Those of the first tasks are read, only images without a file are computed whenever they are needed."""
    settings = {"cache_views": 1, "adapter_blocks": "growing", "eval_batch_size": 64}
    learner = make_sema(**settings)
    learner.begin_task(0)
    first = learner.inputs.seen_features(2, "test")
    size = sum(path.stat().st_size for path in learner.cache.root.rglob("*.safetensors"))
    tight = make_sema(**settings, cache_gb=1.1 * size / 1e9)
    tight.begin_task(0)
    forwards.clear()
    features = tight.inputs.seen_features(4, "test")
    assert forwards == [(32, 0, 4), (64, 4, 6)]
    np.testing.assert_allclose(features[:32], first, rtol=1e-4, atol=1e-5)


def test_fewer_images_per_class_for_the_temperature_are_among_those_stored(
    make_sema: Make, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four classes ten images each, of six only six: no old image passes the frozen blocks again."""
    monkeypatch.setattr(calibration, "MAX_IMAGES", 40)
    learner = run_tasks(make_sema(cache_views=1, adapter_blocks="growing"), 2)
    assert learner.calibration.images == 40
    learner.begin_task(2)
    forwards.clear()
    learner.calibrate()
    assert sum(images for images, start, _ in forwards if start == 0) == 2 * 10
    assert sum(images for images, start, _ in forwards if start == 4) == learner.calibration.images == 36


def test_images_are_made_by_the_data_workers(make_sema: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is stored, as where every block learns; features are the same to the bit."""
    plain, helped = (make_sema(cache_gb=0, eval_batch_size=8, num_workers=workers) for workers in (0, 2))
    working = []
    features = type(helped.inputs).batch_features

    def batch_features(*arguments: object) -> torch.Tensor:
        working.append(len(multiprocessing.active_children()))
        return features(*arguments)

    monkeypatch.setattr(type(helped.inputs), "batch_features", batch_features)
    for learner in (plain, helped):
        learner.begin_task(0)
    assert torch.equal(plain.inputs.seen_features(2, "test"), helped.inputs.seen_features(2, "test"))
    assert working == [0, 0, 0, 0, 2, 2, 2, 2]


def test_a_file_that_a_killed_process_left_out_gets_the_same_bits(make_sema: Make) -> None:
    """One image of a class: products of one row and of eight are rounded differently."""
    settings = {"model_name": "simplecil", "max_test_per_class": 1, "init_cls": 8, "increment": 8}
    learner = make_sema(**settings)
    learner.begin_task(0)
    whole = learner.inputs.seen_features(1, "test")
    feature_files(learner)[0].unlink()
    again = make_sema(**settings)
    again.begin_task(0)
    assert torch.equal(again.inputs.seen_features(1, "test"), whole)
