"""Which folders of a data set are splits and which are classes, and what is wrong with them."""

import os
from collections.abc import Mapping
from pathlib import Path

from jaxft.data.class_names import differences, listed
from jaxft.data.image_files import (
    Listing,
    entries,
    image_suffixes,
    is_dead,
    is_folder,
    is_image,
    printable,
)
from jaxft.data.split_expressions import shown
from jaxft.errors import DataError

EXPECTED = (
    "images belong in PATH/train/<class>/ and PATH/val/<class>/, or all in PATH/<class>/ to have "
    "a fifth of them validate."
)
_TRAIN = {"train", "training"}
_SPLITS = _TRAIN | {"val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev"}


def splits_of(root: Path) -> dict[str, Path]:
    """Returns the folders of the splits by name; with classes only, `root` itself as `train`.

    Folders are splits if one is named as splits are (train, val, ... in any case) and holds
    folders. Otherwise they are classes, of which one may well be called train.

    Raises:
      DataError: there are no folders; none that trains; or they may be either.
    """
    folders = subfolders(root)
    if not folders:
        raise DataError(
            f"{printable(root)} has no folders, neither of splits nor of classes"
            f"{_images_instead(root)}; {EXPECTED}"
        )
    named = [name for name in folders if names_a_split(name)]
    below = {name: _folder_names(folders[name]) for name in folders} if named else {}
    others = [name for name in below if name not in named and images_beside(folders[name])]
    if not named or (others and not any(below[name] for name in named)):
        return {"train": root}
    training = [name for name in named if name.casefold() in _TRAIN]
    if not training:
        raise DataError(
            f"{printable(root)} has no folder train; its folders: {', '.join(folders)}; {EXPECTED}"
        )
    # Beside a split that trains and none that validates, several folders look like classes.
    classes = {label for name in training for label in below[name]}
    others += [name for name in below if name not in named and below[name] - classes]
    if len(others) > 1 and named == training:
        raise DataError(
            f"{printable(root)}: its folder {named[0]} holds folders, as a split does, but "
            f"{shown(others)} look like classes; {EXPECTED} If {named[0]} is a class here, put all "
            f"of the classes into a folder {printable(root)}/train/."
        )
    return folders


def subfolders(folder: Path) -> dict[str, Path]:
    """Returns the folders that a folder holds by their printable names, in the order of these.

    Raises:
      DataError: one is a link that leads nowhere; or two have the same name, but for the way in
        which letters with accents are written.
    """
    found: dict[str, Path] = {}
    suffixes = image_suffixes()
    for entry in sorted(entries(folder), key=lambda each: each.name):
        path, name = Path(entry.path), printable(entry.name)
        if is_dead(entry) and not is_image(name, suffixes):
            raise DataError(
                f"{printable(path)} is a link to {printable(os.readlink(path))}, which is not "
                "there: bring the folder back (is its disk mounted?), or remove the link."
            )
        if not is_folder(entry):
            continue
        if name in found:
            raise DataError(
                f"{printable(folder)} holds two folders called {name}, one with composed and one "
                "with decomposed letters: move the images of one into the other."
            )
        found[name] = path
    return dict(sorted(found.items()))


def images_beside(folder: Path) -> list[str]:
    """Returns the names of the images that lie in a folder itself, in order."""
    suffixes = image_suffixes()
    return sorted(
        printable(entry.name)
        for entry in entries(folder)
        if is_image(entry.name, suffixes) and not is_folder(entry)
    )


def check_names(root: Path, classes: Mapping[str, Mapping[str, Path]]) -> None:
    """Checks that all splits have the same class folders; `classes` are by split and name.

    Raises:
      DataError: they have not, or one has none.
    """
    for name, folders in classes.items():
        if not folders:
            place = root if len(classes) == 1 and not (root / name).is_dir() else root / name
            raise DataError(
                f"no class folders in {printable(place)}{_images_instead(place)}; {EXPECTED}"
            )
    if found := differences({split: list(names) for split, names in classes.items()}):
        raise DataError(
            f"{printable(root)}: {' and '.join(classes)} must have the same class folders. {found}"
        )


def check_depth(root: Path, listings: Mapping[str, Listing]) -> None:
    """Checks that what should be the classes of a split, in `root`, holds images and not splits.

    Raises:
      DataError: a class folder holds splits, or the only one holds what may be classes.
    """
    for name, listing in listings.items():
        place = printable(listing.folder)
        splits = [below for below in listing.folders if names_a_split(below)]
        if (
            splits
            and len(listings) > 1
            and listing.folder in {image.parent.parent for image in listing.images}
        ):
            raise DataError(
                f"{printable(root)} holds {listed(list(listings))}, and {name} holds "
                f"{' and '.join(splits)}: these are splits within classes; {EXPECTED}"
            )
        if splits:
            raise DataError(
                f"{printable(root)} holds {listed(list(listings))}, and {name} holds "
                f"{' and '.join(splits)}: did you mean folder:{place}?"
            )
        if len(listings) == 1 and len(listing.folders) > 1:
            raise DataError(
                f"{printable(root)} has a single class folder, {name}, which holds no images but "
                f"the folders {listed(listing.folders)}. If these are the classes, move them one "
                f"folder up, out of {place}; {EXPECTED}"
            )


def _folder_names(folder: Path) -> set[str]:
    return {printable(entry.name) for entry in entries(folder) if is_folder(entry)}


def names_a_split(name: str) -> bool:
    """Returns whether a folder is called as splits are: train, val, test and so on, in any case."""
    return name.casefold() in _SPLITS


def _images_instead(folder: Path) -> str:
    images = images_beside(folder)
    if not images:
        return ""
    count = f"{len(images):,} images lie" if len(images) > 1 else "an image lies"
    return f", but {count} there outside of any, such as {images[0]}"
