"""Evaluates a classifier: accuracy and its uncertainty, calibration, errors by class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import log_expit, log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from jaxft.classifier import Classifier
from jaxft.data.class_names import describe_differences
from jaxft.data.source import Source, is_multi_label
from jaxft.errors import DataError

CONFIDENCE = 0.95
BINS = 15  # of the calibration error, as in Guo et al.


@dataclass(frozen=True)
class ClassScore:
    """Score of one class: precision, recall, their harmonic mean, and its number of images."""

    name: str
    precision: float
    recall: float
    f1: float
    images: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of a classifier on labelled images.

    Attributes:
      images: number of images.
      accuracy: share of correct images; with several labels, mean share of correct labels.
      interval: 95 % confidence interval of the accuracy (Wilson 1927); None with several labels,
        which depend on each other within an image.
      top5: share of images whose class is among the five most probable; None with several labels.
      loss: mean cross entropy in nats; with several labels, the mean binary cross entropy.
      calibration_error: expected calibration error of the most probable class in 15 bins of equal
        width (Guo et al. 2017, arXiv:1706.04599); None with several labels.
      classes: score of each class. A precision or recall of no images is 0.
      confusion: number of images by class (row) and prediction (column), `[k k]`; None with several
        labels.
    """

    images: int
    accuracy: float
    interval: tuple[float, float] | None
    top5: float | None
    loss: float
    calibration_error: float | None
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None

    def to_json(self) -> dict[str, Any]:
        """Returns the scores as values that JSON can hold."""
        return asdict(self)


def evaluate(classifier: Classifier, source: Source) -> Evaluation:
    """Evaluates a classifier on labelled images; classes are matched by name.

    Args:
      classifier: the classifier.
      source: images. It may lack classes of the classifier, and may have them in another order.

    Raises:
      DataError: the images have a class that the classifier does not know.
    """
    return score_logits(*labelled_logits(classifier, source), classifier.classes)


def labelled_logits(
    classifier: Classifier, source: Source
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"] | Int[np.ndarray, "n k"]]:
    """Returns the logits of labelled images, and their targets in the classifier's classes.

    Raises:
      DataError: as in `evaluate`.
    """
    if is_multi_label(source) != classifier.multi_label:
        kinds = ("one class", "several labels")
        raise DataError(
            f"each image has {kinds[is_multi_label(source)]}, but the classifier was trained for "
            f"{kinds[classifier.multi_label]}."
        )
    columns = _columns(classifier.classes, source.classes)
    logits = classifier.logits(source)
    if classifier.multi_label:
        targets = np.zeros(logits.shape, np.int32)
        targets[:, columns] = source.targets
        return logits, targets
    return logits, columns[source.targets]


def score_logits(
    logits: Float[np.ndarray, "n k"],
    targets: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"],
    classes: Sequence[str],
) -> Evaluation:
    """Returns `scores`, or `multi_label_scores` for targets of several labels."""
    function = multi_label_scores if targets.ndim == 2 else scores
    return function(logits, targets, classes)


def scores(
    logits: Float[np.ndarray, "n k"], targets: Int[np.ndarray, " n"], classes: Sequence[str]
) -> Evaluation:
    """Returns the scores of logits for images of one class each.

    A row with a NaN counts as wrong, as in training.
    """
    log_probabilities = log_softmax(np.asarray(logits, np.float64), -1)
    predictions, rows = log_probabilities.argmax(-1), np.arange(len(targets))
    own = log_probabilities[rows, targets]
    rank = np.sum(~(log_probabilities <= own[:, None]), -1)
    hits = (predictions == targets) & (rank == 0)
    return Evaluation(
        images=len(targets),
        accuracy=float(hits.mean()),
        interval=_wilson(int(hits.sum()), len(hits)),
        top5=float((rank < min(5, logits.shape[1])).mean()),
        loss=float(-own.mean()),
        calibration_error=_calibration_error(np.exp(log_probabilities.max(-1)), hits),
        classes=_class_scores(targets, predictions, classes),
        confusion=tuple(
            tuple(row)
            for row in confusion_matrix(
                targets, predictions, labels=np.arange(len(classes))
            ).tolist()
        ),
    )


def multi_label_scores(
    logits: Float[np.ndarray, "n k"], targets: Int[np.ndarray, "n k"], classes: Sequence[str]
) -> Evaluation:
    """Returns the scores of logits for images with several labels; a logit above 0 predicts one."""
    logits = np.asarray(logits, np.float64)
    predictions = (logits > 0).astype(np.int32)
    losses = -(targets * log_expit(logits) + (1 - targets) * log_expit(-logits))
    return Evaluation(
        images=len(targets),
        accuracy=float((predictions == targets).mean()),
        interval=None,
        top5=None,
        loss=float(losses.mean()),
        calibration_error=None,
        classes=_class_scores(targets, predictions, classes),
        confusion=None,
    )


def _columns(classes: Sequence[str], source_classes: Sequence[str]) -> np.ndarray:
    """Returns the index in `classes` of each class of the images."""
    if unknown := [name for name in source_classes if name not in classes]:
        differences = describe_differences({"the classifier": classes, "the images": unknown})
        raise DataError(
            f"the images have {len(unknown)} classes that the classifier does not know. "
            f"{differences}"
        )
    return np.array([classes.index(name) for name in source_classes])


def _class_scores(
    targets: np.ndarray, predictions: np.ndarray, classes: Sequence[str]
) -> tuple[ClassScore, ...]:
    columns = precision_recall_fscore_support(
        targets, predictions, labels=np.arange(len(classes)), zero_division=0.0
    )
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return tuple(ClassScore(*row) for row in rows)


def _wilson(hits: int, images: int) -> tuple[float, float]:
    interval = binomtest(hits, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_bins(
    confidence: Float[np.ndarray, " n"], hits: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "3 bins"]:
    """Returns images, sum of confidences and number of hits, by bin of the confidence.

    Args:
      confidence: probability of the predicted class; NaN counts as 0.
      hits: whether the prediction is right.
    """
    confidence = np.nan_to_num(confidence)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    weights = (np.ones(len(hits)), confidence, hits)
    return np.stack([np.bincount(bins, each, BINS) for each in weights])


def _calibration_error(confidence: np.ndarray, hits: np.ndarray) -> float:
    """Returns the mean over the images of |accuracy - confidence| of their bin."""
    _, confidences, correct = calibration_bins(confidence, hits)
    return float(np.abs(correct - confidences).sum() / len(hits))
