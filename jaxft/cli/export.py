"""Exports the weights and the evaluation program of a run, whether it has ended or not.

    jaxft export WORKDIR [--out DIR] [--formats jax onnx] [--license apache-2.0]

Writes into DIR (default: WORKDIR)

    model.safetensors  weights under torch's names, which torchvision and timm
                       load strictly (except with stride_in_1x1)
    model.json         network, classes, preprocessing, validation score
    README.md          model card: scores, classes, code to load the weights
    model.jaxexport    evaluation program: jax.export.deserialize(...).call(images);
                       jax versions up to 6 months newer run it
    model.onnx         with --formats onnx: the same for ONNX Runtime, checked
                       against jax (extra onnx)
"""

import json
from collections.abc import Sequence
from functools import partial

from jaxft import model_card
from jaxft.checkpoint.atomic import anywhere
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.export import FORMATS, export
from jaxft.report.console import Console
from jaxft.weights.description import MARK, STRIDES
from jaxft.weights.jax_export import PLATFORMS


def run(arguments: Sequence[str], program: str = "jaxft export") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_export, arguments, program))


def _export(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft export", program)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=["jax"], help="programs; default: jax"
    )
    parser.add_argument(
        "--license", metavar="ID", help="license in the model card: mit, apache-2.0, ..."
    )
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    known = parser.parse_args(arguments)
    workdir, out = anywhere(known.workdir), known.out and anywhere(known.out)
    check_writable(out or workdir)
    path, score = export(
        workdir,
        out,
        formats=tuple(known.formats),
        platforms=tuple(known.platforms),
        license_id=known.license,
    )
    print(f"Validation accuracy {score.accuracy:.4f}, loss {score.loss:.4f}")
    print(f"Weights  {path} (torch's names; model.json beside it)")
    print(f"Card     {path.with_name(model_card.NAME)}")
    description = json.loads(path.with_name("model.json").read_text())
    if exported := description.get("program"):
        print(f"Program  {path.with_name('model.jaxexport')} ({', '.join(known.platforms)})")
        print(
            f"         by jax {exported['jax']}, good until {exported['good_until']}: jax promises "
            "that\n         versions up to 6 months newer run it. Later, export again."
        )
    if onnx := description.get("onnx"):
        print(f"ONNX     {path.with_name('model.onnx')} (opset {onnx['opset']})")
        print(f"         images {onnx['images']} to logits {onnx['logits']}; as jax's up to")
        print(f"         {onnx['max_difference']:.1e} of the largest logit in ONNX Runtime")
    if description.get(MARK):
        Console().say(STRIDES)
