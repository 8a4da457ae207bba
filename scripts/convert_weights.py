"""Converts weights, from PyTorch to JAX or back.

    python scripts/convert_weights.py SOURCE OUT --model NAME [the network's options]

SOURCE: a file of torch's, a run or checkpoint of ours, hf:OWNER/REPO, torchvision:ENUM.MEMBER, ...
OUT: a .safetensors file with torchvision's names and layouts, or else a folder, written as an Orbax
     checkpoint of {"params": ..., "stats": ...} in jaxft's; either one is a SOURCE again.
NAME: the network, such as resnet50; every tensor must fit it, and nothing may be left over.

The network's options are those of a recipe: --stride-in-1x1, --head-layers 256 relu, ... (--help).
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    stop_at_once()  # before what takes seconds to import

import argparse
import dataclasses
from typing import get_type_hints

import jax
import tyro

from jaxft import Recipe, WeightsError, models, weights
from jaxft.checkpoint.atomic import anywhere
from jaxft.checkpoint.weights_only import save_weights
from jaxft.command_line import check_folder, run
from jaxft.models.model import OPTIONS
from jaxft.weights.description import MARK, STRIDES, fields
from jaxft.weights.load import fitted

# A recipe's fields that shape a network, and how they are given here.
_HINTS = get_type_hints(Recipe)
_FIELDS = [
    (f.name, _HINTS[f.name], dataclasses.field(default=f.default))
    for f in dataclasses.fields(Recipe)
    if f.name in OPTIONS
]
Options = dataclasses.make_dataclass("Options", _FIELDS, frozen=True)


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("source")
    parser.add_argument("out", type=anywhere)
    parser.add_argument("--model", required=True, metavar="NAME")
    if {"-h", "--help"} & set(given):
        parser.print_help()
        given = ["-", "-", "--model", "-", "--help"]
    arguments, rest = parser.parse_known_args(given)
    options = dataclasses.asdict(tyro.cli(Options, args=rest))
    if arguments.out.exists():
        raise WeightsError(f"{arguments.out} exists; choose another OUT, or delete it.")
    if arguments.out.suffix in (".pth", ".pt", ".th", ".bin", ".ckpt"):
        raise WeightsError(
            f"{arguments.out}: torch reads .safetensors too; name OUT so, or give a folder."
        )
    check_folder(arguments.out.parent)
    source = weights.read(arguments.source)
    model = models.create(
        arguments.model,
        num_classes=2 if options["binary"] else source.num_classes or 1000,
        **options,
    )
    source = fitted(source, model, "keep", None)
    params, stats = weights.load(source, model)
    classes = source.network.classes
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".safetensors":
        weights.save(arguments.out, model, params, stats, classes=classes)
    else:
        save_weights(arguments.out, params, stats, described=fields(model, classes))
    for remark in source.remarks:
        print(remark)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if model.options.get(MARK):
        print(STRIDES)
    print(f"{arguments.out}: {arguments.model}, {model.num_classes} classes, {count:,} parameters")


if __name__ == "__main__":
    run(main)
