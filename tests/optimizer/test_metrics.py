"""Every metric against answers that are known, and what it says of data that do not fit it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wherry_optimizer import metrics
from wherry_optimizer.metrics import MetricOf, make
from wherry_shared.errors import RefusedError


def value(name: str, rows: list[tuple[dict[str, np.ndarray], object]], *outputs: str) -> float:
    metric = make(MetricOf(name=name, outputs=outputs))
    return metric.value([metric.evidence(found, label) for found, label in rows])


def scores(*numbers: float) -> dict[str, np.ndarray]:
    return {"y": np.array([numbers], np.float32)}


def test_every_metric_that_is_named_is_there() -> None:
    for name in metrics.METRICS:
        assert make(MetricOf(name=name)) is not None


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("accuracy", [(scores(0.1, 0.9), 1), (scores(0.1, 0.9), 0)], 0.5),
        ("accuracy", [(scores(np.nan, 0.9), 1)], 0.0),
        ("top5", [(scores(6, 5, 4, 3, 2, 1), 4), (scores(6, 5, 4, 3, 2, 1), 5)], 0.5),
        ("absolute_error", [(scores(1, 2), [1, 4])], -1.0),
        ("squared_error", [(scores(1, 2), [1, 4])], -2.0),
        ("cosine", [(scores(1, 0), [2, 0]), (scores(1, 0), [0, 3])], 0.5),
        ("agreement", [(scores(1, 2), [[5, 9]]), (scores(1, 2), [[9, 5]])], 0.5),
        ("agreement", [(scores(1.1), [[1.0]])], 0.9),
        ("auc", [(scores(0.1, 0.8), [0, 1]), (scores(0.4, 0.3), [0, 1])], 0.75),
        ("auc", [(scores(0.5, 0.5), [0, 1])], 0.5),
        ("spearman", [(scores(1), 10), (scores(2), 200), (scores(3), 3000)], 1.0),
        ("spearman", [(scores(1), 3), (scores(2), 2), (scores(9), 1)], -1.0),
    ],
)
def test_a_metric_gives_what_is_known(name: str, rows: list, expected: float) -> None:
    assert value(name, rows) == pytest.approx(expected, abs=1e-6)


def test_two_rows_are_compared_by_their_cosine() -> None:
    rows = [({"e": np.array([[1.0, 0.0], [np.cos(a), np.sin(a)]])}, -a) for a in (0.1, 0.5, 1.0)]
    assert value("spearman", rows) == pytest.approx(1.0)


def test_characters_are_decoded_as_ctc_does() -> None:
    steps = np.eye(5)[[1, 1, 0, 1, 2, 2, 0, 3]]  # 1 1 2 3
    assert value("characters", [({"p": steps[None]}, [1, 1, 2, 3])]) == 1.0
    assert value("characters", [({"p": steps[None]}, [1, 2, 4, 0, 0])]) == pytest.approx(1 - 2 / 3)


def test_segmentation_is_intersection_over_union_by_class_over_all_samples() -> None:
    label = np.array([[0, 0, 1, 1], [0, 0, 1, -1]])
    said = np.array([[0, 0, 1, 0], [0, 0, 1, 0]])
    output = {"m": np.eye(2)[said].transpose(2, 0, 1)[None]}
    assert value("segmentation", [(output, label)]) == pytest.approx((4 / 5 + 2 / 3) / 2)
    foreground = {"m": said[None, None].astype(np.float32)}
    assert value("segmentation", [(foreground, label)]) == pytest.approx((4 / 5 + 2 / 3) / 2)


def boxes(*rows: tuple[float, float, float, float, float]) -> dict[str, np.ndarray]:
    table = np.array(rows, np.float32).reshape(-1, 5)
    return {"boxes": table[None, :, :4], "scores": table[None, :, 4]}


def test_detection_is_mean_average_precision() -> None:
    truth = [[0, 0, 0, 10, 10], [0, 20, 20, 30, 30]]
    assert value("detection", [(boxes((0, 0, 10, 10, 0.9), (20, 20, 30, 30, 0.8)), truth)]) == pytest.approx(1.0)
    one_of_two = value("detection", [(boxes((0, 0, 10, 10, 0.9)), truth)])
    assert one_of_two == pytest.approx(51 / 101)
    first_wrong = value("detection", [(boxes((50, 50, 60, 60, 0.95), (0, 0, 10, 10, 0.9)), truth[:1])])
    assert first_wrong == pytest.approx(0.5)
    # overlap of 8 × 10 with 10 × 10 is 0.8: found at the thresholds up to 0.8, missed at three of ten
    assert value("detection", [(boxes((0, 0, 8, 10, 0.9)), truth[:1])]) == pytest.approx(0.7)
    doubled = boxes((0, 0, 10, 10, 0.9), (0, 0, 10, 10, 0.8))
    assert value("detection", [(doubled, truth[:1])]) == pytest.approx(1.0)
    assert value("detection", [(boxes(), truth)]) == 0.0


def test_detection_tells_classes_apart() -> None:
    found = boxes((0, 0, 10, 10, 0.9)) | {"classes": np.array([[1.0]])}
    assert value("detection", [(found, [[0, 0, 0, 10, 10]])], "boxes", "scores", "classes") == 0.0
    assert value("detection", [(found, [[1, 0, 0, 10, 10]])], "boxes", "scores", "classes") == pytest.approx(1.0)


def test_one_class_alone_has_no_area_and_no_correlation() -> None:
    assert np.isnan(value("auc", [(scores(0.1, 0.2), [1, 1])]))
    assert np.isnan(value("spearman", [(scores(1), 1), (scores(1), 2)]))


def test_a_metric_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "wherry_test_metric.py").write_text(
        "def best(outputs, labels):\n    return max(row['y'].max() for row in outputs) + sum(labels)\n"
        "def broken(outputs, labels):\n    return 1 / 0\n"
    )
    spec = MetricOf(name="wherry_test_metric:best", folder=str(tmp_path))
    metric = make(spec)
    assert metric.value([metric.evidence(scores(1, 5), 2)]) == 7
    broken = make(MetricOf(name="wherry_test_metric:broken", folder=str(tmp_path)))
    with pytest.raises(RefusedError, match="ZeroDivisionError") as caught:
        broken.value([broken.evidence(scores(1), 0)])
    assert caught.value.code == "metric_failed"


@pytest.mark.parametrize(
    ("name", "found", "label", "code"),
    [
        ("absolute_error", scores(1, 2, 3), [1, 2], "data_invalid"),
        ("auc", scores(1, 2, 3), [1, 0], "data_invalid"),
        ("spearman", scores(1, 2, 3), 1.0, "data_invalid"),
        ("segmentation", {"m": np.zeros((1, 2, 3, 3))}, np.zeros((2, 2)), "data_invalid"),
        ("no such", scores(1), 0, "metric_unknown"),
        ("nowhere:nothing", scores(1), 0, "metric_unknown"),
        ("math:pi", scores(1), 0, "metric_unknown"),
    ],
)
def test_labels_and_names_that_do_not_fit_are_refused(name: str, found: dict, label: object, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        value(name, [(found, label)])
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["detection", "cosine"])
def test_outputs_that_a_metric_cannot_read_are_told_with_their_shapes(name: str) -> None:
    metric = metrics.make(metrics.MetricOf(name=name))
    with pytest.raises(RefusedError, match=r"p \[1, 6\] with a label of shape \[2\]") as caught:
        metrics.evidence_of(metric, name, {"p": np.ones((1, 6), np.float32)}, [1.0, 2.0])
    assert caught.value.code == "metric_failed"


def test_a_metric_that_ends_the_program_ends_the_search_as_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wherry_test_exits.py").write_text("import sys\ndef score(outputs, labels):\n    sys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    metric = metrics.make(metrics.MetricOf(name="wherry_test_exits:score", folder=str(tmp_path)))
    with pytest.raises(RefusedError) as caught:
        metric.value([metric.evidence({"p": np.zeros(2)}, 1)])
    assert caught.value.code == "metric_failed"
