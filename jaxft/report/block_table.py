"""A network's blocks as lines of a table, with a bar for each."""

from collections.abc import Iterator, Mapping

import jax

from jaxft.labels import Tree

_WIDTH = 32  # of the longest bar


def block_table(labels: Tree, params: Tree, ratios: Mapping[str, float]) -> Iterator[str]:
    """Lines of at most 80 columns: of each block its parameters, ratio, and a bar as long as that.

    `labels` name each parameter's block.
    """
    sizes = dict.fromkeys(ratios, 0)
    for block, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(params), strict=True):
        sizes[block] += leaf.size
    line = "  {:8}  {:>12}  {:>20}  {}"
    yield line.format("block", "parameters", "gradient / weights", "")
    largest = max(ratios.values())
    for block, ratio in ratios.items():
        bar = "#" * round(_WIDTH * ratio / largest)
        yield line.format(block, f"{sizes[block]:,}", f"{ratio:.3g}", bar)
