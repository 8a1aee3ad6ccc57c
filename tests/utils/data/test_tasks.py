"""Tasks cover every class once; a batch depends on its key and on nothing else."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_folders import folder_images
from utils.data.image_sets import ArrayImages, Dataset
from utils.data.tasks import DataManager, TaskSplit
from utils.data.transforms import ViewSpec
from utils.errors import UserError
from utils.training.distributed import DistributedContext

CLASSES, TRAIN_EACH, TEST_EACH = 7, 6, 3


def make_dataset() -> Dataset:
    """Image i of class c: noise, (c, i, split) at the corner of its test view; classes stored interleaved."""

    def part(each: int, split: int) -> ArrayImages:
        labels = np.tile(np.arange(CLASSES), each)
        images = np.random.default_rng(split).integers(0, 256, (len(labels), 18, 18, 3), dtype=np.uint8)
        numbers = np.repeat(np.arange(each), CLASSES)
        images[:, 1, 1] = np.stack([labels, numbers, np.full(len(labels), split)], 1)
        return ArrayImages(images, labels)

    return Dataset("toy", [f"c{i}" for i in range(CLASSES)], part(TRAIN_EACH, 0), part(TEST_EACH, 1), "")


def manager(dataset: Dataset | None = None, **changed) -> DataManager:
    """Test views are not resized: 18 pixels are cut to 16."""
    split = dict(seed=1993, shuffle=True, init_cls=2, increment=2)
    views = dict(train_view=ViewSpec(8, "crop_flip"), test_view=ViewSpec(16, "none"))
    of_manager = ("num_workers", "distributed", "load_whole")
    split |= {key: value for key, value in changed.items() if key not in of_manager}
    others = {key: value for key, value in changed.items() if key not in split}
    return DataManager(dataset or make_dataset(), TaskSplit(**split), **views, **others)


def collect(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def corners(images: torch.Tensor) -> torch.Tensor:
    """What `make_dataset` wrote at the corner of test views: (class, image, split), int64 (n, 3)."""
    return (images[:, :, 0, 0] * 255).round().long()


def train_batches(data: DataManager, key=(1993, 0, 1), **more):
    return list(
        data.batches(range(4), **{"source": "train", "batch_size": 5, "key": key, "view": key} | more)
    )


def same(left, right) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# ------------------------------------------------------------------------------------------------------ tasks


def test_class_order_is_the_published_permutation():
    np.random.seed(1993)
    expected = np.random.permutation(CLASSES).tolist()
    data = manager()
    assert data.class_order == expected and data.class_names == [f"c{i}" for i in expected]
    assert manager(shuffle=False).class_order == list(range(CLASSES))
    assert manager(seed=1).class_order != expected


@pytest.mark.parametrize("init_cls", [1, 2, 3, 7])
@pytest.mark.parametrize("increment", [1, 2, 3, 7])
def test_tasks_cover_every_class_once(init_cls, increment):
    data = manager(init_cls=init_cls, increment=increment)
    sizes = [len(data.task_classes(task)) for task in range(data.nb_tasks)]
    assert sum([list(data.task_classes(task)) for task in range(data.nb_tasks)], []) == list(range(CLASSES))
    assert sizes[0] == init_cls and all(size == increment for size in sizes[1:-1]) and sizes[-1] >= 1
    cut, uncut = (manager(init_cls=init_cls, increment=increment, max_tasks=n) for n in (2, 99))
    assert uncut.nb_tasks == data.nb_tasks and cut.nb_tasks == min(2, data.nb_tasks)
    assert {each.nb_classes for each in (data, cut, uncut)} == {CLASSES}


def test_more_classes_than_there_are():
    with pytest.raises(UserError, match="init_cls = 8: 'toy' has 7 classes"):
        manager(init_cls=8)
    with pytest.raises(UserError, match="increment = 9"):
        manager(increment=9)


def test_targets_are_incremental_labels_of_the_right_images():
    data = manager()
    for task in range(data.nb_tasks):
        classes = data.task_classes(task)
        images, targets = collect(data.batches(classes, source="test", batch_size=4))
        assert images.dtype == torch.float32 and targets.dtype == torch.int64
        assert sorted(targets.tolist()) == sorted([*classes] * TEST_EACH)
        assert [data.class_order[t] for t in targets] == corners(images)[:, 0].tolist()
        assert (corners(images)[:, 2] == 1).all() and data.count(classes, "test") == len(targets)
        indices = data.indices(classes, "test")  # the stored order, in which numbers of images ascend
        assert torch.equal(data.targets(indices, "test"), targets)
        assert corners(images)[:, 1].tolist() == (indices // CLASSES).tolist() == sorted(indices // CLASSES)


# ---------------------------------------------------------------------------------------------------- content


def test_a_tasks_hash_is_of_its_own_images_and_labels():
    def hashes(**changed) -> list[str]:
        data = manager(dataset, shuffle=False, **changed)
        return [data.content_sha256(task, source) for task in range(4) for source in ("train", "test")]

    def changed() -> list[int]:
        return [place for place, (old, new) in enumerate(zip(before, hashes(), strict=True)) if old != new]

    dataset = make_dataset()
    before, few = hashes(), hashes(max_train_per_class=2)
    assert len(set(before)) == 8 and before == hashes() and before[1::2] == few[1::2]
    assert not set(before[::2]) & set(few)
    dataset.train.images[np.flatnonzero(dataset.train.labels == 5)[0], 0, 0, 0] ^= 1  # class 5 is of task 2
    assert changed() == [4]
    dataset = make_dataset()
    dataset.test.labels[[0, 1]] = 1, 0  # two classes of task 0
    assert changed() == [1]


def test_the_log_says_how_many_images_there_are():
    dataset = make_dataset()
    dataset.train.labels[0] = 1
    dataset = Dataset("toy", dataset.class_names, dataset.train, dataset.test, "", "2 hidden (.DS_Store)")
    told = manager(dataset, shuffle=False).describe()
    assert "7 classes" in told and "train 42 images, 5 to 7 per class" in told and "2 hidden" in told
    assert "test 21 images, 3 per class" in told
    assert "train 4 images, 2 per class" in manager(max_tasks=1, max_train_per_class=2).describe()


# ------------------------------------------------------------------------------------------------- small runs


def test_max_per_class_is_a_seeded_nested_subset_in_stored_order():
    def kept(**changed) -> list[tuple[int, int]]:
        data = manager(shuffle=False, **changed)
        images, _ = collect(data.batches(range(CLASSES), source="train", batch_size=50))
        return [(c, i) for c, i, _ in corners(images).tolist()]

    two, four = kept(max_train_per_class=2), kept(max_train_per_class=4)
    assert np.bincount([c for c, _ in two]).tolist() == [2] * CLASSES
    assert set(two) < set(four) and two == [pair for pair in kept() if pair in set(two)]
    assert two == kept(max_train_per_class=2) and two != kept(max_train_per_class=2, seed=7)
    assert [i for _, i in two] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 5, 5, 5, 5]
    assert len(kept(max_train_per_class=99, max_test_per_class=1)) == CLASSES * TRAIN_EACH
    assert manager(max_train_per_class=5, max_test_per_class=1).count(range(CLASSES), "test") == CLASSES


# ------------------------------------------------------------------------------------------------ determinism


def test_start_gives_the_tail_and_reads_nothing_else():
    class Counted(ArrayImages):
        def batch(self, indices):
            read.extend(indices)
            return super().batch(indices)

    dataset, read = make_dataset(), []
    train = Counted(dataset.train.images, dataset.train.labels)
    data = manager(Dataset("toy", dataset.class_names, train, dataset.test, ""))
    whole, order = train_batches(data), data.order(range(4), "train", (1993, 0, 1)).tolist()
    assert [len(targets) for _, targets in whole] == [5, 5, 5, 5, 4]
    for start in range(6):
        read.clear()
        assert same(train_batches(data, start=start), whole[start:]) and read == order[5 * start :]
    for start in (-1, 99):
        with pytest.raises(ValueError):
            train_batches(data, start=start)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_states_are_neither_read_nor_changed(workers):
    data = manager(num_workers=workers)
    expected = train_batches(data)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(train_batches(data), expected)
    list(data.batches(range(4), source="test", batch_size=5))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


@pytest.mark.parametrize("batch_size", [1, 5, 7, 24])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_depends_on_its_key_and_image_alone(batch_size, workers):
    data, view = manager(), (4, 1)
    indices = data.indices(range(4), "train")
    expected = dict(zip(indices.tolist(), data.views(indices, "train", view), strict=True))
    other = manager(num_workers=workers, max_train_per_class=5)
    key = (1, batch_size)
    images, targets = collect(
        other.batches(range(2, 4), source="train", batch_size=batch_size, key=key, view=view)
    )
    order = other.order(range(2, 4), "train", key)
    assert len(order) == 10 and torch.equal(targets, other.targets(order, "train"))
    assert torch.equal(images, torch.stack([expected[index] for index in order.tolist()]))


@pytest.mark.parametrize("view", [None, (1,), (2,)], ids=["test view", "view of the order's key", "view"])
def test_the_key_of_the_order_and_that_of_the_views_are_apart(view):
    data = manager()
    (stored,) = train_batches(data, batch_size=50, key=None, view=view)
    mixed, other = (train_batches(data, batch_size=50, key=key, view=view)[0] for key in ((1,), (1, 0)))
    order = np.argsort(data.order(range(4), "train", (1,)))
    assert torch.equal(mixed[0][order], stored[0]) and torch.equal(mixed[1][order], stored[1])
    assert not torch.equal(stored[1], mixed[1]) and not torch.equal(other[1], mixed[1])


# ------------------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_shares_of_all_ranks_make_the_batches_of_one_process(world, workers):
    whole = train_batches(manager())
    ranks = [
        train_batches(manager(distributed=DistributedContext(rank, world), num_workers=workers))
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for (images, targets), *parts in zip(whole, *ranks, strict=True):
        seen, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        assert torch.equal(seen, images) and torch.equal(labels, targets)
        sizes = [len(part) for _, part in parts]
        assert max(sizes) - min(sizes) <= 1 and all(len(a) == len(b) for a, b in parts)
    if world == 7:
        empty = [images for images, _ in ranks[0] if not len(images)]
        assert empty and empty[0].shape == (0, 3, 8, 8) and empty[0].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_different_sizes_get_the_views_that_each_gets_alone(tmp_path, workers):
    """Files in class 0, and the same in class 1."""
    rng, paths = np.random.default_rng(0), []
    for height, width in [(20, 30), (31, 12), (20, 30), (9, 9), (40, 20)]:
        paths.append(tmp_path / f"{len(paths)}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    images = folder_images(paths * 2, np.repeat([0, 1], len(paths)))
    dataset = Dataset("files", ["a", "b"], images, images, "")
    data = manager(dataset, init_cls=1, increment=1, num_workers=workers)
    for view in ((7,), None):
        alone = torch.cat([data.views(np.array([i]), "train", view) for i in range(10)])
        images, _ = collect(data.batches(range(2), source="train", batch_size=4, view=view))
        assert torch.equal(images, alone[data.indices(range(2), "train")])
        assert torch.equal(data.views(np.array([0, 2]), "train", view), alone[[0, 2]])  # of one size
        assert data.views(np.arange(0), "train", view).shape[:2] == (0, 3)  # as of an empty shard


# ------------------------------------------------------------------------------------------------- validation


def positions(data: DataManager, source: str) -> dict[str, list[int]]:
    """Class -> stored positions of its images of a source."""
    classes = range(data.nb_classes)
    return {data.class_names[c]: data.indices(range(c, c + 1), source).tolist() for c in classes}


def test_validation_images_are_held_out_of_training_the_same_for_every_run():
    data = manager(validation_share=0.3)  # of six: two
    held, rest, every = positions(data, "validation"), positions(data, "train"), positions(manager(), "train")
    assert data.sources == ("train", "validation") and manager().sources == ("train", "test")
    for name, own in every.items():
        assert len(held[name]) == 2 and sorted(held[name] + rest[name]) == own
    for changed in ({"seed": 2}, {"max_train_per_class": 2}, {"shuffle": False}, {"init_cls": 3}):
        other = manager(validation_share=0.3, **changed)
        assert positions(other, "validation") == held
        assert all(set(own) <= set(rest[name]) for name, own in positions(other, "train").items())
    fewer = positions(manager(validation_share=0.3, max_test_per_class=1), "validation")
    assert all(len(own) == 1 and set(own) < set(held[name]) for name, own in fewer.items())
    assert {len(own) for own in positions(manager(validation_share=0.01), "validation").values()} == {1}
    assert not any(positions(manager(), "validation").values())
    assert len({own[0] // CLASSES for own in held.values()}) > 1  # each class is drawn for itself


def test_validation_views_and_hashes_are_of_the_training_images():
    data, dataset = manager(validation_share=0.3), make_dataset()
    images, targets = collect(data.batches(range(4), source="validation", batch_size=5))
    assert (corners(images)[:, 2] == 0).all() and len(targets) == 8
    dataset.train.images[data.indices(data.task_classes(0), "validation")[0], 0, 0, 0] ^= 1
    changed = manager(dataset, validation_share=0.3)
    assert changed.content_sha256(0, "validation") != data.content_sha256(0, "validation")
    assert changed.content_sha256(0, "train") == data.content_sha256(0, "train")


def test_test_images_are_loaded_once_and_only_when_asked_for():
    whole, calls = make_dataset(), []
    part = Dataset("toy", whole.class_names, whole.train, None, "of train")

    data = manager(part, validation_share=0.3, load_whole=lambda: calls.append(1) or whole)
    assert "validation 14 images, 2 per class" in data.describe() and "not read" in data.describe()
    assert data.data_sha256("validation") == "of train" and not calls
    assert data.count(range(7), "test") == 7 * TEST_EACH and data.count(range(7), "test") and calls == [1]
    assert data.data_sha256("validation") == "of train" and data.data_sha256("test") == whole.sha256


def test_a_class_of_one_training_image_cannot_hold_one_out():
    dataset = make_dataset()
    kept = np.flatnonzero((dataset.train.labels != 3) | (np.arange(len(dataset.train)) < CLASSES))
    train = ArrayImages(dataset.train.images[kept], dataset.train.labels[kept])
    few = Dataset("toy", dataset.class_names, train, dataset.test, "")
    manager(few)
    with pytest.raises(UserError, match="one training image of c3, and two are needed"):
        manager(few, validation_share=0.1)
