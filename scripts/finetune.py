"""Fine-tunes a network in stages, or goes on with a run that was interrupted.

    python scripts/finetune.py CONFIG --workdir DIR [any field of the recipe as an option]

CONFIG is a Python file that defines `recipe`, or the `recipe.yaml` of an earlier run; with
`CONFIG --help` it shows its fields.
"""

import argparse
import sys

import tyro

from jaxft import JaxftError, Recipe, finetune
from jaxft.recipe import read


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("config")
    parser.add_argument("--workdir", metavar="DIR")
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return
    known, options = parser.parse_known_args(arguments)
    if known.workdir is None and not {"-h", "--help"} & set(options):
        parser.error("--workdir DIR is required")
    try:
        recipe = tyro.cli(
            Recipe,
            default=read(known.config),
            args=options,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
        result = finetune(recipe, known.workdir)
    except (JaxftError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    print(f"\nValidation accuracy {result.score.accuracy:.4f}, loss {result.score.loss:.4f}")
    if result.from_scratch:
        print(f"From scratch:       {result.from_scratch.accuracy:.4f}")
    print(f"Weights     {result.weights} (torch's names; model.json beside it)")
    print(f"Checkpoint  {result.checkpoint}")


if __name__ == "__main__":
    main(sys.argv[1:])
