"""Converts a folder of images to a TFDS data set in array_record format.

    jaxft prepare-tfds FOLDER OUT [--name NAME] [--on-bad-image skip]

FOLDER holds FOLDER/<split>/<class>/ with a split named train, or only FOLDER/<class>/, which
becomes one split named train. Image files are copied without re-encoding. Recipes read the data
set as `tfds_dir:OUT`. Needs no TensorFlow.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli import folder_builder
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.data import folder
from jaxft.data.validate import check_images


def run(arguments: Sequence[str], program: str = "jaxft prepare-tfds") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_prepare_tfds, arguments, program))


def _prepare_tfds(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft prepare-tfds", program)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--name", default="images", help="of the data set (default: images)")
    parser.add_argument("--on-bad-image", choices=("error", "skip"), default="error")
    known = parser.parse_args(arguments)
    out = anywhere(known.out)
    check_writable(out.parent)
    collection = folder.find(known.folder)
    sources = cast(dict[str, folder.FolderSource], collection.read(collection.splits))
    splits, remarks = check_images(sources, known.on_bad_image)
    folder_builder.write(splits, out, known.name)
    for remark in (*(text for files in sources.values() for text in files.remarks), *remarks):
        print(remark)
    counts = ", ".join(f"{name} {len(files):,}" for name, files in splits.items())
    print(f"Wrote {out} ({counts} images): --data tfds_dir:{out}")
