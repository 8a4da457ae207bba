"""Reads WebDataset shards: tar files of images with their classes.

The headers of all shards are read once, in order. An image is then read by its position in its
shard, so that batches have the order of any other source and need no shuffle buffer.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from jaxft.data import validate
from jaxft.data.class_names import join_names, sorted_classes
from jaxft.data.decode import decode
from jaxft.data.folder_layout import is_split_name
from jaxft.data.image_files import image_suffixes, printable
from jaxft.data.source import Collection
from jaxft.data.tar_index import TarMember, read_samples, reading
from jaxft.errors import DataError, first_of
from jaxft.progress import track

_EXPECTED = "give webdataset:PATH/shard-{000..012}.tar, or a folder of .tar files"
_JSON_KEYS = ("cls", "label", "class")
_MAX_SAMPLES = 5  # samples in one message


@dataclass(frozen=True, eq=False)
class TarSource:
    """A `Source` of images in tar files, decoded on access.

    Attributes:
      shards: the tar files.
      classes: class names.
      names: name of each image in its shard.
      positions: shard, start and size in bytes of each image, int64 [n 3].
      targets: int32 [n].
    """

    shards: tuple[Path, ...]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    positions: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """Returns the RGB image and its target.

        Raises:
          DataError: the image cannot be read.
        """
        try:
            return decode(self._content(index)), int(self.targets[index])
        except DataError as error:
            raise DataError(f"{self._place(index)} cannot be read: {error}") from error

    def problem(self, index: int, /) -> str | None:
        """Returns the image's place and why it cannot be decoded, or None if it can."""
        try:
            return validate.problem(self._content(index), self._place(index))
        except DataError as error:
            return f"{self._place(index)}: {error}"

    def identity(self, index: int, /) -> str:
        """Returns the names of shard and image, and the image's size in bytes."""
        shard, _, size = self.positions[index]
        return f"{self.shards[shard].name}/{self.names[index]}\0{size}"

    def take(self, indices: np.ndarray) -> "TarSource":
        """Returns the source of these examples only, with the same classes."""
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            positions=self.positions[indices],
            targets=self.targets[indices],
        )

    def _content(self, index: int) -> bytes:
        shard, offset, size = self.positions[index].tolist()
        try:
            with self.shards[shard].open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(error.strerror) from error
        if len(content) < size:
            raise DataError("the shard is shorter than when the run began")
        return content

    def _place(self, index: int) -> str:
        return f"{printable(self.shards[self.positions[index, 0]])}/{printable(self.names[index])}"


def find(place: str) -> Collection:
    """Returns the splits of WebDataset shards.

    A pattern is one split named train. In a folder, the split is in the name of each shard, such as
    `imagenet-val-003.tar`. A folder without shards has a folder of shards for each split.

    Raises:
      DataError: there are no shards, or the splits of some are unknown.
    """
    root, name = Path(place).expanduser(), f"webdataset:{printable(place)}"
    if not place:
        raise DataError(f"data 'webdataset:' names no shards: {_EXPECTED}.")
    if root.is_dir():
        shards = _folder_splits(name, root)
    else:
        shards = {"train": [Path(each) for each in _expand(str(root))]}
        missing = [printable(file) for file in shards["train"] if not file.is_file()]
        if not shards["train"]:
            raise DataError(f"{name} names no shards: {_EXPECTED}.")
        if missing:
            raise DataError(
                f"{name}: {len(missing)} of {len(shards['train'])} shards do not exist "
                f"(looked from {printable(Path.cwd())}): {join_names(missing)}; {_EXPECTED}."
            )
    return Collection(name, tuple(shards), partial(_read, shards))


def _expand(pattern: str) -> list[str]:
    """Returns the names of a pattern with ranges such as `{000..012}`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    names = (f"{pattern[: match.start()]}{n}{pattern[match.end() :]}" for n in numbers)
    return [each for name in names for each in _expand(name)]


def _folder_splits(name: str, root: Path) -> dict[str, list[Path]]:
    """Returns the shards in a folder by split."""
    files = sorted(root.glob("*.tar"))
    if not files:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        shards = {path.name: sorted(path.glob("*.tar")) for path in folders}
        shards = {split: paths for split, paths in shards.items() if paths}
        if shards:
            return shards
        compressed = [path.name for path in sorted(root.glob("*.t*gz"))]
        hint = f"; unpack {join_names(compressed)} to plain .tar files" if compressed else ""
        raise DataError(f"{name} holds no .tar files{hint}: {_EXPECTED}.")
    shards, unknown = {}, []
    for file in files:
        words = [word for word in re.split(r"[-_.]", file.stem) if is_split_name(word)]
        if words:
            shards.setdefault(words[0], []).append(file)
        else:
            unknown.append(file)
    if shards and unknown:
        raise DataError(
            f"{name}: the names of some shards have a split ({', '.join(shards)}), and those of "
            f"{join_names([file.name for file in unknown])} have none: rename them, or move them."
        )
    return shards or {"train": unknown}


def _read(shards: Mapping[str, Sequence[Path]], splits: Sequence[str]) -> dict[str, TarSource]:
    """Reads the headers of all shards and returns the splits; the classes are all labels."""
    samples: dict[str, list[tuple[str, str, tuple[int, int, int]]]] = {}
    with track("Reading the headers of shards", sum(map(len, shards.values())), "files") as work:
        for split, files in shards.items():
            samples[split] = []
            for number, file in enumerate(files):
                samples[split] += _labelled_images(file, number)
                work.advance()
    classes = sorted_classes(label for label, *_ in chain(*samples.values()))
    index = {name: k for k, name in enumerate(classes)}
    return {
        split: TarSource(
            shards=tuple(shards[split]),
            classes=classes,
            names=tuple(name for _, name, _ in samples[split]),
            positions=np.array([each for *_, each in samples[split]], np.int64).reshape(-1, 3),
            targets=np.array([index[label] for label, *_ in samples[split]], np.int32),
        )
        for split in splits
    }


def _labelled_images(shard: Path, number: int) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Returns label, name and position of each image in a shard.

    Raises:
      DataError: the shard cannot be read, or samples have no class or not exactly one image.
    """
    suffixes, images, problems = image_suffixes(), [], []
    with reading(shard) as file:
        for key, members in read_samples(shard):
            extensions = [extension for extension in members if f".{extension}" in suffixes]
            try:
                label = _label(file, members)
                if len(extensions) != 1:
                    raise DataError(f"{len(extensions)} images")
            except DataError as error:
                problems.append(f"{printable(key)} ({', '.join(members)}): {error}")
                continue
            offset, size = members[extensions[0]]
            images.append((label, f"{key}.{extensions[0]}", (number, offset, size)))
    if problems:
        listing = "".join(f"\n  {problem}" for problem in first_of(problems, _MAX_SAMPLES))
        raise DataError(
            f"{printable(shard)}: {len(problems)} of {len(images) + len(problems)} samples do not "
            "have one image and one class (.cls, or .json with one of "
            f"{', '.join(_JSON_KEYS)}):{listing}"
        )
    return images


def _label(file: IO[bytes], members: Mapping[str, TarMember]) -> str:
    """Returns the class of a sample."""
    if (member := members.get("cls") or members.get("json")) is None:
        raise DataError("no class")
    file.seek(member.offset)
    content = file.read(member.size)
    try:
        text = content.decode().strip()
        value: Any = text if "cls" in members else json.loads(text)
    except ValueError as error:
        raise DataError(f"its class cannot be read: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError("no class")
    return printable(str(value))
