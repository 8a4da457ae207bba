"""A stage's prefix: the first blocks of the network, as far as the stage leaves them as they are.

What they make of an image is then the same each time, and can be kept instead of made again: always
of the images to validate, and of those to train on where they come in as many views as are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jax

from jaxft.data import Preprocessing
from jaxft.distributed import Devices
from jaxft.labels import FROZEN, Pattern, Tree, label, leaf_labels, paths
from jaxft.models import Model, Norms
from jaxft.train.norms import layer

Args = tuple[Tree, Tree, Any]


@dataclass(frozen=True)
class Prefix:
    """What of the network need not run in each step, and what is done about it.

    Attributes:
      blocks: those that stay as they are, from the input on.
      first: the block after them.
      row: shape and type of what they make of one image.
      train, val: whether that is kept of the images to train on, and to validate.
      reason: why not of those to train on.
      mib: all that is kept, of `views` views of each image to train on.
      cuts: the blocks at which it is cut into programs: where prefixes of the run's stages end.
      taps: those of them whose output later stages want; the same pass over the images makes it.
    """

    blocks: tuple[str, ...] = ()
    first: str | None = None
    row: jax.ShapeDtypeStruct | None = None
    train: bool = False
    val: bool = False
    reason: str = "it has not been asked for"
    mib: float = 0.0
    cuts: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The last block of each prefix that a pass over the images is for, this one's last."""
        return (*self.taps, *self.blocks[-1:])


def block_labels(model: Model, params: Tree) -> Tree:
    """The label tree in which each parameter has the name of its block."""
    named = zip(model.blocks, model.block_patterns, strict=True)
    rules: dict[Pattern, str] = {p: block for block, patterns in named for p in patterns}
    return label(params, rules)


def inert_blocks(
    model: Model, params: Tree, labels: Tree, norms: Norms
) -> tuple[tuple[str, ...], str]:
    """The longest run of blocks from the input that stay as they are, and why the next does not."""
    modes = dict.fromkeys(map(layer, paths(params)), norms) if isinstance(norms, str) else norms
    changing: dict[str, str] = {}
    names, of_block = leaf_labels(params, labels), jax.tree.leaves(block_labels(model, params))
    for path, block, name in zip(paths(params), of_block, names, strict=True):
        if name != FROZEN:
            changing[block] = f"{block} trains"
        elif modes.get(layer(path), "running") != "running":
            changing.setdefault(block, f"norm layers of {block} use the batch's statistics")
    inert = tuple(takewhile(lambda block: block not in changing, model.blocks))
    return inert, changing[model.blocks[len(inert)]]


def compile_prefix(
    model: Model, preprocessing: Preprocessing, devices: Devices, cuts: Sequence[str], like: Args
) -> dict[str, Any]:
    """The compiled `(params, stats, x) -> output` of the blocks up to each of `cuts`, by the cut.

    A program for each: what is kept is then the same to the last bit, whichever stage made it and
    whatever more it made. Shapes are `like` those of a first call, whose `x` are images, uint8
    [b h w 3].
    """
    made: dict[str, Any] = {}
    params, stats, x = like
    first = model.blocks[0]
    for last in cuts:

        def step(
            params: Tree, stats: Tree, x: jax.Array, first: str = first, last: str = last
        ) -> jax.Array:
            x = x if made else preprocessing.normalize(x)
            return model.apply(params, stats, x, norms="running", first=first, last=last)[0]

        lowered = jax.jit(step).lower(params, stats, x)
        x = devices.abstract_batch(lowered.out_info)
        made[last] = lowered.compile()
        first = model.blocks[model.blocks.index(last) + 1]
    return made
