"""Evaluates trained weights on labelled images.

    jaxft evaluate runs/ants folder:new_photos [--split test] [--json FILE]

SOURCE is the folder of a run, ended or not, or weights as in a recipe: a file, hf:OWNER/REPO, ...
DATA is a folder of class folders, a CSV file, or data as in a recipe; default: the images that the
run validates with. Classes are matched by name.

Prints accuracy with its 95 % confidence interval, top-5 accuracy, cross entropy, calibration error,
precision, recall and F1 of each class, and the confusion matrix.
"""

import json
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path

from jaxft.checkpoint import atomic
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.cli.data_recipe import data_spec
from jaxft.cli.predict import add_classifier_options, load_classifier
from jaxft.cli.program_cache import keep_programs
from jaxft.data.open_source import open_collection
from jaxft.data.select_splits import select, select_one
from jaxft.data.source import Source
from jaxft.data.validate import check_images
from jaxft.errors import DataError
from jaxft.evaluation import evaluate
from jaxft.report.console import Console
from jaxft.report.evaluation_text import evaluation_text
from jaxft.train.workdir import saved


def run(arguments: Sequence[str], program: str = "jaxft evaluate") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_evaluate, arguments, program))


def _evaluate(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft evaluate", program)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("data", metavar="DATA", nargs="?")
    parser.add_argument(
        "--split",
        metavar="SPLIT",
        help="of DATA, else of the run's, such as test or train[:10%%]; default: val, or the only",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    add_classifier_options(parser)
    known = parser.parse_args(arguments)
    keep_programs()
    if known.json:
        check_writable(atomic.anywhere(known.json).parent)
    images = open_images(known.source, known.data, known.split)
    classifier = load_classifier(known)
    scores = evaluate(classifier, images)
    console = Console()
    split = f", split {known.split}" if known.split else ""
    data = (known.data or ("its images" if split else "its validation images")) + split
    console.row(f"{known.source}: {classifier.model.name}, {len(classifier.classes)} classes")
    console.row(f"{data}: {len(images):,} images\n")
    for line in evaluation_text(scores):
        console.row(line)
    if known.json:
        atomic.anywhere(known.json).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(known.json, json.dumps(scores.to_json(), indent=2) + "\n")


def open_images(
    source: str | PathLike[str], data: str | None = None, split: str | None = None
) -> Source:
    """Opens the images of an evaluation and checks that they can be read.

    Args:
      source: the weights; without `data`, the folder of a run, whose images are opened.
      data: a folder of class folders, or data as in a recipe.
      split: split expression; by default the validation split, or the only split.

    Raises:
      DataError: the data does not exist; or it is not given, and `source` is not a run.
    """
    # With DATA alone, the recipe is not needed; it may name modules that are elsewhere.
    needs_recipe = data is None or split is not None
    recipe = saved(source) if needs_recipe and Path(source).is_dir() else None
    if data is not None and (recipe is None or data_spec(data) != recipe.data):
        images = select_one(open_collection(data_spec(data)), split)
        return check_images({"images": images}, "error")[0]["images"]
    if recipe is None:
        raise DataError(f"{source} is not the folder of a run: name the DATA to evaluate on.")
    collection = open_collection(recipe.data, recipe.split_by)
    if split is not None:
        images = select_one(collection, split, seed=recipe.seed)
    else:
        images = select(
            collection,
            train=recipe.train_split,
            val=recipe.val_split,
            shots=recipe.shots,
            seed=recipe.seed,
        ).val
    return check_images({"images": images}, recipe.on_bad_image)[0]["images"]
