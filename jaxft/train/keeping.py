"""What is kept of a stage's prefix: of which images, and why not of others."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.labels import Tree
from jaxft.recipe import Recipe
from jaxft.train.frozen_prefix import Prefix, inert_blocks
from jaxft.train.stage_program import Program


def keeping(
    programs: Sequence[Program], params: Tree, stats: Tree, *, images: tuple[int, int]
) -> tuple[Program, ...]:
    """The stages of a run, told of their prefixes; `params` and `stats` need only be shapes.

    images: how many there are to train on and to validate.
    """
    known = [
        replace(program, prefix=_prefix(program, params, stats, *images)) for program in programs
    ]
    ends = {end for each in known for end in each.prefix.blocks[-1:]}

    def whole(own: Program) -> Prefix:
        cuts = tuple(block for block in own.prefix.blocks if block in ends)
        return replace(own.prefix, cuts=cuts, taps=_taps(own, known[own.index + 1 :]))

    return tuple(replace(own, prefix=whole(own)) for own in known)


def _prefix(program: Program, params: Tree, stats: Tree, to_train: int, to_validate: int) -> Prefix:
    recipe, model, solved = program.recipe, program.model, program.plan.stage.solver is not None
    blocks, why = inert_blocks(model, params, program.plan.labels, program.norms)
    if not blocks:
        return Prefix(reason=why)
    side = recipe.preprocessing.image_size
    made, _ = jax.eval_shape(
        partial(model.apply, norms="running", last=blocks[-1]),
        *(params, stats, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
    )
    row = jax.ShapeDtypeStruct(made.shape[1:], made.dtype)
    mib = row.size * row.dtype.itemsize / 2**20
    of_val = mib * to_validate * (2 if recipe.tta == "flip" else 1)
    of_both = of_val + mib * to_train * (1 if solved else _views(recipe))
    # A stage that is solved needs all of it at once, whatever room there may be.
    reason = "" if solved else _why_not(recipe, program.epochs)
    room, where = _room(recipe)
    if not reason and not solved and of_both > room:
        reason = f"what comes out is {of_both:,.0f} MiB, and {where} {room}"
    train, val = not reason, solved or of_val <= room
    kept = of_both if train else of_val if val else 0.0
    return Prefix(blocks, model.blocks[len(blocks)], row, train, val, reason, kept)


def _room(recipe: Recipe) -> tuple[int, str]:
    """For all that is kept, in MiB, and the field that says so."""
    if recipe.disk_cache_mib:
        return recipe.disk_cache_mib, "disk_cache_mib"
    return recipe.cache_mib, "cache_mib"


def _views(recipe: Recipe) -> int:
    """Of each image to train on; 0: as many as there are epochs."""
    return 1 if recipe.augment == "none" else recipe.views


def _why_not(recipe: Recipe, epochs: int) -> str:
    """Why the prefix has to run in each step of training, if it has."""
    if recipe.erasing or recipe.mixup or recipe.cutmix:
        return "erasing, mixup and cutmix change the images in each step"
    if recipe.drop_path:
        return "drop_path leaves out other blocks in each step"
    if not _views(recipe):
        return f"augment={recipe.augment!r} draws a new view each epoch; views=K keeps to K"
    if recipe.balance == "sampling" and recipe.augment != "none":
        return "balance='sampling' draws views of their own for what an epoch repeats"
    if _views(recipe) >= epochs:
        return "each view is seen once"
    return ""


def _taps(own: Program, later: Sequence[Program]) -> tuple[str, ...]:
    """The ends of what `later` stages keep that a pass of this one makes on its way, as it fits."""
    ends: list[str] = []
    free, intact = _room(own.recipe)[0] - own.prefix.mib, len(own.prefix.blocks)
    for other in later if own.prefix.val else ():
        depth = len(other.prefix.blocks)
        # The pass over the images to train on would make what is of no use.
        useless = own.prefix.train and not (
            other.prefix.train and own.same_views and other.same_views
        )
        same = other.prefix.val and other.recipe.batch_size == own.recipe.batch_size
        if same and not useless and 0 < depth < intact and other.prefix.mib <= free:
            free -= other.prefix.mib
            ends.insert(0, other.prefix.blocks[-1])
        intact = min(intact, depth)
    return tuple(ends)
