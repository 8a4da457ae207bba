"""Turns a folder of images into a TFDS data set in array_record format, read by `tfds_dir:OUT`.

    python scripts/prepare_tfds.py FOLDER OUT [--name NAME] [--on-bad-image skip]

FOLDER holds FOLDER/<split>/<class>/ with a split named train, or just FOLDER/<class>/, which
becomes one split named train. The images' own bytes are kept. Needs no TensorFlow.
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    stop_at_once()  # before what takes seconds to import

import argparse

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli import folder_builder
from jaxft.command_line import check_folder, run
from jaxft.data import folder
from jaxft.data.validate import check_images


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("out", type=anywhere)
    parser.add_argument("--name", default="images", help="of the data set (default: images)")
    parser.add_argument("--on-bad-image", choices=("error", "skip"), default="error")
    options = parser.parse_args(arguments)
    check_folder(options.out.parent)
    collection = folder.find(options.folder)
    found = collection.read(collection.splits)
    splits, remarks = check_images(found, options.on_bad_image)
    folder_builder.write(splits, options.out, options.name)
    for remark in (*(text for files in found.values() for text in files.remarks), *remarks):
        print(remark)
    counts = ", ".join(f"{name} {len(files):,}" for name, files in splits.items())
    print(f"Wrote {options.out} ({counts} images): --data tfds_dir:{options.out}")


if __name__ == "__main__":
    run(main)
