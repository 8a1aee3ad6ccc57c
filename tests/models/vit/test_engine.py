"""The fast engine gives the reference's accuracy and growth; its cache is shared, safe and bounded."""

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import trainer
from backbone.frozen_vit import FrozenViT
from models.base import Learner
from models.saved import learner as saved_learner
from models.vit.activations import Activations
from models.vit.training import train_functional
from tests.conftest import learner_of, run_tasks
from trainer import train
from utils.analysis import calibration
from utils.config.schema import RunConfig
from utils.errors import Interrupted, UserError
from utils.runs.folder import folder_of
from utils.runs.run_log import read_metrics
from utils.runs.seeds import new_command

Make = Callable[..., RunConfig]
SEVERAL_TASKS = {"max_tasks": 3, "func_epoch": 2, "exp_threshold": 0.5, "augmentation": "none", "min_lr": 0.0}
STORED = {**SEVERAL_TASKS, "adapter_blocks": "growing", "cache_views": 1}


def run(config: RunConfig) -> tuple[dict[str, Any], torch.Tensor]:
    """Result and losses of a configuration's run."""
    result = train(config, command=new_command([config.seed], overwrite=True))
    folder = folder_of(config, config.seed)
    return result, torch.tensor([e["loss"] for e in read_metrics(folder) if e["event"] == "epoch"])


@pytest.fixture
def bf16_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU may have no bf16: then it is emulated."""
    monkeypatch.setattr(saved_learner, "resolve_precision", lambda precision, device: (precision, None))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_views": 1},
        {"cache_views": 2, "adapter_blocks": "growing"},
        {"cache_views": 1, "nested_lora_freeze": "never", "adapter_blocks": "growing"},
        {"cache_views": 1, "ffn_adapter_type": "adaptmlp", "exp_threshold": 1e9},
        {"cache_views": 1, "nested_lora_use_consolidation": True, "nested_lora_consolidation": "function"},
        {"cache_views": 1, "ffn_adapter_type": "nested_lora_linear", "nested_lora_use_consolidation": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "as shipped",
)
def test_fast_is_reference_without_augmentation(smoke_config: Make, changes: dict[str, Any]) -> None:
    """Same accuracies, same growth, the same losses to rounding."""
    results = {}
    for engine in ("fast", "reference"):
        results[engine] = run(smoke_config(**SEVERAL_TASKS | changes, engine=engine))
    (fast, fast_losses), (reference, reference_losses) = results["fast"], results["reference"]
    assert fast["accuracy"] == reference["accuracy"]
    assert fast["adapters"] == reference["adapters"]
    for metrics in (fast["metrics"], reference["metrics"]):
        assert metrics.pop("ece") >= 0  # jumps where rounding moves a confidence to another bin
    assert fast["metrics"] == pytest.approx(reference["metrics"], rel=1e-3)
    assert (fast["metrics"]["expansions"] > 0) == ("exp_threshold" not in changes)
    torch.testing.assert_close(fast_losses, reference_losses, rtol=1e-3, atol=1e-4)


def test_fixed_views_are_the_same_stored_or_made_again(smoke_config: Make) -> None:
    """With augmentation: K views out of the cache, and the same K views computed every time."""
    changes = {"max_tasks": 2, "func_epoch": 3, "cache_views": 2, "exp_threshold": 0.5}
    stored, computed, other = (
        run(smoke_config(**changes, cache_gb=gb, seed=[seed])) for gb, seed in ((1, 1), (0, 1), (1, 2))
    )
    assert stored[0]["accuracy"] == computed[0]["accuracy"]
    torch.testing.assert_close(stored[1], computed[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(other[1], stored[1])


@pytest.mark.usefixtures("bf16_anywhere")
def test_bf16_is_near_fp32_whether_stored_or_computed(smoke_config: Make) -> None:
    exact, stored, computed = (
        run(smoke_config(**STORED, precision=precision, cache_gb=gb))[1]
        for precision, gb in (("fp32", 1), ("bf16", 1), ("bf16", 0))
    )
    torch.testing.assert_close(stored, exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(computed, stored, rtol=1e-3, atol=1e-3)
    assert not torch.equal(stored, exact)


def test_a_step_in_parts_is_the_same_step(smoke_config: Make) -> None:
    whole, parts = (run(smoke_config(**SEVERAL_TASKS, grad_accumulation=n)) for n in (1, 3))
    assert whole[0]["accuracy"] == parts[0]["accuracy"]
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(from depth, to depth) of all that is computed for the cache while the test runs, once per image."""
    seen: list[tuple[int, int]] = []
    original = Activations.compute

    def compute(self: Activations, indices: np.ndarray) -> torch.Tensor:
        seen.extend([(self.below.depth, self.depth)] * len(indices))
        return original(self, indices)

    monkeypatch.setattr(Activations, "compute", compute)
    return seen


def test_seeds_and_methods_share_what_no_adapter_shapes(
    smoke_config: Make, computed: list[tuple[int, int]]
) -> None:
    """Adapters in growing blocks only: an image passes the frozen blocks once for all seeds and adapters."""
    changes = {"adapter_blocks": "growing", "cache_views": 1, "max_tasks": None, "max_train_per_class": None}
    changes |= {"max_test_per_class": None, "func_epoch": 1, "rd_epoch": 1, "exp_threshold": 1e9}
    run(smoke_config(**changes, seed=[1]))
    assert computed.count((0, 4)) == 8 * (40 + 20 + 10)  # 10 of every class in the test view, for calibration
    computed.clear()
    run(smoke_config(**changes, seed=[2]))
    run(smoke_config(**changes, seed=[1], ffn_adapter_type="adaptmlp"))
    assert computed.count((0, 4)) == 0


@pytest.mark.usefixtures("bf16_anywhere")
@pytest.mark.parametrize(
    "change",
    [{"image_size": 16}, {"augmentation": "crop"}, {"precision": "bf16"}, {"adapt_start_layer": 5}],
    ids=lambda change: next(iter(change)),
)
def test_what_shapes_the_activations_is_in_their_key(
    smoke_config: Make, computed: list[tuple[int, int]], change: dict[str, Any]
) -> None:
    changes = {"adapter_blocks": "growing", "cache_views": 1, "max_tasks": 1}
    run(smoke_config(**changes))
    computed.clear()
    run(smoke_config(**changes | change))
    depth = change.get("adapt_start_layer", 4)
    train_images, in_test_view = 2 * 16, 2 * (8 + 10)  # tested, and for calibration
    assert computed.count((0, depth)) == train_images + (0 if "augmentation" in change else in_test_view)


def test_a_trained_prefix_is_a_runs_own_and_leaves_nothing(
    smoke_config: Make, computed: list[tuple[int, int]]
) -> None:
    config = smoke_config(**SEVERAL_TASKS, cache_views=1)
    run(config)
    assert computed.count((0, 4)) > 0
    assert list(Path(config.cache_root).rglob("*.safetensors")) == []


def passing(learner: Learner) -> list[int]:
    """A list whose item counts the images that pass the learner's first block from now on."""
    seen = [0]

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[0] += len(inputs[0])

    learner.network.vit.blocks[0].register_forward_pre_hook(add)
    return seen


def views_stored(learner: Learner) -> int:
    """Augmented views of training images that have files."""
    about = [json.loads(path.read_text()) for path in learner.cache.root.rglob("about.json")]
    return sum(each["view"] is not None for each in about)


@pytest.mark.parametrize(
    ("threshold", "growths", "changes"),
    [
        (0.0, 2, {}),
        (0.0, 2, {"adapter_blocks": "growing", "rd_views": 0}),
        (0.0, 2, {"rd_views": 1, "rd_epoch": 3}),  # errors are recorded on views 1 and 2
        (1e9, 0, {}),
    ],
    ids=["growths", "descriptors on new views", "errors recorded", "no growth"],
)
def test_growths_of_a_task_share_the_frozen_prefix_of_new_views(
    make_sema: Make, threshold: float, growths: int, changes: dict[str, Any]
) -> None:
    """Scans, growths and descriptors: an image passes the frozen blocks once per epoch; nothing is left."""
    learner = run_tasks(make_sema(exp_threshold=threshold, func_epoch=3, **changes), 1)
    learner.begin_task(1)
    seen, images = passing(learner), learner.data.count(learner.classes, "train")
    learner.grow_where_novel()
    if not growths:
        assert seen == [images]
        train_functional(learner)
    assert len(learner.method_state["grown"]) == growths
    assert seen == [3 * images]
    assert views_stored(learner) == (3 if growths else 1)  # what one phase alone reads is not written
    learner.once("growth", lambda: None)
    learner.once("functional", lambda: None)
    learner.train_task()
    assert views_stored(learner) == 0


def test_stopped_in_the_second_growth_of_a_task_ends_the_same(
    make_sema: Make, tmp_path: Path, computed: list[tuple[int, int]]
) -> None:
    """What is stored is read again; at the task's end it is gone."""
    changes = {"exp_threshold": 0.0, "func_epoch": 3, "adapter_blocks": "growing"}
    asked: list[int] = []

    def in_the_second_growth() -> bool:
        if learner.task == 1 and len(learner.method_state["grown"]) == 2:
            asked.append(learner.progress.steps)
        return len(asked) == 8

    whole = run_tasks(make_sema(**changes, cache_root=str(tmp_path / "whole")), 2)
    learner = make_sema(in_the_second_growth, **changes)
    with pytest.raises(Interrupted):
        run_tasks(learner, 2)
    state, resumed = learner.state(), make_sema(**changes)
    resumed.load_state(*state)
    assert views_stored(resumed) == 3
    computed.clear()
    resumed.train_task()
    assert computed.count((0, 4)) == 2 * 10  # of every class in the test view, for calibration
    assert views_stored(resumed) == 0
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("limit", [500, 6], ids=["of as many images", "of fewer with more classes"])
def test_calibration_computes_images_of_earlier_tasks_once(
    make_sema: Make, computed: list[tuple[int, int]], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that task 0 trained, frozen since: what they give belongs to the run, and goes with it."""
    monkeypatch.setattr(calibration, "MAX_IMAGES", limit)
    learner = run_tasks(make_sema(model_name="ranpac", ranpac_dim=20, first_session=True), 3)
    held_out = 6  # images of a task, which calibrate
    assert computed.count((0, 6)) == 3 * (2 * 16 + held_out)
    learner.close_run()
    assert list(Path(learner.config.cache_root).rglob("*.safetensors")) == []


def test_no_room_is_said_once_and_computed_instead(
    smoke_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stored = run(smoke_config(**STORED, cache_root=str(Path(smoke_config().cache_root) / "other")))
    with caplog.at_level("WARNING", logger="nested_lora"):
        tight = run(smoke_config(**STORED, cache_gb=1e-6))
    assert stored[0]["accuracy"] == tight[0]["accuracy"]
    assert sum("has no room" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("bf16_anywhere")
@pytest.mark.parametrize(
    ("precision", "dtype", "size"), [("bf16", "float16", 1e6), ("fp32", "float32", np.inf)]
)
def test_activations_beyond_what_holds_them_are_a_sentence_that_helps(
    smoke_config: Make, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: str, size: float
) -> None:
    """Whether they would be stored or not; fp32 is what holds more, where it is not used already."""
    original = FrozenViT.forward
    huge = lambda self, x, start=0, stop=None: original(self, x, start, stop) + (size if stop == 4 else 0)  # noqa: E731
    monkeypatch.setattr(FrozenViT, "forward", huge)
    for gb in (1, 0):
        with pytest.raises(UserError, match=f"depth 4, as torch.{dtype}, are not finite") as caught:
            train(smoke_config(cache_views=1, adapter_blocks="growing", precision=precision, cache_gb=gb))
        assert ("fp32" in str(caught.value)) == (precision != "fp32")


def test_the_log_says_how_inputs_are_normalised_and_where_that_is_from(make_sema: Make) -> None:
    told = {
        kind: [line for line in learner.describe_run() if "mean" in line]
        for kind in ("weights", "none")
        for learner in [make_sema(model_name="simplecil", input_normalization=kind)]
    }
    assert "0.5, 0.5, 0.5" in told["weights"][0] and "test_vit.r160_in1k" in told["weights"][0]
    assert told["none"] == []
    learner = make_sema(model_name="simplecil", input_normalization="weights")
    for tag, is_known in (("test_vit.r160_in1k", True), ("test_vit.of_a_package", False)):
        learner.backbone = dataclasses.replace(learner.backbone, tag=tag)
        assert ("do not say" in learner.describe_run()[-1]) != is_known


def test_another_network_with_the_same_weights_reads_activations_of_its_own(
    make_sema: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no weight shows, such as the number of heads, is in the name of the architecture."""
    create, same, other = timm.create_model, "vit_tiny_patch16_224", "deit_tiny_patch16_224"

    def with_heads(name: str, **options: Any) -> torch.nn.Module:
        return create(name, **options, **({"num_heads": 4} if name == other else {}))

    def features(backbone_type: str, **more: Any) -> torch.Tensor:
        learner = make_sema(model_name="simplecil", backbone_type=backbone_type, **more)
        learner.begin_task(0)
        return learner.features_of(0, "test")

    monkeypatch.setattr(timm, "create_model", with_heads)
    first, second = features(same), features(other)
    assert not torch.equal(second, first) and torch.equal(second, features(other, cache_gb=0))
    assert torch.equal(first, features(same)) and torch.equal(second, features(other))


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm", "numpy", "PIL"])
def test_another_version_of_a_library_computes_activations_anew(
    make_sema: Make, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    def groups() -> set[str]:
        learner = make_sema(model_name="simplecil")
        learner.begin_task(0)
        learner.features_of(0, "test")
        return {path.name for path in learner.cache.root.glob("test-*")}

    before = groups()
    assert groups() == before
    monkeypatch.setattr(sys.modules[library], "__version__", "0.0.1")
    assert groups() > before


# ----------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_tasks(smoke_config: Make, tmp_path: Path) -> None:
    """Twenty tasks: beyond the model, as many tensor bytes live after the last task as after the second."""
    rng = np.random.default_rng(0)
    arrays = {}
    for source, each in (("train", 8), ("test", 4)):
        arrays[f"x_{source}"] = rng.integers(0, 256, (20 * each, 16, 16, 3), dtype=np.uint8)
        arrays[f"y_{source}"] = np.repeat(np.arange(20), each)
    np.savez(tmp_path / "twenty.npz", **arrays, class_names=np.array([f"c{i}" for i in range(20)]))
    config = smoke_config(
        dataset=str(tmp_path / "twenty.npz"), init_cls=1, increment=1, cache_views=1, exp_threshold=0.5,
        max_train_per_class=None, max_test_per_class=None, rd_epoch=1,
    )  # fmt: skip
    with trainer.RunLog.create(tmp_path / "run", config=config.model_dump(), overwrite=False) as log:
        run = trainer.Run(learner_of(config), log)
        beyond = []
        for task in range(20):
            run.run_task(task)
            gc.collect()
            alive = {
                id(t) if t.is_mkldnn else t.data_ptr(): t.numel() * t.element_size()
                for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor)
            }
            model = sum(t.numel() * t.element_size() for t in run.learner.modules.state_dict().values())
            model += 4 * run.learner.network.parameter_counts()["adapters"]  # put together, once for a block
            beyond.append(sum(alive.values()) - model)
        grown = sum(run.learner.network.adapters_per_block().values())
    assert grown > 6
    assert max(beyond[2:]) <= beyond[1] + 2**16


def test_out_of_memory_says_what_to_change(smoke_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer.Learner, "take_step", exhausted)
    with pytest.raises(
        UserError, match="batch_size 8, .*set grad_accumulation=2.*batch_size=4, eval_batch_size=32"
    ):
        train(smoke_config())
