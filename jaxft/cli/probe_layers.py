"""Compares the gradient of each block with its weights, at the start of a recipe.

    jaxft probe-layers CONFIG [any field of the recipe as an option]

CONFIG is a recipe as for `jaxft finetune`; its stages do not matter. Prints the ratio of gradient
norm to weight norm of each block, averaged over five batches, with the recipe's augmentation and
all norm layers in mode `eval`. Lee et al. 2022 (arXiv:2210.11466) scale the learning rate of each
tensor by this ratio. A large ratio means that a small relative change of the block changes the
loss much, not that the block is the best to train alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from jaxft.cli.command_setup import command_parser, run_until_signal
from jaxft.cli.program_cache import keep_programs
from jaxft.cli.recipe_options import read_recipe
from jaxft.lr_finder import trial
from jaxft.report.block_table import block_table
from jaxft.report.console import Console
from jaxft.stages import Stage
from jaxft.train.auto_rgn import BATCHES, block_norms
from jaxft.train.frozen_prefix import block_labels


def run(arguments: Sequence[str], program: str = "jaxft probe-layers") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_probe_layers, arguments, program))


def _probe_layers(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft probe-layers", program, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    known, options = parser.parse_known_args(arguments)
    keep_programs()
    recipe = read_recipe(known.config, options, program)
    stage = trial(recipe, Stage("probe", {"*": 1.0}, steps=BATCHES, norms="eval"))
    ratios = block_norms(stage.program, stage.params, stage.stats, stage.batches(BATCHES))
    console = Console()
    origin = recipe.weights or "random weights"
    console.say(
        f"{recipe.model} from {origin}: gradient by weights, mean of {BATCHES} batches of "
        f"{recipe.batch_size} images\n"
    )
    for line in block_table(block_labels(stage.program.model, stage.params), stage.params, ratios):
        console.row(line)
    console.say("\n" + _verdict(ratios, keeps_head=recipe.head == "keep"))


def _verdict(ratios: Mapping[str, float], *, keeps_head: bool) -> str:
    *body, _ = ratios
    if not body:
        return "The network is a single block: models.Linen and models.NNX take blocks=..."
    largest = max(body, key=ratios.__getitem__)
    verdict = f"Of the blocks before the head, {largest} has the largest."
    if keeps_head:
        return verdict
    return verdict + (
        " But the head is freshly drawn: its gradient is large for that alone, and all others have "
        "come through it. Train the head first, then ask again with --weights RUN --head keep."
    )
