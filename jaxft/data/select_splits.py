"""Which images of a collection train and which validate."""

from collections.abc import Callable, Iterable

import numpy as np

from jaxft.data.class_names import differences
from jaxft.data.concat import gather
from jaxft.data.source import Collection, Source, Splits, pixel_type
from jaxft.data.split_expressions import Part, class_orders, indices, parse, shown, tally
from jaxft.errors import DataError

_VALIDATION = ("val", "validation", "valid")


def select(
    collection: Collection,
    *,
    train: str | None = None,
    val: str | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Splits:
    """The splits of a run, as `open_source` describes them; remarks say what is not evident.

    Raises:
      DataError: a split is missing, an expression is wrong or empty, `shots` are too many, or
        what trains lacks a class that the data has.
    """
    training = _training_split(collection) if train is None else train
    to_train = _parts(collection, training, "train")
    own = tuple(dict.fromkeys(part.split for part in to_train))
    by_word = {split.casefold(): split for split in reversed(collection.splits) if split not in own}
    usual = [by_word[word] for word in _VALIDATION if word in by_word]
    validation = usual[0] if val is None and usual else val
    to_validate = () if validation is None else _parts(collection, validation, "val")
    names = tuple(dict.fromkeys(part.split for part in (*to_train, *to_validate)))
    sources = collection.read(names)
    parts = _Laid(tuple(sources[name] for name in names), names, seed)
    _check_sources(collection.name, names, parts.sources)

    chosen = parts.of(to_train)
    remarks = [text for source in parts.sources for text in getattr(source, "remarks", ())]
    if val is None and len(usual) > 1:
        remarks.append(f"{collection.name}: {validation} validates, {usual[1]} is left out.")
    whole = parts.of(Part(name, name) for name in own)
    left = np.setdiff1d(whole, chosen)
    if shots is not None:
        # At least one of each class must remain where nothing else could validate.
        leave = 0 if to_validate or len(left) else 1
        offered = len(chosen)
        chosen = chosen[_shots(parts.gather(chosen), shots, seed, leave)]
        if to_validate and offered > len(chosen):
            remarks.append(
                f"shots={shots} trains on {len(chosen):,} of {offered:,} images; the others are "
                "left out."
            )
    elif not to_validate and not len(left):
        chosen = chosen[_of_each(parts.gather(chosen), seed, _four_fifths)]
    held_out = parts.of(to_validate) if to_validate else np.setdiff1d(whole, chosen)
    if not len(held_out):
        raise DataError(
            f"{collection.name}: no image is left to validate with. Images per class: "
            f"{tally(parts.gather(chosen))}. Name a split with val=, or add images."
        )

    splits = Splits(parts.gather(chosen), parts.gather(held_out))
    if not to_validate:
        rule = f"what train leaves of {' and '.join(own)} validates"
        if shots is None and not len(left):
            rule = f"20 % of each class of {' and '.join(own)}, drawn with seed {seed}, validates"
        remarks.append(
            f"{collection.name} has no validation split (it has {', '.join(collection.splits)}): "
            f"{rule}, {len(held_out):,} images."
        )
    if both := len(np.intersect1d(chosen, held_out)):
        remarks.append(f"Images that both train and validate: {both:,}. The scores will flatter.")
    _check_classes(collection.name, parts.gather(whole), splits.train, train)
    for name, source in (("train", splits.train), ("validate with", splits.val)):
        missing = np.flatnonzero(np.bincount(source.targets, minlength=len(source.classes)) == 0)
        if len(missing):
            named = shown([source.classes[k] for k in missing])
            remarks.append(
                f"{len(missing)} of {len(source.classes)} classes have no images to {name}: "
                f"{named}."
            )
    return Splits(splits.train, splits.val, tuple(remarks))


class _Laid:
    """The splits in use laid end to end, so that an image is one number."""

    def __init__(self, sources: tuple[Source, ...], names: tuple[str, ...], seed: int):
        self.sources, self.names, self.seed = sources, names, seed
        self.starts = np.cumsum([0, *map(len, sources)])

    def of(self, parts: Iterable[Part]) -> np.ndarray:
        """The images of the parts, int64 [k], in their order."""
        numbers = [(self.names.index(part.split), part) for part in parts]
        return np.concatenate(
            [self.starts[k] + indices(part, self.sources[k], self.seed) for k, part in numbers]
        )

    def gather(self, chosen: np.ndarray) -> Source:
        return gather(self.sources, chosen)


def _training_split(collection: Collection) -> str:
    if "train" in collection.splits:
        return "train"
    if len(collection.splits) == 1:
        return collection.splits[0]
    near = next((s for s in collection.splits if s.casefold().startswith("train")), None)
    raise DataError(
        f"{collection.name} has no split train; its splits: {', '.join(collection.splits)}. Name "
        f"the one that trains with train='{near or 'SPLIT'}' (--train-split {near or 'SPLIT'}), or "
        "rename it to train."
    )


def _parts(collection: Collection, expression: str, argument: str) -> tuple[Part, ...]:
    parts = parse(expression)
    if "all" not in collection.splits:
        every = tuple(Part(name, name) for name in collection.splits)
        parts = tuple(p for part in parts for p in (every if part.split == "all" else (part,)))
    if missing := sorted({p.split for p in parts} - set(collection.splits)):
        raise DataError(
            f"{collection.name} has no split {' and no split '.join(missing)}, which "
            f"{argument}='{expression}' names. Its splits: {', '.join(collection.splits)}."
        )
    return parts


def _check_sources(name: str, names: tuple[str, ...], sources: tuple[Source, ...]) -> None:
    for split, source in zip(names, sources, strict=True):
        count = len(source.classes)
        if not len(source):
            raise DataError(f"{name}: {split} has no images.")
        if source.classes != sources[0].classes:
            both = {names[0]: sources[0].classes, split: source.classes}
            raise DataError(
                f"{name}: {names[0]} and {split} must have the same classes in the same order, "
                f"but have {shown(sources[0].classes)} and {shown(source.classes)}. "
                f"{differences(both)}"
            )
        if (kind := pixel_type(source)) != (other := pixel_type(sources[0])):
            raise DataError(
                f"{name}: the images of {names[0]} are {other} and those of {split} {kind}: give "
                "both as levels of 0..255, or both normalised."
            )
        if source.targets.min() < 0 or source.targets.max() >= count:
            raise DataError(
                f"{name}: targets of {split} go from {source.targets.min()} to "
                f"{source.targets.max()}, outside of the {count} classes (0..{count - 1})."
            )


def _check_classes(name: str, whole: Source, train: Source, expression: str | None) -> None:
    lost = np.setdiff1d(whole.targets, train.targets)
    if len(lost):
        raise DataError(
            f"{name}: train='{expression}' leaves no images of {len(lost)} of "
            f"{len(whole.classes)} classes: {shown([whole.classes[k] for k in lost])}. Images may "
            "lie in the order of their classes: slice within each, such as train[:80%/class]."
        )


def _shots(source: Source, shots: int, seed: int, leave: int) -> np.ndarray:
    counts = np.bincount(source.targets, minlength=len(source.classes))
    most = counts[counts > 0].min() - leave
    if shots > most:
        raise DataError(
            f"shots={shots} is too many: each class allows at most {most}"
            + (f" ({leave} must remain for validation)" if leave else "")
            + f". Images per class: {tally(source)}."
        )
    return _of_each(source, seed, lambda count: shots)


def _of_each(source: Source, seed: int, wanted: Callable[[int], int]) -> np.ndarray:
    chosen = [members[: wanted(len(members))] for members in class_orders(source, seed)]
    return np.sort(np.concatenate(chosen))


def _four_fifths(count: int) -> int:
    """80 % of a class, but never all of one that could also validate."""
    return min(round(0.8 * count), max(count - 1, 1))
