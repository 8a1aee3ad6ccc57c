"""utils.metric_catalogue: how numbers are shown, and that every method's metrics are well named."""

import math

import pytest

from models import SCHEMAS
from utils.metric_catalogue import CLASS_INCREMENTAL, COSTS, MetricSpec, Shown, by_key


@pytest.mark.parametrize("method", SCHEMAS)
def test_the_metrics_of_every_method_are_told_apart_and_its_main_one_is_drawn(method: str) -> None:
    metrics = SCHEMAS[method].metrics
    for names in ([spec.key for spec in (*metrics, *COSTS)], [spec.name for spec in (*metrics, *COSTS)]):
        assert len(set(names)) == len(names) and all(names)
    assert metrics[0].shown == Shown.FIGURES and metrics[0].meaning and not metrics[0].per_task


@pytest.mark.parametrize(
    ("key", "mean", "std", "text"),
    [
        ("final", 43.456, math.nan, "43.46"),
        ("final", 43.456, 0.0, "43.46 ± 0.00"),
        ("final", math.nan, math.nan, "–"),
        ("bwt", -1e-9, math.nan, "0.00"),
        ("bwt", -1e-9, 8.33, "0.00 ± 8.33"),
        ("seconds", 630.0, 60.0, "10.5 ± 1.0"),
        ("expansions", 3, math.nan, "3"),
        ("expansions", 3.0, 0.0, "3"),
        ("expansions", 3.5, math.nan, "3.5"),
        ("expansions", 3.0, 1.0, "3.0 ± 1.0"),
        ("parameters_stored", 1234567, 0.0, "1,234.6"),
        ("parameters_trained", 0, 0.0, "0"),
    ],
)
def test_values_are_shown_in_their_unit_and_digits(key: str, mean: float, std: float, text: str) -> None:
    assert by_key(CLASS_INCREMENTAL)[key].text(mean, std) == text


def test_differences_are_signed_and_have_their_own_unit() -> None:
    accuracy, seconds = (by_key(CLASS_INCREMENTAL)[key] for key in ("final", "seconds"))
    assert accuracy.difference_text(1.234) == "+1.23" and accuracy.difference_text(math.nan) == "–"
    assert seconds.difference_text(-60.0, 90.0) == "-1.00 to +1.50"
    assert (accuracy.unit, accuracy.difference_unit) == ("%", "points")
    assert MetricSpec("d", "distance", "radians").difference_unit == "radians"
