"""Shows how large each block's gradient is beside its weights, where a recipe starts.

    python scripts/probe_layers.py CONFIG [any field of the recipe as an option]

CONFIG is a recipe as for scripts/finetune.py; its stages do not matter. The gradients are those of
five batches, augmented as the recipe says, with all norm layers in mode E. Lee et al. 2022
(arXiv:2210.11466) train each tensor at a rate by this ratio; here it is that of a block's whole
gradient to all of its weights. A large one says that a small relative change of the block changes
the loss much, not that the block is the best to train alone.
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    stop_at_once()  # before what takes seconds to import

import argparse

from jaxft import Stage
from jaxft.command_line import read_with, run
from jaxft.report.block_table import block_table
from jaxft.report.console import Console
from jaxft.train.auto_rgn import BATCHES, block_norms
from jaxft.train.compiled_stage import keep_programs
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.lr_finder import trial


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG")
    known, options = parser.parse_known_args(arguments)
    keep_programs()
    recipe = read_with(known.config, options)
    tried = trial(recipe, Stage("probe", {"*": 1.0}, steps=BATCHES, norms="E"))
    norms = block_norms(tried.program, tried.params, tried.stats, tried.batches(BATCHES))
    console = Console()
    origin = recipe.weights or "random weights"
    console.say(
        f"{recipe.model} from {origin}: gradient by weights, mean of {BATCHES} batches of "
        f"{recipe.batch_size} images\n"
    )
    labels = block_labels(tried.program.model, tried.params)
    for line in block_table(labels, tried.params, norms):
        console.row(line)
    console.say("\n" + verdict(norms, fitted=recipe.head == "keep"))


def verdict(norms: dict[str, float], *, fitted: bool) -> str:
    *body, _ = norms
    largest = max(body, key=norms.__getitem__)
    said = f"Of the blocks before the head, {largest} has the largest."
    if fitted:
        return said
    return said + (
        " But the head is freshly drawn: its gradient is large for that alone, and all others have "
        "come through it. Train the head first, then ask again with --weights RUN --head keep."
    )


if __name__ == "__main__":
    run(main)
