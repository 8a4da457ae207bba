"""Fine-tunes a network in stages, or resumes an interrupted run.

    jaxft finetune CONFIG --workdir DIR [recipe options]
    jaxft finetune DATA --workdir DIR [--strategy full] [recipe options]

CONFIG is a Python file that defines `recipe`, or the `recipe.yaml` of an earlier run. With
`CONFIG --help` its options are listed. DIR may be in a bucket (gs://...).

DATA is a folder of class folders, a CSV file, or data as in a recipe. Then the network is a
ResNet-50 with torchvision's weights, unless --model and --weights name others, and the stages are a
strategy's: by default the head is solved on the frozen features, and everything trains for five
epochs (lp-ft). The resulting recipe is DIR/recipe.yaml.

SIGTERM or Ctrl-C during training saves a checkpoint and exits with code 75 or 130; the same
command resumes the run. Before training, both exit at once. A second Ctrl-C during training exits
without saving.
"""

import argparse
import signal
from collections.abc import Sequence
from functools import partial

from jaxft import distributed, lost_process
from jaxft.cli.command_setup import command_parser, report_errors
from jaxft.cli.data_recipe import (
    STRATEGY,
    add_strategy_options,
    base_recipe,
    is_recipe_file,
    with_strategy,
)
from jaxft.cli.process import fail, handled_by
from jaxft.cli.program_cache import keep_programs
from jaxft.cli.recipe_options import print_recipe_options
from jaxft.default_stages import STRATEGIES
from jaxft.errors import RecipeError
from jaxft.process_exchange import announced
from jaxft.recipe import Recipe
from jaxft.train.finetune import Result, finetune


def run(arguments: Sequence[str], program: str = "jaxft finetune") -> int:
    """Runs the command; returns its exit code."""
    return report_errors(partial(_finetune, arguments, program))


def _finetune(arguments: Sequence[str], program: str) -> int:
    known, options = _parse(arguments, program)
    keep_programs()
    try:
        distributed.start(known.coordinator, known.processes, known.process)
        with announced():
            recipe = _recipe(known, options, program)
        result = finetune(
            recipe,
            known.workdir,
            fork_from=known.fork_from,
            stage=known.stage,
            extend=known.extend,
        )
        with handled_by(signal.SIG_IGN):  # the results are on disk
            with lost_process.translated():
                distributed.barrier("end")  # the first process to exit would end the others
            return _show(result) if distributed.is_main_process() else 0
    except lost_process.LostProcessError as error:
        return fail(f"{type(error).__name__}: {error}", lost_process.EXIT_CODE)
    except KeyboardInterrupt:
        return fail("\nInterrupted. The same command resumes from the last checkpoint.", 130)


def _recipe(known: argparse.Namespace, options: Sequence[str], program: str) -> Recipe:
    """Returns the recipe of a recipe file, or of images and a strategy."""
    recipe = base_recipe(known.config, options, program)
    if not is_recipe_file(known.config):
        return with_strategy(recipe, known.strategy, known.lr, known.epochs)
    given = [name for name in ("strategy", "lr", "epochs") if getattr(known, name) is not None]
    if given:
        raise RecipeError(
            f"--{given[0]} is for images without a recipe; {known.config} has stages. Change them "
            "by options such as --stages.0.epochs 3."
        )
    return recipe


def _parse(arguments: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    """Returns the command's options, and the recipe's; exits after printing help."""
    parser = command_parser(__doc__, "jaxft finetune", program, add_help=False, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG or DATA", help="a recipe file, or images")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run; required")
    parser.add_argument(
        "--extend", action="store_true", help="continue with a longer last stage or new stages"
    )
    strategy = parser.add_argument_group("images without a recipe")
    strategy.add_argument(
        "--strategy", metavar="NAME", help=f"{', '.join(STRATEGIES)}; default: {STRATEGY}"
    )
    add_strategy_options(strategy)
    fork = parser.add_argument_group("a new run from the end of a stage of another run")
    fork.add_argument("--fork-from", metavar="RUN", help="workdir of the other run")
    fork.add_argument("--stage", help="stage, in both recipes; default: the last that ended")
    hosts = parser.add_argument_group("several hosts, if they do not find each other")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--processes", type=int, metavar="N", help="number of processes; 1: alone")
    hosts.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        print("\nEach field of a recipe is an option, here with the defaults of an example:\n")
        print_recipe_options()
    known, options = parser.parse_known_args(arguments)
    if known.workdir is None and not {"-h", "--help"} & set(options):
        parser.error("--workdir DIR is required")
    return known, options


def _show(result: Result) -> int:
    try:
        print(f"\nValidation accuracy {result.score.accuracy:.4f}, loss {result.score.loss:.4f}")
        print(f"Weights     {result.weights} (torch's names; model.json beside it)")
        if result.report:
            print(f"Report      {result.report}")
        print(f"Checkpoint  {result.checkpoint}", flush=True)
    except OSError as error:
        message = "All is done, but standard output cannot be written"
        return fail(f"{message}: {error.strerror}.", 0)
    return 0
