"""Converts weights between PyTorch and JAX.

    jaxft convert SOURCE OUT --model NAME [options of the network]

    SOURCE  a torch file, a run or checkpoint of jaxft, hf:OWNER/REPO,
            torchvision:ENUM.MEMBER, ...
    OUT     a .safetensors file with torchvision's names and layouts; any other
            name is a folder, written as an Orbax checkpoint with jaxft's names:
            {"params": ..., "stats": ...}. Both are valid as SOURCE.
    NAME    the network, such as resnet50; its tensors must match SOURCE exactly

The options of the network are recipe fields: --stride-in-1x1 True, --head-layers 256 relu, ...
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import jax
import tyro

from jaxft import models, weights
from jaxft.checkpoint.atomic import anywhere
from jaxft.checkpoint.weights_only import save_weights
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.errors import WeightsError
from jaxft.models.model import STORED_OPTIONS
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.weights.description import MARK, STRIDES, fields
from jaxft.weights.load import fitted

_TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt")
_HINTS = get_type_hints(Recipe)
_CONFIG = (tyro.conf.FlagConversionOff,)  # `--binary True`, as in `jaxft finetune`
# The recipe fields that shape a network, as a dataclass for tyro.
_Options: Any = dataclasses.make_dataclass(
    "Options",
    [
        (field.name, _HINTS[field.name], dataclasses.field(default=field.default))
        for field in dataclasses.fields(Recipe)
        if field.name in STORED_OPTIONS
    ],
    frozen=True,
)


def run(arguments: Sequence[str], program: str = "jaxft convert") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_convert, arguments, program))


def _convert(arguments: Sequence[str], program: str) -> None:
    known, options = _parse(arguments, program)
    out = anywhere(known.out)
    _check_output(out)
    source = weights.read(known.source)
    like = models.create(known.model, num_classes=2, **options)
    num_classes = 2 if options["binary"] else source.num_classes(like) or 1000
    model = models.create(known.model, num_classes=num_classes, **options)
    source = fitted(source, model, "keep", None)
    params, stats = weights.load(source, model)
    classes = source.network.classes
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        weights.save(out, model, params, stats, classes=classes)
    else:
        save_weights(out, params, stats, described=fields(model, classes))
    for remark in source.remarks:
        print(remark)
    if model.options.get(MARK):
        Console().say(STRIDES)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{out}: {known.model}, {model.num_classes} classes, {count:,} parameters")


def _parse(arguments: Sequence[str], program: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the command's options, and the network's as keyword arguments."""
    parser = command_parser(__doc__, "jaxft convert", program, add_help=False, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--model", required=True, metavar="NAME")
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        arguments = ["-", "-", "--model", "-", "--help"]  # tyro prints the network's options
    known, rest = parser.parse_known_args(arguments)
    return known, dataclasses.asdict(tyro.cli(_Options, args=rest, prog=program, config=_CONFIG))


def _check_output(out: Path) -> None:
    if out.exists():
        raise WeightsError(f"{out} exists; choose another OUT, or delete it.")
    if out.suffix in _TORCH_SUFFIXES:
        raise WeightsError(f"{out}: torch reads .safetensors too; name OUT so, or give a folder.")
    check_writable(out.parent)
