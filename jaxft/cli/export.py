"""Exports the weights and the evaluation program of a run, whether it has ended or not.

    jaxft export WORKDIR [--out DIR] [--platforms cpu cuda tpu]

Writes into DIR (default: WORKDIR)

    model.safetensors  weights under torch's names; torchvision and timm load them strictly
                       (except with stride_in_1x1, see README)
    model.json         network, classes, preprocessing, validation score
    model.jaxexport    evaluation program: jax.export.deserialize(...).call(images); jax
                       promises that versions up to 6 months newer run it
"""

import json
from collections.abc import Sequence
from functools import partial

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.export import export
from jaxft.weights.description import MARK, STRIDES
from jaxft.weights.jax_export import PLATFORMS


def run(arguments: Sequence[str], program: str = "jaxft export") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_export, arguments, program))


def _export(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft export", program)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    known = parser.parse_args(arguments)
    workdir, out = anywhere(known.workdir), known.out and anywhere(known.out)
    check_writable(out or workdir)
    path, score = export(workdir, out, platforms=tuple(known.platforms))
    print(f"Validation accuracy {score.accuracy:.4f}, loss {score.loss:.4f}")
    print(f"Weights  {path} (torch's names; model.json beside it)")
    print(f"Program  {path.with_name('model.jaxexport')} ({', '.join(known.platforms)})")
    description = json.loads(path.with_name("model.json").read_text())
    exported = description["program"]
    print(
        f"         by jax {exported['jax']}, good until {exported['good_until']}: jax promises that"
        "\n         versions up to 6 months newer run it. Later, export again."
    )
    if description.get(MARK):
        print(STRIDES)
