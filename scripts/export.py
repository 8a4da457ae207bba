"""Writes what a run has to hand back, whether it has ended or not.

    python scripts/export.py WORKDIR [--out DIR] [--platforms cpu cuda tpu]

DIR (default: WORKDIR) then holds

    model.safetensors  the weights by torch's names: torchvision and timm load them strictly (but
                       with stride_in_1x1, see README)
    model.json         network, classes, preprocessing, validation score
    model.jaxexport    the evaluation as a program: jax.export.deserialize(...).call(images); jax
                       promises that versions up to 6 months newer run it
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    stop_at_once()  # before what takes seconds to import

import argparse
import json

from jaxft.checkpoint.atomic import anywhere
from jaxft.command_line import check_folder, run
from jaxft.train.export import export
from jaxft.weights.description import MARK, STRIDES
from jaxft.weights.jax_export import PLATFORMS


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    arguments = parser.parse_args(given)
    workdir, out = anywhere(arguments.workdir), arguments.out and anywhere(arguments.out)
    check_folder(out or workdir)
    path, score = export(workdir, out, platforms=tuple(arguments.platforms))
    print(f"Validation accuracy {score.accuracy:.4f}, loss {score.loss:.4f}")
    print(f"Weights  {path} (torch's names; model.json beside it)")
    print(f"Program  {path.with_name('model.jaxexport')} ({', '.join(arguments.platforms)})")
    described = json.loads(path.with_name("model.json").read_text())
    program = described["program"]
    print(
        f"         by jax {program['jax']}, good until {program['good_until']}: jax promises that "
        "versions\n         up to 6 months newer run it. Later, export again from the checkpoint."
    )
    if described.get(MARK):
        print(STRIDES)


if __name__ == "__main__":
    run(main)
