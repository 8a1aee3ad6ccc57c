"""models.vit.report: the log lines of a class-incremental run."""

from models.vit.report import log_lines
from utils.runs.metrics import AccuracyMatrix


def test_forgetting_that_rounds_to_zero_has_no_sign() -> None:
    matrix = AccuracyMatrix()
    matrix.add([29_999], [30_000])
    matrix.add([30_000, 1], [30_000, 1])
    line, *_ = log_lines(matrix, "test", {})
    assert "forgetting 0.00" in line
