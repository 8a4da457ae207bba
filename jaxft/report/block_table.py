"""Formats gradient-to-weight ratios of a network's blocks as a table with bars."""

from collections.abc import Iterator, Mapping

import jax

from jaxft.labels import Tree

_MAX_BAR_WIDTH = 32


def block_table(labels: Tree, params: Tree, ratios: Mapping[str, float]) -> Iterator[str]:
    """Yields the lines of a table of blocks, at most 80 columns wide.

    Args:
      labels: the block of each parameter.
      params: the parameters.
      ratios: norm of the gradients divided by norm of the weights, per block.

    Yields:
      A header, and for each block its number of parameters, its ratio, and a bar of that length.
    """
    sizes = dict.fromkeys(ratios, 0)
    for block, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(params), strict=True):
        sizes[block] += leaf.size
    line = "  {:8}  {:>12}  {:>20}  {}"
    yield line.format("block", "parameters", "gradient / weights", "")
    largest = max(ratios.values())
    for block, ratio in ratios.items():
        bar = "#" * round(_MAX_BAR_WIDTH * ratio / largest)
        yield line.format(block, f"{sizes[block]:,}", f"{ratio:.3g}", bar)
