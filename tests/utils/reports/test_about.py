"""What was run, in words: of one run, of all runs of a sweep, and the keys in which its cells differ."""

import re

import pytest

from models import SCHEMAS
from utils.config.loading import config_from_dict
from utils.reports.about import common_facts, dates, differing_keys, facts_of
from utils.runs.manifest import Manifest

SESSION = {
    "started": "2026-11-28T21:17:42+00:00",
    "commit": "d72efe98b4d070bb1847ad182a53be653c93523c+changes",
    "code_sha256": "0",
    "versions": {"torch": "2.12.0", "timm": "1.0.31"},
    "device": "cpu (x86_64)",
    "precision": "bf16",
    "threads": 2,
    "processes": 4,
}
COMMAND = {"id": "a", "seeds": [1], "overwrite": False}


def manifest(finished: str | None = None, **more) -> Manifest:
    return Manifest.model_validate({"command": COMMAND, "sessions": [SESSION], "finished": finished, **more})


def test_facts_are_what_the_manifest_records():
    config = {"model_name": "sema", "dataset": "cifar224", "init_cls": 50, "increment": 10}
    images = {"train": [20] * 99 + [13], "test": [10] * 100}
    weights = {"tag": "vit.in21k", "note": "", "sha256": "0123456789abcdef"}
    about = {"method": "Adapters.", "images_per_class": images, "weights": weights, "image_size": 224}
    about["data_of_tasks"] = {"train": ["hash"] * 6}
    data = "cifar224: 100 classes; train 1,993 images, 13 to 20 per class; test 1,000 images, 10 per class"
    assert facts_of(config, manifest(**about)) == {
        "Method": "Adapters (sema)",
        "Data": data,
        "Tasks": "6: 50 classes, then 10 each",
        "Weights": "vit.in21k, 224 px, SHA-256 0123456789ab",
        "Code": "commit d72efe98b4d0 with uncommitted changes, torch 2.12.0, timm 1.0.31",
        "Machine": "cpu (x86_64), bf16, 2 threads, 4 processes",
    }
    extended = facts_of(config | {"extra_data": ["birds"]}, manifest(**about))
    assert extended["Data"] == data.replace("cifar224", "cifar224 + birds")
    assert list(facts_of(config, manifest())) == ["Method", "Code", "Machine"]  # of an earlier version


@pytest.mark.parametrize(
    ("config", "classes", "tasks", "told"),
    [
        ({"init_cls": 10, "increment": 10}, 100, 10, "10: 10 classes each"),
        ({"init_cls": 30, "increment": 30}, 100, 4, "4: 30 classes each, 10 in the last"),
        ({"init_cls": 100, "increment": 100}, 100, 1, "1, with all 100 classes"),
        ({"init_cls": 2, "increment": 2, "extra_data": ["birds"]}, 7, 3, "3: .* last 1 .* 7 classes in all"),
    ],
)
def test_tasks_are_told_as_they_were(config: dict, classes: int, tasks: int, told: str):
    more = {"images_per_class": {"train": [5] * classes}, "data_of_tasks": {"train": ["hash"] * tasks}}
    config = {"model_name": "sema", "dataset": "x", "extra_data": None} | config
    assert re.fullmatch(told, facts_of(config, manifest(**more))["Tasks"])


def test_dates_span_all_runs():
    runs = [manifest("2026-11-28T21:18:00+00:00"), manifest("2026-11-29T01:02:00+00:00")]
    assert dates(runs[:1]) == "28 November 2026, 21:17 to 21:18"
    assert dates(runs) == "28 November 2026, 21:17 to 29 November, 01:02"
    assert dates([manifest()]) == "28 November 2026, 21:17, not finished"


def test_facts_of_a_sweep_are_told_once_or_by_cell():
    one, other = {"Data": "x", "Tasks": "5"}, {"Data": "x", "Tasks": "1"}
    facts = common_facts({"a": [one, one], "b, c": [one], "joint": [other], "not run": []})
    assert facts == [("Data", "x"), ("Tasks", "a; b, c – 5"), ("Tasks", "joint – 1")]


def test_the_table_of_keys_has_what_differs_and_has_an_effect():
    def config(**values):
        common = {"dataset": "synthetic", "init_cls": 2, "increment": 2}
        network = {"model_name": "sema", "backbone_type": "test_vit", "weights": "random", "image_size": 32}
        network |= {"adapt_start_layer": 4, "adapt_end_layer": 5}
        return config_from_dict(common | network | values, SCHEMAS, "test").config

    nested = {"ffn_adapter_type": "nested_lora", "nested_lora_rank": 3}
    table = differing_keys({"a": config(), "b": config(prefix="b", seed=2, **nested)})
    assert table.headings == ["cell", "ffn_adapter_type", "nested_lora_rank"]
    assert [[entry.text for entry in row] for row in table.rows] == [
        ["a", "adaptmlp", "–"],
        ["b", "nested_lora", "3"],
    ]
    elsewhere = config(seed=3, device="cpu", eval_batch_size=7, figure_format="none")  # the same numbers
    assert differing_keys({"a": config(), "b": elsewhere}) is None
    many = config(**nested, func_epoch=3, init_lr=0.5, batch_size=7, rd_epoch=1, ffn_adapter_scalar=0.5)
    table = differing_keys({"a": config(), "b": many})  # a row per key
    assert table.headings == ["key", "a", "b"]
    assert ["batch_size", "32", "7"] in [[entry.text for entry in row] for row in table.rows]
