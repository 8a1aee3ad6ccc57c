"""Cache of activations at the frozen/trainable boundary.

    store = ActivationStore(network, data, cache, context, batch_size, identity)
    tokens = store.at(9, classes, "train", view=key)     # blocks below are frozen: run once per image
    x = tokens.take(indices)                             # (n, N, d): inputs of block 9
    features = network(x, tokens.depth)

Activations are kept as files of one class each (`utils/cache/tensor_cache.py`), named by a hash of everything
that shapes them: weights, architecture with its options, the adapters below the depth, data, view, precision,
library versions. Where no adapter lies below, all runs with these weights and views share them; otherwise
they belong to one run, which removes them when it no longer needs them; those that a stopped process leaves,
and a resumed one does not open again, go when the cache needs room. A depth counts as in `FrozenViT.forward`:
0 is images, k the tokens of block k, `network.depth` the features.
"""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbone.frozen_vit import FrozenViT
from models.base import RunContext
from utils.cache.tensor_cache import TensorCache
from utils.console import progress
from utils.data.image_files import DECODER_VERSION
from utils.data.tasks import DataManager
from utils.training.device import autocast, require_finite, sha256_of
from utils.training.random import Key

logger = logging.getLogger("nested_lora")

CHUNK = 256  # images in a file, all of one class
NO_FILE = (-1, -1)  # file and row of an image that no file holds
CHOSEN = "chosen"  # in place of a source: files of a few images of every class, which later tasks read again


class Images:
    """Depth 0: one view of each image, made on demand.

    Args:
        view: the key of the augmented view; None is the test view.
        device: where `take` makes the views.
    """

    depth = 0
    queries: "Activations | None" = None  # of the same views, where a method stores queries

    def __init__(self, data: DataManager, source: str, view: Key | None, device: torch.device) -> None:
        self.data, self.source, self.view, self.device = data, source, view, device

    def take(self, indices: np.ndarray) -> Tensor:
        """Views of the images at stored positions (n,) -> (n, 3, S, S), float32."""
        return self.data.views(indices, self.source, self.view, self.device)

    def each(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The same on the CPU, batch by batch, made ahead by the data workers."""
        return (images for images, _ in self.data.load(batches, self.source, self.view))


class Activations:
    """Activations at one depth for the images of some classes, one view of each.

    They are read from files where the cache has room for these, and else computed on demand.

    Args:
        store: holds the network that computes them and the cache of their files.
        below: the inputs to compute from: images, or activations at a smaller depth.
        depth: the depth of what `take` returns.
        about: everything that shapes the activations; its hash is in the name of their group of files.
    """

    queries: "Activations | None" = None

    def __init__(
        self, store: "ActivationStore", below: "Images | Activations", depth: int, about: Mapping[str, Any]
    ) -> None:
        self.network, self.cache, self.context = store.network, store.cache, store.context
        self.batch_size, self.below, self.depth, self.about = store.batch_size, below, depth, about
        # float16 for tokens of a bf16 run, 3 bits finer than bf16; otherwise exact
        halved = self.context.precision == "bf16" and depth < self.network.depth
        self.dtype = torch.float16 if halved else torch.float32  # of files
        vit = self.network.vit
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.embed_dim
        self.shape = tokens if depth < self.network.depth else (self.network.feature_width,)  # of one image
        self.group = group_name(about)
        self._chunks: list[np.ndarray] = []  # stored indices of the images of each file
        self._place_of: dict[int, tuple[int, int]] = {}  # stored index -> its file and row

    def take(self, indices: np.ndarray) -> Tensor:
        """Activations of the images at stored positions (n,), float32 on the CPU: (n, N, d) or (n, d)."""
        taken = torch.empty(len(indices), *self.shape)
        places = np.array([self._place_of.get(int(index), NO_FILE) for index in indices]).reshape(-1, 2)
        for number in np.unique(places[:, 0]):
            inside = np.flatnonzero(places[:, 0] == number)
            if number == NO_FILE[0]:
                found = self.compute(indices[inside])
            else:
                chunk = self._chunks[number]
                file = self.cache.get(self.group, chunk_key(chunk), partial(self.compute, chunk))
                found = file[torch.from_numpy(places[inside, 1])]
            taken[torch.from_numpy(inside)] = found.float()
        return taken

    def each(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The same, batch by batch."""
        return map(self.take, batches)

    @torch.no_grad()
    def compute(self, indices: np.ndarray) -> Tensor:
        """The same by running the network, in the dtype of the files."""
        device, precision, parts = self.context.device, self.context.precision, []
        for start in range(0, len(indices), self.batch_size):
            x = self.below.take(indices[start : start + self.batch_size]).to(device)
            with autocast(device, precision):
                parts.append(self.network(x, self.below.depth, self.depth).to(self.dtype).cpu())
        what = f"activations at depth {self.depth}, as {self.dtype},"
        return require_finite(torch.cat(parts), what, precision)

    def fill(self, files_of_tasks: Sequence[list[np.ndarray]], label: str) -> bool:
        """Compute the missing files of some tasks, each given by the images in it; each rank its share.

        They are computed in full batches across the files of a task, which are the same whichever files are
        stored: one that a killed process has left out gets the bits that it would have got.

        Returns whether there was room for them; if not, `take` computes their images at every call.

        Raises:
            Interrupted: a stop was requested.
        """
        distributed, chunks = self.context.distributed, list(itertools.chain(*files_of_tasks))
        stored = [self.has(chunk) for chunk in chunks]
        images = sum(len(chunk) for chunk, there in zip(chunks, stored, strict=True) if not there)
        needed = images * math.prod(self.shape) * self.dtype.itemsize
        room = not distributed.any(not self.cache.make_room(self.group, needed))
        self._chunks = chunks if room else list(itertools.compress(chunks, stored))
        self._place_of = {int(i): (c, r) for c, chunk in enumerate(self._chunks) for r, i in enumerate(chunk)}
        if not room:
            return False
        numbers = itertools.count(-distributed.rank)
        mine = [[file for file in files if not next(numbers) % distributed.size] for files in files_of_tasks]
        total = stored[distributed.rank :: distributed.size].count(False)
        with progress(total=total, desc=label, unit="class") as bar:
            for together in itertools.chain.from_iterable(self._batches(files) for files in mine):
                missing = [number for number, chunk in enumerate(together) if not self.has(chunk)]
                if not missing:
                    continue
                if self.context.stop():
                    break
                rows = self.compute(np.concatenate(together)).split([len(chunk) for chunk in together])
                for number in missing:
                    key = chunk_key(together[number])
                    self.cache.get(self.group, key, lambda own=rows[number]: own)
                self.cache.describe(self.group, self.about)
                bar.update(len(missing))
        self.context.check_stop()
        return True

    def has(self, chunk: np.ndarray) -> bool:
        """Whether there is a file of exactly these images."""
        return self.cache.has(self.group, chunk_key(chunk))

    def _batches(self, chunks: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Groups of files to compute together: as many as fit a batch, at least one."""
        together: list[np.ndarray] = []
        for chunk in chunks:
            if together and sum(map(len, together)) + len(chunk) > self.batch_size:
                yield together
                together = []
            together.append(chunk)
        if together:
            yield together


class ActivationStore:
    """The activations of a network at any depth; it knows which of their files are this run's own.

    Args:
        context: where the network runs; ranks share the work of filling the cache, and a stop between two
            files keeps those that are written.
        batch_size: images in a forward pass.
        identity: what else shapes the results (backbone, library versions), as JSON.
    """

    def __init__(
        self,
        network: FrozenViT,
        data: DataManager,
        cache: TensorCache,
        context: RunContext,
        batch_size: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.network, self.data, self.cache = network, data, cache
        self.context, self.batch_size, self.identity = context, batch_size, identity
        self._own: dict[str, str] = {}  # group of files that only this run can use -> their source
        self._warned = False

    def at(
        self,
        depth: int,
        classes: range,
        source: str,
        view: Key | None,
        below: "Images | Activations | None" = None,
        label: str = "",
        chosen: np.ndarray | None = None,
    ) -> "Images | Activations":
        """Activations at a depth of the images of these classes, computed now where they are not stored.

        Args:
            chosen: stored positions of the only images that will be asked for, where they are few: only these
                get files, which stay when the others of their source are removed. Files of whole classes are
                used where they exist already and runs share them.
            below: activations at a smaller depth to start from, or None for the images.
            label: what the progress bar says.
        """
        below = Images(self.data, source, view, self.context.device) if below is None else below
        if depth == below.depth:
            return below
        about, files_of = self._about(depth, source, view), source
        if chosen is not None and about["adapters"] is not None:
            about, files_of = about | {"images": CHOSEN}, CHOSEN
        opened = Activations(self, below, depth, about)
        files = [list(self._chunks(own, source)) for own in self._by_task(classes)]
        if chosen is not None and not all(map(opened.has, itertools.chain(*files))):
            parts = ((chunk[np.isin(chunk, chosen)] for chunk in own) for own in files)
            files = [[part for part in own if len(part)] for own in parts]
        room = opened.fill(files, label)
        if about["adapters"] is not None:
            self._own[opened.group] = files_of
        if not room and self.cache.enabled and not self._warned:
            self._warned = True
            logger.warning(
                f"The cache has no room for {source} activations of block {depth}: they are computed "
                "whenever they are needed; raise cache_gb, free disk space, or empty the cache "
                "(python -m utils.cache --clear)"
            )
        return opened

    def drop_own(self, source: str | None = None) -> None:
        """Remove the run's own files: of a source, of `CHOSEN`, or all."""
        self._drop([group for group, of in self._own.items() if source in (None, of)])

    def drop(self, depth: int, source: str, view: Key) -> None:
        """Remove the files of one view, also those that an interrupted process of this run has left."""
        self._drop([group_name(self._about(depth, source, view))])

    def _drop(self, groups: list[str]) -> None:
        if groups:
            self.context.distributed.barrier()
        for group in groups:
            self._own.pop(group, None)
            if self.context.distributed.local_rank == 0:
                self.cache.drop(group)

    def _about(self, depth: int, source: str, view: Key | None) -> dict[str, Any]:
        """Everything that shapes the activations."""
        adapters = self.network.tensors_below(depth)
        spec = self.data.test_view if view is None else self.data.train_view
        return {
            "depth": depth,
            "attended": self.network.begins_attended(depth),
            "source": source,
            "view": view,
            "adapters": sha256_of(adapters) if adapters else None,
            "adapter_spec": asdict(self.network.spec) if adapters and self.network.spec else None,
            "transform": spec.to_json(),
            "precision": self.context.precision,
            "device": self.context.device.type,
            "batch_size": self.batch_size,
            "data": self.data.data_sha256(source),
            "decoder": DECODER_VERSION,
            **self.identity,
        }

    def _by_task(self, classes: range) -> Iterator[range]:
        """Those of the classes that each task has, maybe none."""
        for task in map(self.data.task_classes, range(self.data.nb_tasks)):
            yield range(max(task.start, classes.start), min(task.stop, classes.stop))

    def _chunks(self, classes: range, source: str) -> Iterator[np.ndarray]:
        """Stored indices of each class in files of at most CHUNK images, whatever the order of classes."""
        for label in classes:
            indices = self.data.indices(range(label, label + 1), source)
            yield from (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))


def group_name(about: Mapping[str, Any]) -> str:
    """Name of the group of files of activations described so: source, depth, and a hash of everything."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{about['source']}-{about['depth']}-{digest[:24]}"


def chunk_key(indices: np.ndarray) -> str:
    """Name of the file that holds these stored images, in this order."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:32]
