"""Tells split folders from class folders, and explains wrong folder layouts."""

import os
from collections.abc import Mapping

from jaxft.data.class_names import describe_differences, join_names, list_classes
from jaxft.data.image_files import (
    Folder,
    ImageListing,
    image_suffixes,
    is_broken_link,
    is_folder,
    is_image,
    printable,
    visible_entries,
)
from jaxft.errors import DataError

EXPECTED = (
    "images belong in PATH/train/<class>/ and PATH/val/<class>/, or all in PATH/<class>/ to have "
    "a fifth of them validate."
)
_TRAIN_NAMES = {"train", "training"}
_HELD_OUT_NAMES = {"val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev"}


def find_splits(root: Folder) -> dict[str, Folder]:
    """Returns the split folders by name, or `{"train": root}` if `root` holds class folders.

    The folders in `root` are splits if one of them has the name of a split (see `is_split_name`)
    and holds folders. Otherwise they are classes, even if one is called train.

    Raises:
      DataError: there are no folders, there is no training split, or the layout is ambiguous.
    """
    folders = subfolders(root)
    if not folders:
        raise DataError(
            f"{printable(root)} has no folders, neither of splits nor of classes"
            f"{_loose_images_hint(root)}; {EXPECTED}"
        )
    split_names = [name for name in folders if is_split_name(name)]
    if not split_names:
        return {"train": root}
    children = {name: _folder_names(path) for name, path in folders.items()}
    other_names = [name for name in folders if name not in split_names]
    class_like = [name for name in other_names if loose_images(folders[name])]
    if class_like and not any(children[name] for name in split_names):
        return {"train": root}
    train_names = [name for name in split_names if name.casefold() in _TRAIN_NAMES]
    if not train_names:
        raise DataError(
            f"{printable(root)} has no folder train; its folders: {', '.join(folders)}; {EXPECTED}"
        )
    # A folder that holds other folders than the training split also looks like a class.
    classes = {label for name in train_names for label in children[name]}
    class_like = [name for name in other_names if name in class_like or children[name] - classes]
    if len(class_like) > 1 and split_names == train_names:
        train = train_names[0]
        raise DataError(
            f"{printable(root)}: its folder {train} holds folders, as a split does, but "
            f"{join_names(class_like)} look like classes; {EXPECTED} If {train} is a class here, "
            f"put all of the classes into a folder {printable(root)}/train/."
        )
    return folders


def is_split_name(name: str) -> bool:
    """Returns whether a folder has a usual split name (train, val, test, ...), in any case."""
    return name.casefold() in _TRAIN_NAMES | _HELD_OUT_NAMES


def subfolders(folder: Folder) -> dict[str, Folder]:
    """Returns a folder's subfolders by printable name, sorted by name.

    Raises:
      DataError: an entry is a broken link to a folder, or two names differ only in how accented
        letters are encoded.
    """
    folders: dict[str, Folder] = {}
    suffixes = image_suffixes()
    for entry in sorted(visible_entries(folder), key=lambda entry: entry.name):
        path, name = folder / entry.name, printable(entry.name)
        if is_broken_link(entry) and not is_image(name, suffixes):
            raise DataError(
                f"{printable(path)} is a link to {printable(os.readlink(path))}, which is not "
                "there: bring the folder back (is its disk mounted?), or remove the link."
            )
        if not is_folder(entry):
            continue
        if name in folders:
            raise DataError(
                f"{printable(folder)} holds two folders called {name}, one with composed and one "
                "with decomposed letters: move the images of one into the other."
            )
        folders[name] = path
    return dict(sorted(folders.items()))


def loose_images(folder: Folder) -> list[str]:
    """Returns the names of the images directly in a folder, sorted."""
    suffixes = image_suffixes()
    return sorted(
        printable(entry.name)
        for entry in visible_entries(folder)
        if is_image(entry.name, suffixes) and not is_folder(entry)
    )


def check_same_classes(root: Folder, class_folders: Mapping[str, Mapping[str, Folder]]) -> None:
    """Checks that all splits have the same class folders.

    Args:
      root: the data set's folder.
      class_folders: class folders by split and name.

    Raises:
      DataError: the class folders differ, or a split has none.
    """
    for split, folders in class_folders.items():
        if not folders:
            has_splits = len(class_folders) > 1 or (root / split).is_dir()
            folder = root / split if has_splits else root
            raise DataError(
                f"no class folders in {printable(folder)}{_loose_images_hint(folder)}; {EXPECTED}"
            )
    if differences := describe_differences({s: list(names) for s, names in class_folders.items()}):
        raise DataError(
            f"{printable(root)}: {' and '.join(class_folders)} must have the same class folders. "
            f"{differences}"
        )


def check_class_folders(root: Folder, listings: Mapping[str, ImageListing]) -> None:
    """Checks that the class folders of a split hold neither splits nor other classes.

    Args:
      root: the folder that holds the class folders.
      listings: image files by class.

    Raises:
      DataError: a class folder holds splits, or the only class folder seems to hold the classes.
    """
    for name, listing in listings.items():
        folder = printable(listing.folder)
        split_names = [child for child in listing.image_folders if is_split_name(child)]
        if split_names:
            # In a data set one level further down, images lie in folders below the splits.
            is_class = listing.folder in {image.parent.parent for image in listing.images}
            hint = f"did you mean folder:{folder}?"
            if len(listings) > 1 and is_class:
                hint = f"these are splits within classes; {EXPECTED}"
            raise DataError(
                f"{printable(root)} holds {list_classes(list(listings))}, and {name} holds "
                f"{' and '.join(split_names)}: {hint}"
            )
        if len(listings) == 1 and len(listing.image_folders) > 1:
            raise DataError(
                f"{printable(root)} has a single class folder, {name}, which holds no images but "
                f"the folders {list_classes(listing.image_folders)}. If these are the classes, "
                f"move them one folder up, out of {folder}; {EXPECTED}"
            )


def _folder_names(folder: Folder) -> set[str]:
    return {printable(entry.name) for entry in visible_entries(folder) if is_folder(entry)}


def _loose_images_hint(folder: Folder) -> str:
    images = loose_images(folder)
    if not images:
        return ""
    count = f"{len(images):,} images lie" if len(images) > 1 else "an image lies"
    return f", but {count} there outside of any, such as {images[0]}"
