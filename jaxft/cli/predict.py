"""Classifies image files with trained weights.

    jaxft predict runs/ants photos/ more/*.jpg [--top 3] [--format csv]

SOURCE is the folder of a run, ended or not, or weights as in a recipe: a file, hf:OWNER/REPO, ...
IMAGES are files, folders (with all images below them) and patterns such as 'photos/**/*.jpg'.

Prints the most probable class of each image and its probability; with several labels per image,
all classes with a probability above 0.5. Images that cannot be read are listed on standard error,
and the exit code is then 1.
"""

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial

from jaxft.classifier import Classifier, Predictions
from jaxft.cli.command_setup import (
    command_parser,
    count_argument,
    run_until_signal,
)
from jaxft.cli.program_cache import keep_programs
from jaxft.data.image_files import printable
from jaxft.errors import DataError, first_of
from jaxft.report.console import Console

_SHOWN = 20  # unreadable images


def run(arguments: Sequence[str], program: str = "jaxft predict") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_predict, arguments, program))


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_classifier` reads."""
    parser.add_argument("--model", metavar="NAME", help="network, if the source does not state it")
    parser.add_argument(
        "--tta",
        choices=("none", "flip"),
        help="flip: average over an image and its mirror image; default: as in the run",
    )
    parser.add_argument(
        "--batch-size", type=count_argument, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="threads that read images; default: 2"
    )


def load_classifier(known: argparse.Namespace) -> Classifier:
    """Loads the classifier of a command's options."""
    classifier = Classifier.load(
        known.source, model=known.model, batch_size=known.batch_size, workers=known.workers
    )
    return dataclasses.replace(classifier, tta=known.tta) if known.tta else classifier


def _predict(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft predict", program)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("images", metavar="IMAGES", nargs="+")
    parser.add_argument("--format", choices=("table", "csv", "jsonl"), default="table")
    parser.add_argument(
        "--top", type=count_argument, metavar="K", help="print the K most probable classes"
    )
    add_classifier_options(parser)
    known = parser.parse_args(arguments)
    keep_programs()
    predictions = load_classifier(known).predict(known.images, on_bad_image="skip")
    names = [printable(path) for path in predictions.images]
    rows = predictions.top(known.top) if known.top else predictions.assigned()
    _print(known.format, names, rows)
    if predictions.problems:
        raise DataError(_unreadable(predictions, names))


def _print(
    format_name: str, names: Sequence[str], rows: Iterable[Sequence[tuple[str, float]]]
) -> None:
    """Prints the images' classes and probabilities; unreadable images have none."""
    if format_name == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "class", "probability"))
        for name, row in zip(names, rows, strict=True):
            writer.writerows((name, label, f"{p:.6f}") for label, p in row)
            if not row:
                writer.writerow((name, "", ""))
    elif format_name == "jsonl":
        for name, row in zip(names, rows, strict=True):
            predictions = [{"class": label, "probability": p} for label, p in row]
            print(json.dumps({"image": name, "predictions": predictions}, ensure_ascii=False))
    else:
        console, width = Console(), max(map(len, ("image", *names)))
        console.row(f"  {'image':{width}}  class and probability")
        for name, row in zip(names, rows, strict=True):
            labels = ", ".join(f"{label} {p:.4f}" for label, p in row)
            console.row(f"  {name:{width}}  {labels or '-'}")


def _unreadable(predictions: Predictions, names: Sequence[str]) -> str:
    lines = [f"{names[index]}: {reason}" for index, reason in predictions.problems.items()]
    return "\n  ".join(
        [f"{len(lines)} of {len(names)} images cannot be read:", *first_of(lines, _SHOWN)]
    )
