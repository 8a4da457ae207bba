"""Converts a folder of images to a TFDS data set in array_record format."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from jaxft.data.folder import FolderSource
from jaxft.data.image_files import printable
from jaxft.errors import DataError
from jaxft.progress import track


class _FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, name: str, splits: Mapping[str, FolderSource], **options: Any):
        self.name, self._splits = name, splits
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        classes = list(next(iter(self._splits.values())).classes)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with their classes, from a folder.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=classes),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        return {name: self._generate_examples(name, each) for name, each in self._splits.items()}

    def _generate_examples(self, name: str, source: FolderSource) -> Iterator[tuple[str, dict]]:
        with track(f"Writing {name}", len(source)) as work:
            for path, target in zip(source.files, source.targets, strict=True):
                file_name = printable(PurePosixPath(path).relative_to(source.root))
                # TFDS stores bytes as they are, and shuffles examples by the hash of their key.
                example = {"image": path.read_bytes(), "label": int(target), "file_name": file_name}
                yield file_name, example
                work.advance()


def write(splits: Mapping[str, FolderSource], out: Path, name: str) -> None:
    """Writes the splits as the TFDS data set `name` to the folder `out`, for `tfds_dir:OUT`.

    Image files are stored byte for byte. Examples are shuffled, so that slices mix the classes.

    Raises:
      DataError: `out` exists, or TFDS does not allow `name`.
    """
    if out.exists():
        raise DataError(f"{out} exists already: give a folder that does not, or remove it.")
    if not name.isidentifier() or name != name.lower():
        raise DataError(
            f"'{name}' cannot name a TFDS data set: use a-z, 0-9 and _, a letter first."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of `out`, so that the final rename is atomic.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        builder = _FolderBuilder(name, splits, data_dir=scratch)
        tfds.disable_progress_bar()  # prints carriage returns into logs
        builder.download_and_prepare()
        builder.data_path.rename(out)
