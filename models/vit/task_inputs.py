"""Batches and features of the tasks' images, from cached activations or recomputed.

    inputs = TaskInputs(store, config, shared_views=lambda: 0)
    source = inputs.view(task, 0)                    # one augmented view of the task's training images
    for batch in inputs.read(task, source, key, size=32):
        features = network(batch.inputs, batch.depth)

The fast engine reads stored activations of the frozen blocks (`models/vit/activations.py`); the reference
engine reads images. With `cache_views` K > 0 every training image has K fixed augmented views. With 0 it has
a new one for every (task, epoch), the same in all phases of a task. On a CPU, where writing a view's
activations takes about a hundredth of the time of computing them, those that several phases read are stored
until the end of the task; elsewhere each phase computes them.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.vit.activations import Activations, ActivationStore, Images
from models.vit.config import ClassIncrementalConfig
from utils.console import progress
from utils.training.device import autocast, one_ahead, sha256_of
from utils.training.random import Key

Source = Images | Activations


class Batch(NamedTuple):
    """This rank's shard of a batch: inputs at one depth (0: images) with incremental labels.

    `total` is the number of samples over all ranks.
    """

    inputs: Tensor
    targets: Tensor
    depth: int
    total: int

    def micro_batches(self, count: int) -> "list[Batch]":
        """Split into `count` parts of nearly equal size, without empty ones."""
        pairs = zip(self.inputs.tensor_split(count), self.targets.tensor_split(count), strict=True)
        return [self._replace(inputs=inputs, targets=targets) for inputs, targets in pairs if len(targets)]


class TaskInputs:
    """Inputs of the tasks of one run.

    Args:
        store: activations of the run's network on its task sequence.
        config: read are its `engine`, `cache_views` and `seed`.
        shared_views: returns how many of the open task's first drawn views several phases read; the number
            must depend on the run's state alone, so that a resumed run computes the same.
    """

    def __init__(
        self, store: ActivationStore, config: ClassIncrementalConfig, shared_views: Callable[[], int]
    ) -> None:
        self.store, self.network, self.data, self.context = store, store.network, store.data, store.context
        self.fast, self.views, self.seed = config.engine == "fast", config.cache_views, config.seed
        self.shared_views = shared_views
        self._stores_drawn = self.fast and not self.views and self.context.device.type == "cpu"
        self._kept: dict[tuple[str, int, str], Tensor] = {}  # features by source, width, hash of the network

    # --- sources --------------------------------------------------------------------------------------------

    def view(self, task: int, number: int, depth: int | None = None) -> Source:
        """A task's training inputs in one view: a fixed one, or without any the one drawn for (task, number).

        Args:
            depth: depth of fixed views, below which nothing may learn while the result is in use; by default
                the depth below which nothing ever changes again.
        """
        if self.views:  # without the seed: all runs share the activations of fixed views
            key, what = ("view", number % self.views), f"view {number % self.views + 1} of {self.views}"
            return self._at(task, "train", key, what, depth)
        key = self._drawn(task, number)
        if self._stores_drawn and number < self.shared_views():
            return self._at(task, "train", key, f"view {number + 1}", None)
        return self.fresh(key)

    def new_view(self, task: int, number: int, key: Key) -> Source:
        """A view besides the fixed ones: with fixed views the one that `key` draws, else `view`."""
        return self.fresh(key) if self.views else self.view(task, number)

    def drop_drawn(self, task: int) -> None:
        """Remove stored activations of the views drawn for the open task."""
        for number in range(self.shared_views() if self._stores_drawn else 0):
            self.store.drop(self.network.fixed_depth(), "train", self._drawn(task, number))

    def _drawn(self, task: int, number: int) -> Key:
        """Key of a view drawn for a task: that of epoch `number` of its first functional phase."""
        return "functional", self.seed, task, 0, number

    def fresh(self, key: Key) -> Images:
        """Training images in the views drawn by a key."""
        return Images(self.data, "train", key, self.context.device)

    def by_epoch(self, task: int, epochs: int) -> Callable[[int], Source]:
        """Function from an epoch of a functional phase to the source of its inputs.

        Views that the phase uses more than once are stored at the depth where learning begins.
        """
        views = min(self.views or epochs, epochs)
        depth = self.network.learning_depth() if self.fast and views < epochs else None
        opened = [self.view(task, number, depth) for number in range(views)]
        return lambda epoch: opened[epoch % len(opened)]

    def features_of(self, task: int, source: str) -> Tensor:
        """Features of a task's images in the test view, in stored order, (n, d), on every rank."""
        indices = self.data.indices(self.data.task_classes(task), source)
        return self._features(self._at(task, source, None, source, None), indices, f"{source} features")

    def seen_features(self, tasks: int, source: str) -> Tensor:
        """Features (n, d) in the test view of the images of the first tasks, task after task, on every rank.

        Batches lie at fixed places in this sequence, whatever was computed before. Full batches of an earlier
        call are reused while the network, or the part of it behind a subspace of features, is unchanged.
        """
        data, network = self.data, self.network
        order = data.seen_indices(tasks, source)
        fixed, label = network.fixed_depth() if self.fast else 0, f"Task {tasks - 1}, {source} features"
        below = self.store.at(fixed, data.seen_classes(tasks), source, None, label=label)
        found, known = [], self._kept
        self._kept = {}
        with closing(network.each_subspace()) as rounds:
            for _ in rounds:
                state = source, network.feature_width, sha256_of(network.tensors_below(network.depth))
                found.append(self._features(below, order, label, known.get(state)))
                self._kept[state] = found[-1]
        return torch.cat(found, dim=1)

    def features_of_images(
        self, classes: range, indices: np.ndarray, source: str, among: np.ndarray
    ) -> Tensor:
        """Features (n, d) of a few images of these classes in the test view, on every rank, not kept.

        Args:
            among: all images of these classes that any call will ask for; their tokens are stored.
        """
        fixed = self.network.fixed_depth() if self.fast else 0
        label = f"{len(indices)} {source} images"
        below = self.store.at(fixed, classes, source, None, label=label, chosen=among)
        return self._features(below, indices, label)

    @torch.no_grad()
    def _features(self, below: Source, indices: np.ndarray, label: str, kept: Tensor | None = None) -> Tensor:
        """Features (n, d) of stored images in the test view, on every rank.

        kept: those of the first images from an earlier call, reused as far as they were full batches.
        """
        kept = torch.empty(0, self.network.feature_width) if kept is None else kept
        distributed = self.context.distributed
        step = self.store.batch_size * distributed.size
        parts = [kept[: min(len(kept), len(indices)) // step * step]]
        whole = [indices[first : first + step] for first in range(len(parts[0]), len(indices), step)]
        mine = [batch[distributed.shard(len(batch))] for batch in whole]
        batches = zip(progress(whole, desc=label, unit="batch"), mine, below.each(mine), strict=True)
        for batch, chosen, x in batches:
            self.context.check_stop()
            own = self.batch_features(x, below, chosen) if len(chosen) else kept[:0]
            parts.append(distributed.all_gather(own, len(batch)))
        return torch.cat(parts)

    @torch.no_grad()
    def batch_features(self, x: Tensor, below: Source, indices: np.ndarray) -> Tensor:
        """Features (n, d) of the inputs x of stored images, float32 on the CPU."""
        with autocast(self.context.device, self.context.precision):
            return self.network(x.to(self.context.device), below.depth).float().cpu()

    def _at(self, task: int, source: str, view: Key | None, what: str, depth: int | None) -> Source:
        """One view at the depth below which nothing changes, or at a greater `depth`, reached from there."""
        classes, fixed = self.data.task_classes(task), self.network.fixed_depth() if self.fast else 0
        label = f"Task {task}, {what}, blocks 0-{fixed - 1}"
        opened = self.store.at(fixed, classes, source, view, label=label)
        if depth is None or depth == fixed:
            return opened
        label = f"Task {task}, {what}, blocks {fixed}-{depth - 1}"
        return self.store.at(depth, classes, source, view, below=opened, label=label)

    # --- batches --------------------------------------------------------------------------------------------

    def read(self, task: int, source: Source, key: Key, size: int, start: int = 0) -> Iterator[Batch]:
        """A task's training batches of `size` images, from number `start` on, in the order given by `key`."""
        classes = self.data.task_classes(task)
        order = self.data.order(classes, "train", key)
        groups = [order[first : first + size] for first in range(start * size, len(order), size)]
        if isinstance(source, Images):
            loaded = self.data.batches(
                classes, source="train", batch_size=size, key=key, start=start, view=source.view
            )
            for (images, targets), group in zip(loaded, groups, strict=True):
                yield Batch(images, targets, 0, len(group))
            return
        stored = (self._stored(source, group) for group in groups)
        yield from one_ahead(stored) if self.context.device.type == "cuda" else stored

    def _stored(self, source: Activations, indices: np.ndarray) -> Batch:
        """This rank's share of the activations of these images."""
        mine = indices[self.context.distributed.shard(len(indices))]
        return Batch(source.take(mine), self.data.targets(mine, "train"), source.depth, len(indices))

    def batch_count(self, task: int, size: int) -> int:
        """Training batches of `size` images in a task."""
        return -(-self.data.count(self.data.task_classes(task), "train") // size)

    # --- token means ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def token_means(self, batch: Batch, blocks: list[int]) -> dict[int, Tensor]:
        """Token means of a batch, for routers and descriptors, on every rank: {block: (B, d)}, float32."""
        context = self.context
        means = dict.fromkeys(blocks, torch.empty(0, self.network.vit.embed_dim, device=context.device))
        if len(batch.targets):
            with autocast(context.device, context.precision):
                means = self.network.token_means(batch.inputs.to(context.device), batch.depth, blocks)
        return {block: context.distributed.all_gather(rows, batch.total) for block, rows in means.items()}

    def means_by_epoch(
        self, task: int, key: Key, blocks: list[int], *, views: int, epochs: int, size: int
    ) -> Callable[[int, int], Iterator[dict[int, Tensor]]]:
        """Function (epoch, start) -> batches of `size` token means of the blocks.

        Epochs take turns through `views` views, or with 0 have a new one each. While descriptors learn,
        nothing else does, so the fast engine runs the network once per view, not once per epoch.
        """
        if not (self.fast and views):
            sources = [
                self.view(task, epoch % views) if views else self.new_view(task, epoch, (*key, epoch))
                for epoch in range(epochs)
            ]

            def computed(epoch: int, start: int) -> Iterator[dict[int, Tensor]]:
                for batch in self.read(task, sources[epoch], (*key, epoch), size, start):
                    yield self.token_means(batch, blocks)

            return computed
        stored = [self.all_means(task, number, key, blocks) for number in range(min(views, epochs))]
        classes = self.data.task_classes(task)
        indices = self.data.indices(classes, "train")

        def looked_up(epoch: int, start: int) -> Iterator[dict[int, Tensor]]:
            rows = torch.from_numpy(
                np.searchsorted(indices, self.data.order(classes, "train", (*key, epoch)))
            )
            for chosen in rows.split(size)[start:]:
                yield {
                    block: means[chosen.to(means.device)]
                    for block, means in stored[epoch % len(stored)].items()
                }

        return looked_up

    def all_means(self, task: int, view: int, key: Key, blocks: list[int]) -> dict[int, Tensor]:
        """Token means of one view of a task's training images in stored order: {block: (images, d)}."""
        order_key, size, parts = (*key, view), self.store.batch_size, []
        batches = self.read(task, self.view(task, view), order_key, size)
        label, count = f"Task {task} rd view {view + 1}", self.batch_count(task, size)
        for batch in progress(batches, total=count, desc=label, unit="batch"):
            self.context.check_stop()
            parts.append(self.token_means(batch, blocks))
        order = self.data.order(self.data.task_classes(task), "train", order_key)
        stored = torch.from_numpy(np.argsort(order)).to(self.context.device)
        return {block: torch.cat([part[block] for part in parts])[stored] for block in blocks}

    def new_means(
        self, task: int, key: Key, blocks: list[int], *, after: int, count: int
    ) -> dict[int, Tensor]:
        """Token means of a task's training images in views other than the first `after`: {block: (count, d)}.

        View after view of all images, each in an order of its own, until there are `count` of at least 1.
        """
        parts, total, number = [], 0, 0
        with progress(total=count, desc=f"Task {task} rd, new views", unit="image") as bar:
            while total < count:
                name = (*key, number)
                view = self.new_view(task, after + number, name)
                for batch in self.read(task, view, name, self.store.batch_size):
                    self.context.check_stop()
                    parts.append(self.token_means(batch, blocks))
                    total += batch.total
                    bar.update(batch.total)
                    if total >= count:
                        break
                number += 1
        return {block: torch.cat([part[block] for part in parts])[:count] for block in blocks}
