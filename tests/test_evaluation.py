"""Scores of an evaluation, against definitions written out."""

import numpy as np
import pytest

from jaxft import DataError, data
from jaxft.evaluation import evaluate, multi_label_scores, scores
from jaxft.report.evaluation_text import evaluation_text

LOGITS = np.array([[2, 0, -1], [0, 1, 0], [0, 3, 1], [1, 0, 0], [np.nan, 0, 0], [0, 0, 5]], float)
TARGETS = np.array([0, 1, 2, 0, 0, 2])


def test_scores_of_logits():
    found = scores(LOGITS, TARGETS, ("a", "b", "c"))
    assert (found.images, found.top5) == (6, 5 / 6)
    assert found.accuracy == 4 / 6  # the third is wrong, and the one with a NaN
    # Wilson 1927, with z = 1.959964: centre (p + z^2 / 2n) / (1 + z^2 / n).
    z, n, p = 1.959963984540054, 6, 4 / 6
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(found.interval, (centre - half, centre + half), rtol=1e-9)
    by_name = {each.name: each for each in found.classes}
    assert (by_name["b"].precision, by_name["b"].recall) == (0.5, 1.0)
    assert by_name["b"].f1 == pytest.approx(2 / 3)
    assert [each.images for each in found.classes] == [3, 1, 2]
    assert np.sum(found.confusion) == 6
    assert found.confusion[2][1] == 1


def test_calibration_error_of_two_bins():
    # Probabilities 0.9 and 0.6 of the first of two classes; 3 of 4 and 1 of 2 are right.
    logits = np.log(np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2))
    found = scores(logits, np.array([0, 0, 0, 1, 0, 1]), ("a", "b"))
    expected = (4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6
    assert found.calibration_error == pytest.approx(expected)
    assert found.loss == pytest.approx(-np.log([0.9, 0.9, 0.9, 0.1, 0.6, 0.4]).mean())


def test_multi_label_scores():
    logits = np.array([[1.0, -2.0], [3.0, 0.5]])
    found = multi_label_scores(logits, np.array([[1, 1], [1, 0]]), ("a", "b"))
    assert (found.accuracy, found.interval, found.confusion) == (0.5, None, None)
    losses = [
        np.log1p(np.exp(-1)),
        np.log1p(np.exp(2)),
        np.log1p(np.exp(-3)),
        np.log1p(np.exp(0.5)),
    ]
    assert found.loss == pytest.approx(np.mean(losses))
    assert [(each.precision, each.recall) for each in found.classes] == [(1.0, 1.0), (0.0, 0.0)]


class Constant:
    """A classifier whose logits are the images' first pixels."""

    classes, multi_label = ("ants", "bees", "crabs"), False

    def logits(self, source):
        return np.stack([np.asarray(source[i][0])[0, 0] for i in range(len(source))]).astype(float)


def test_evaluate_matches_classes_by_name():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[range(4), 0, 0, [1, 1, 0, 0]] = 9  # bees, bees, ants, ants
    found = evaluate(Constant(), data.arrays(images, np.array([0, 0, 1, 1]), ["bees", "ants"]))
    assert found.accuracy == 1
    assert [each.images for each in found.classes] == [2, 2, 0]


def test_evaluate_rejects_unknown_classes():
    images = data.arrays(np.zeros((1, 2, 2, 3), np.uint8), np.array([0]), ["bee"])
    with pytest.raises(DataError, match=r"1 classes .* does not know.*the same: bees .* and bee "):
        evaluate(Constant(), images)


def test_evaluate_rejects_other_kind_of_targets():
    images = data.arrays(np.zeros((1, 2, 2, 3), np.uint8), np.array([[0, 1, 1]]), Constant.classes)
    with pytest.raises(DataError, match="each image has several labels"):
        evaluate(Constant(), images)


@pytest.mark.parametrize("count", [3, 12, 30])
def test_evaluation_text_fits_the_terminal(count):
    rng = np.random.default_rng(0)
    names = [f"class {k}" for k in range(count)]
    found = scores(rng.normal(size=(200, count)), rng.integers(count, size=200), names)
    lines = list(evaluation_text(found))
    assert max(map(len, lines)) <= 80
    assert ("Most frequent errors:" in lines) == (count > 8)
    assert any("lowest F1" in line for line in lines) == (count > 20)
