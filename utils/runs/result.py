"""A finished run's `result.json`: its numbers by name, and whether it holds what a report needs.

fault_of(result, config.metrics)        # "it has no A_N", or None
numbers_of(result)["seconds"]
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.metric_catalogue import MetricSpec

PARTS = ("metrics", "parameters", "weights", "cost")  # JSON objects that every result has


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Key -> value of every metric and cost of a run; what is absent or no finite number is left out."""
    parameters, cost = result["parameters"], result["cost"]
    values = {
        **result["metrics"],
        "parameters_adapters": parameters.get("adapters"),
        "parameters_stored": parameters.get("stored"),
        "seconds": cost.get("seconds"),
        "peak_memory_mb": cost.get("peak_memory_mb"),
    }
    return {key: value for key, value in values.items() if is_number(value)}


def fault_of(result: Mapping[str, Any], metrics: Sequence[MetricSpec]) -> str | None:
    """What a result lacks to be reported on, or None; metrics: of its run's method, the main one first."""
    lacking = next((part for part in PARTS if not isinstance(result.get(part), dict)), None)
    if lacking is not None:
        return f'it has no "{lacking}"'
    if not is_number(result["metrics"].get(metrics[0].key)):
        return f"it has no {metrics[0].name}"
    for spec in metrics:
        values = result.get(spec.key)
        if spec.per_task and not isinstance(values, list):
            return f'it has no "{spec.key}"'
        if spec.per_task and not (values and all(map(is_number, values))):
            return f'its "{spec.key}" holds something else than numbers'
    return None


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
