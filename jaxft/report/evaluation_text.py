"""Tables of an evaluation, at most 80 columns wide where the class names are short."""

from collections.abc import Iterator, Sequence

from jaxft.evaluation import Evaluation

_SHOWN = 20  # classes, and pairs of confused classes
_MATRIX = 8  # classes up to which the whole confusion matrix is printed


def evaluation_text(scores: Evaluation) -> Iterator[str]:
    """Yields the lines of an evaluation."""
    interval = ""
    if scores.interval:
        interval = "   95 % confidence: {:.4f} to {:.4f}".format(*scores.interval)
    yield f"  accuracy           {scores.accuracy:.4f}{interval}"
    if scores.top5 is not None and len(scores.classes) > 5:
        yield f"  top-5 accuracy     {scores.top5:.4f}"
    yield f"  cross entropy      {scores.loss:.4f}"
    if scores.calibration_error is not None:
        yield f"  calibration error  {scores.calibration_error:.4f}"
    yield ""
    yield from _class_table(scores)
    if scores.confusion is not None:
        yield ""
        yield from _confusion(scores, scores.confusion)


def _class_table(scores: Evaluation) -> Iterator[str]:
    classes = scores.classes
    if len(classes) > _SHOWN:
        classes = tuple(sorted(classes, key=lambda each: each.f1)[:_SHOWN])
        yield f"The {_SHOWN} of {len(scores.classes):,} classes with the lowest F1:"
    width = max(5, *(len(each.name) for each in classes))
    yield f"  {'class':{width}}  images  precision  recall      f1"
    for each in classes:
        yield (
            f"  {each.name:{width}}  {each.images:>6,}  {each.precision:>9.4f}  "
            f"{each.recall:.4f}  {each.f1:.4f}"
        )


def _confusion(scores: Evaluation, matrix: Sequence[Sequence[int]]) -> Iterator[str]:
    names = [each.name for each in scores.classes]
    if len(names) <= _MATRIX:
        yield "Images by class (row) and prediction (column):"
        width = max(map(len, names))
        columns = [max(len(name), 5) for name in names]
        heads = "  ".join(f"{name:>{n}}" for name, n in zip(names, columns, strict=True))
        yield f"  {'':{width}}  {heads}"
        for name, row in zip(names, matrix, strict=True):
            cells = "  ".join(f"{count:>{n},}" for count, n in zip(row, columns, strict=True))
            yield f"  {name:{width}}  {cells}"
        return
    pairs = [
        (count, names[true], names[predicted])
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    if not pairs:
        yield "No image is classified wrongly."
        return
    yield "Most frequent errors:"
    for count, true, predicted in sorted(pairs, reverse=True)[:_SHOWN]:
        yield f"  {count:>6,}  {true} classified as {predicted}"
