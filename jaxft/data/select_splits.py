"""Selects the training and validation images of a run from a collection."""

from collections.abc import Callable, Iterable

import numpy as np

from jaxft.data.class_names import describe_differences, join_names
from jaxft.data.concat import gather
from jaxft.data.source import (
    Collection,
    Source,
    Splits,
    emptied_classes,
    images_per_class,
    is_multi_label,
    pixel_type,
)
from jaxft.data.split_expressions import Term, class_counts, class_orders, indices, parse
from jaxft.errors import DataError

_VALIDATION_NAMES = ("val", "validation", "valid")


def select(
    collection: Collection,
    *,
    train: str | None = None,
    val: str | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Splits:
    """Selects the splits of a run by the rules of `open_source`, with remarks for the user.

    Raises:
      DataError: a split is missing, an expression is wrong or selects no image, `shots` is too
        large, or the training images lack a class that the data has.
    """
    # Open the splits that take part.
    train_expression = _training_split(collection) if train is None else train
    train_terms = _parse(collection, train_expression, "train")
    train_splits = tuple(dict.fromkeys(term.split for term in train_terms))
    val_candidates = _validation_splits(collection, train_splits)
    val_expression = val_candidates[0] if val is None and val_candidates else val
    val_terms = () if val_expression is None else _parse(collection, val_expression, "val")
    names = tuple(dict.fromkeys(term.split for term in (*train_terms, *val_terms)))
    sources = collection.read(names)
    pool = _Pool(tuple(sources[name] for name in names), names, seed)
    _check_sources(collection.name, names, pool.sources)
    multi_label = is_multi_label(pool.sources[0])
    if multi_label and shots is not None:
        raise DataError(
            f"{collection.name}: shots={shots} selects within classes, and images may have several "
            "labels: select by position with train=, such as train[:100]."
        )
    remarks = [text for source in pool.sources for text in getattr(source, "remarks", ())]
    if val is None and len(val_candidates) > 1:
        unused = val_candidates[1]
        remarks.append(f"{collection.name}: {val_expression} validates, {unused} is left out.")

    # Select the training images.
    candidates = pool.indices(Term(name, name) for name in train_splits)
    train_indices = pool.indices(train_terms)
    remainder = np.setdiff1d(candidates, train_indices)
    is_drawn = shots is None and not val_terms and not len(remainder)
    if shots is not None:
        # Leave at least one image of each class if nothing else can validate.
        held_out = 0 if val_terms or len(remainder) else 1
        offered = len(train_indices)
        train_indices = train_indices[_few_shot(pool.gather(train_indices), shots, seed, held_out)]
        if val_terms and offered > len(train_indices):
            remarks.append(
                f"shots={shots} trains on {len(train_indices):,} of {offered:,} images; the others "
                "are left out."
            )
    elif is_drawn:
        train_indices = train_indices[_draw(pool.gather(train_indices), seed, _four_fifths)]
    train_source = pool.gather(train_indices)

    # Select the validation images.
    val_indices = pool.indices(val_terms) if val_terms else np.setdiff1d(candidates, train_indices)
    if not len(val_indices):
        raise DataError(
            f"{collection.name}: no image is left to validate with. Images per class: "
            f"{class_counts(train_source)}. Name a split with val=, or add images."
        )
    val_source = pool.gather(val_indices)
    if not val_terms:
        train_names = " and ".join(train_splits)
        rule = f"the rest of {train_names} validates"
        if is_drawn:
            part = train_names if multi_label else f"each class of {train_names}"
            rule = f"20 % of {part}, drawn with seed {seed}, validate"
        remarks.append(
            f"{collection.name} has no validation split (it has {', '.join(collection.splits)}): "
            f"{rule}, {len(val_indices):,} images."
        )
    if overlap := len(np.intersect1d(train_indices, val_indices)):
        remarks.append(
            f"Images that both train and validate: {overlap:,}. The validation score is biased."
        )

    if not (multi_label and is_drawn):  # a draw over all images may miss a rare label
        _check_training_classes(collection.name, pool.gather(candidates), train_source, train)
    remarks += _missing_classes(train_source, "train")
    remarks += _missing_classes(val_source, "validate with")
    return Splits(train_source, val_source, tuple(remarks))


def select_one(collection: Collection, expression: str | None = None, *, seed: int = 0) -> Source:
    """Selects the images of an evaluation from a collection.

    Args:
      collection: all splits.
      expression: split expression, such as `test` or `val+test[:50%]`; by default the split val,
        validation or valid, or the only split.
      seed: determines random selections.

    Raises:
      DataError: a split is missing, several could be meant, or the expression is wrong.
    """
    if expression is None:
        candidates = _validation_splits(collection, ()) or list(collection.splits)
        if len(candidates) > 1 and candidates[0].casefold() not in _VALIDATION_NAMES:
            raise DataError(
                f"{collection.name} has no validation split; its splits: "
                f"{', '.join(collection.splits)}. Name the one to evaluate with split= (--split)."
            )
        expression = candidates[0]
    terms = _parse(collection, expression, "split")
    names = tuple(dict.fromkeys(term.split for term in terms))
    sources = collection.read(names)
    pool = _Pool(tuple(sources[name] for name in names), names, seed)
    _check_sources(collection.name, names, pool.sources)
    return pool.gather(pool.indices(terms))


class _Pool:
    """The splits in use, concatenated, so that one index identifies an image."""

    def __init__(self, sources: tuple[Source, ...], names: tuple[str, ...], seed: int):
        self.sources, self.names, self.seed = sources, names, seed
        self.offsets = np.cumsum([0, *map(len, sources)])

    def indices(self, terms: Iterable[Term]) -> np.ndarray:
        """Returns the images that the terms select, int64 [k], in the order of the terms."""
        selected = []
        for term in terms:
            k = self.names.index(term.split)
            selected.append(self.offsets[k] + indices(term, self.sources[k], self.seed))
        return np.concatenate(selected)

    def gather(self, selected: np.ndarray) -> Source:
        """Returns the source of the images at these indices."""
        return gather(self.sources, selected)


def _training_split(collection: Collection) -> str:
    if "train" in collection.splits:
        return "train"
    if len(collection.splits) == 1:
        return collection.splits[0]
    similar = next((s for s in collection.splits if s.casefold().startswith("train")), "SPLIT")
    raise DataError(
        f"{collection.name} has no split train; its splits: {', '.join(collection.splits)}. Name "
        f"the one that trains with train='{similar}' (--train-split {similar}), or rename it to "
        "train."
    )


def _validation_splits(collection: Collection, train_splits: tuple[str, ...]) -> list[str]:
    """Returns the splits with a usual validation name, the preferred one first."""
    unused = [split for split in collection.splits if split not in train_splits]
    by_name = {split.casefold(): split for split in reversed(unused)}
    return [by_name[name] for name in _VALIDATION_NAMES if name in by_name]


def _parse(collection: Collection, expression: str, argument: str) -> tuple[Term, ...]:
    """Parses an expression, and replaces `all` by all splits."""
    terms: list[Term] = []
    for term in parse(expression):
        if term.split == "all" and "all" not in collection.splits:
            terms += [Term(name, name) for name in collection.splits]
        else:
            terms.append(term)
    if missing := sorted({term.split for term in terms} - set(collection.splits)):
        raise DataError(
            f"{collection.name} has no split {' and no split '.join(missing)}, which "
            f"{argument}='{expression}' names. Its splits: {', '.join(collection.splits)}."
        )
    return tuple(terms)


def _check_sources(name: str, splits: tuple[str, ...], sources: tuple[Source, ...]) -> None:
    first_split, first = splits[0], sources[0]
    for split, source in zip(splits, sources, strict=True):
        if not len(source):
            raise DataError(f"{name}: {split} has no images.")
        if source.classes != first.classes:
            differences = describe_differences({first_split: first.classes, split: source.classes})
            raise DataError(
                f"{name}: {first_split} and {split} must have the same classes in the same order, "
                f"but have {join_names(first.classes)} and {join_names(source.classes)}. "
                f"{differences}"
            )
        if pixel_type(source) != pixel_type(first):
            raise DataError(
                f"{name}: images of {first_split} are {pixel_type(first)}, but images of {split} "
                f"are {pixel_type(source)}: give both as uint8, or both normalised."
            )
        if is_multi_label(source) != is_multi_label(first):
            shapes = list(first.targets.shape), list(source.targets.shape)
            raise DataError(
                f"{name}: targets of {first_split} have shape {shapes[0]}, but targets of {split} "
                f"{shapes[1]}: give both as classes [n], or both as labels [n k]."
            )
        _check_targets(f"{name}: targets of {split}", source)


def _check_targets(subject: str, source: Source) -> None:
    targets, count = source.targets, len(source.classes)
    if is_multi_label(source):
        if targets.shape[1] != count or targets.dtype.kind not in "biu":
            raise DataError(
                f"{subject} are {targets.dtype} of shape {list(targets.shape)}, but with {count} "
                f"classes labels are integers [n {count}], 0 or 1."
            )
        if targets.min() < 0 or targets.max() > 1:
            raise DataError(
                f"{subject} go from {targets.min()} to {targets.max()}, but labels are 0 or 1."
            )
    elif targets.min() < 0 or targets.max() >= count:
        raise DataError(
            f"{subject} go from {targets.min()} to {targets.max()}, outside of the {count} "
            f"classes (0..{count - 1})."
        )


def _check_training_classes(
    name: str, candidates: Source, train: Source, expression: str | None
) -> None:
    missing = emptied_classes(candidates, train)
    if len(missing):
        classes = candidates.classes
        way_out = "slice within each class, such as train[:80%/class]"
        if is_multi_label(train):
            way_out = "shuffle them, or select others"
        raise DataError(
            f"{name}: train='{expression}' leaves no images of {len(missing)} of "
            f"{len(classes)} classes: {join_names([classes[k] for k in missing])}. The images may "
            f"be sorted by class: {way_out}."
        )


def _missing_classes(source: Source, purpose: str) -> list[str]:
    counts = images_per_class(source)
    missing = [source.classes[k] for k in np.flatnonzero(counts == 0)]
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(source.classes)} classes have no images to {purpose}: "
        f"{join_names(missing)}."
    ]


def _few_shot(source: Source, shots: int, seed: int, held_out: int) -> np.ndarray:
    """Draws `shots` images of each class, and leaves at least `held_out` of each."""
    counts = images_per_class(source)
    limit = counts[counts > 0].min() - held_out
    if shots > limit:
        raise DataError(
            f"shots={shots} is too many: each class allows at most {limit}"
            + (f" ({held_out} must remain for validation)" if held_out else "")
            + f". Images per class: {class_counts(source)}."
        )
    return _draw(source, seed, lambda count: shots)


def _draw(source: Source, seed: int, size: Callable[[int], int]) -> np.ndarray:
    """Draws `size(count)` of the `count` images of each class; returns sorted indices."""
    selected = [members[: size(len(members))] for members in class_orders(source, seed)]
    return np.sort(np.concatenate(selected))


def _four_fifths(count: int) -> int:
    """Returns 80 % of `count`, but less than `count` if it is at least 2."""
    return min(round(0.8 * count), max(count - 1, 1))
