"""The frozen prefix of a stage: the leading blocks of the network that it leaves unchanged.

Its features of an image are always the same, so they can be cached instead of computed in each
step. For training images this needs a fixed number of views.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data import Preprocessing
from jaxft.devices import Devices
from jaxft.errors import ModelError
from jaxft.jaxpr_dependence import dependence
from jaxft.labels import FROZEN, Tree, label, leaf_labels, paths
from jaxft.matmul_precision import MatmulPrecision, with_precision
from jaxft.models import Model, NormMode
from jaxft.models.norm_modes import layer
from jaxft.patterns import Pattern, matcher
from jaxft.recipe import Recipe, StageSettings
from jaxft.stage_plan import StagePlan
from jaxft.train.feature_storage import DeviceStorage, HostStorage, Storage


@dataclass(frozen=True)
class FrozenPrefix:
    """Leading blocks that a stage leaves unchanged, and which of their features are cached.

    Attributes:
      blocks: the frozen blocks, from the input on.
      first: the block after them.
      row: shape and dtype of the features of one image.
      train, val: whether the features of training and validation images are cached.
      reason: why the features of training images are not cached.
      on_devices: whether the features are cached in device memory.
      images: number of training and validation images.
      mib: size of all cached features in MiB; on several devices, of all together.
      room: size that the recipe allows, in MiB.
      batch_size: images per pass, on which the last bits of the features depend.
      unaugmented: whether the training images are not augmented. Their features then serve all
        stages of which this is true.
      cuts: blocks at which the prefix is cut into programs: the ends of the prefixes of all stages.
      taps: cuts whose features later stages need; the same pass over the images computes them.
    """

    blocks: tuple[str, ...] = ()
    first: str | None = None
    row: jax.ShapeDtypeStruct | None = None
    train: bool = False
    val: bool = False
    reason: str = "it has not been asked for"
    on_devices: bool = False
    images: tuple[int, int] = (0, 0)
    mib: float = 0.0
    room: int = 0
    batch_size: int = 0
    unaugmented: bool = False
    cuts: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """Blocks whose features a pass over the images stores: `taps`, then the prefix's last."""
        return (*self.taps, *self.blocks[-1:])

    def storage(self, devices: Devices, recipe: Recipe) -> Storage:
        """Returns the storage of the features."""
        if self.on_devices:
            return DeviceStorage(devices, self.batch_size)
        return HostStorage(devices, recipe.disk_cache_mib > 0)


def frozen_prefix(
    plan: StagePlan,
    recipe: Recipe,
    settings: StageSettings,
    model: Model,
    norms: Mapping[str, NormMode],
    like: tuple[Tree, Tree],
    *,
    devices: Devices,
    images: tuple[int, int],
    epochs: int,
) -> FrozenPrefix:
    """Returns the frozen prefix of a stage by itself; without cuts and taps.

    Args:
      plan: the stage over the network's parameters.
      recipe: the run's recipe.
      settings: settings of the stage.
      model: the network.
      norms: mode of each norm layer.
      like: parameters and statistics, or their shapes.
      devices: where the stage runs.
      images: number of training and validation images.
      epochs: length of the stage.
    """
    probes = plan.stage.linear_probe is not None
    params, stats = like
    blocks, why = inert_blocks(model, like, plan.labels, norms)
    if not blocks:
        return FrozenPrefix(reason=why)
    side = recipe.preprocessing.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    row, is_random = _training_features(model, (params, stats), image, blocks[-1])
    places = list(_places(recipe, settings, devices, row, images))
    # A linear probe needs all features at once, whatever the room.
    reason = "" if probes else _why_not(recipe, settings, epochs)
    if is_random and not reason and not probes:
        random = next(b for b in blocks if _training_features(model, (params, stats), image, b)[1])
        reason = (
            f"{random} draws random numbers in training, as by dropout. If that is right before "
            f"{model.blocks[len(blocks)]}, begin this block at the dropout layer instead "
            "(`blocks=` of models.Linen and models.NNX)"
        )
    if not reason and not probes and not any(each.both <= each.room for each in places):
        host = places[-1]
        reason = f"the features take {host.both:,.0f} MiB, and {host.field} is {host.room}"
        if devices.cache_mib:
            reason += f" (device_cache_mib: {devices.cache_mib} a device)"
    train = not reason
    fitting = (each for each in places if (each.both if train else each.val) <= each.room)
    place = next(fitting, places[-1])
    val = probes or place.val <= place.room
    return FrozenPrefix(
        blocks,
        model.blocks[len(blocks)],
        row,
        train,
        val,
        reason,
        on_devices=place.on_devices,
        images=images,
        mib=place.both if train else place.val if val else 0.0,
        room=place.room,
        batch_size=settings.batch_size,
        unaugmented=probes or settings.augment == "none",
    )


def _training_features(
    model: Model, trees: tuple[Tree, Tree], image: jax.ShapeDtypeStruct, last: str
) -> tuple[jax.ShapeDtypeStruct, bool]:
    """Returns the features of an image in training, and whether they depend on the random key."""

    def features(key: jax.Array, params: Tree, stats: Tree, image: jax.Array) -> jax.Array:
        return model.apply(params, stats, image, norms="running", key=key, last=last)[0]

    traced = jax.make_jaxpr(features)(jax.random.key(0), *trees, image)
    (shape,) = traced.out_avals
    row = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
    return row, bool(dependence(traced).outputs[0] & 1)


class _Place(NamedTuple):
    """Where features may be cached.

    Attributes:
      field: field of the recipe that sets the room.
      on_devices: whether it is device memory.
      room, val, both: in MiB, the room, and the size of the features of the validation images and
        of all images.
    """

    field: str
    on_devices: bool
    room: int
    val: float
    both: float


def _places(
    recipe: Recipe,
    settings: StageSettings,
    devices: Devices,
    row: jax.ShapeDtypeStruct,
    images: tuple[int, int],
) -> Iterator[_Place]:
    """Yields the places for the features of a stage, the first choice first."""
    mib = row.size * row.dtype.itemsize / 2**20
    flips, views = 2 if recipe.tta == "flip" else 1, max(1, _views(settings))

    def place(field: str, room: int, counts: Iterable[int], *, on_devices: bool) -> _Place:
        to_train, to_validate = counts
        val = mib * flips * to_validate
        return _Place(field, on_devices, room, val, val + mib * views * to_train)

    if devices.cache_mib:
        rows = map(DeviceStorage(devices, settings.batch_size).num_rows, images)
        room = devices.cache_mib * len(devices)
        yield place("device_cache_mib", room, rows, on_devices=True)
    field = "disk_cache_mib" if recipe.disk_cache_mib else "cache_mib"
    yield place(field, getattr(recipe, field), images, on_devices=False)


def with_cuts_and_taps(prefixes: Sequence[FrozenPrefix]) -> list[FrozenPrefix]:
    """Returns the prefixes of a run's stages with their cuts and taps."""
    ends = {end for each in prefixes for end in each.blocks[-1:]}
    return [
        replace(
            prefix,
            cuts=tuple(block for block in prefix.blocks if block in ends),
            taps=_taps(prefix, prefixes[index + 1 :]),
        )
        for index, prefix in enumerate(prefixes)
    ]


def _taps(prefix: FrozenPrefix, later: Sequence[FrozenPrefix]) -> tuple[str, ...]:
    """Returns the ends of later prefixes whose features this one's pass computes, if they fit."""
    ends: list[str] = []
    free, intact = prefix.room - prefix.mib, len(prefix.blocks)
    for other in later if prefix.val else ():
        depth = len(other.blocks)
        # Features of other views of the training images would be of no use.
        useless = prefix.train and not (other.train and prefix.unaugmented and other.unaugmented)
        same_place = other.val and other.on_devices == prefix.on_devices
        same = same_place and other.batch_size == prefix.batch_size
        if same and not useless and 0 < depth < intact and other.mib <= free:
            free -= other.mib
            ends.insert(0, other.blocks[-1])
        intact = min(intact, depth)
    return tuple(ends)


def _views(settings: StageSettings) -> int:
    """Returns the number of views of each training image; 0: one for each epoch."""
    return 1 if settings.augment == "none" else settings.num_views


def _why_not(recipe: Recipe, settings: StageSettings, epochs: int) -> str:
    """Returns why the features of the training images cannot be cached, if they cannot."""
    if settings.random_erasing or settings.mixup or settings.cutmix:
        return "random_erasing, mixup and cutmix change the images in each step"
    if recipe.drop_path:
        return "drop_path leaves out other blocks in each step"
    if not _views(settings):
        return f"augment={settings.augment!r} draws a new view each epoch; num_views=K repeats K"
    if settings.balance == "sampling" and settings.augment != "none":
        return "balance='sampling' draws views of their own for what an epoch repeats"
    if _views(settings) >= epochs:
        return "each view is seen once"
    return ""


def block_labels(model: Model, params: Tree) -> Tree:
    """Returns the label tree in which each parameter has the name of its block."""
    named = zip(model.blocks, model.block_patterns, strict=True)
    rules: dict[Pattern, str] = {p: block for block, patterns in named for p in patterns}
    labels = label(params, rules)
    pairs = zip(paths(params), jax.tree.leaves(labels), strict=True)
    if uncovered := [path for path, block in pairs if block == FROZEN]:
        raise ModelError(
            f"block_patterns of {model.name} select no block for {', '.join(uncovered[:8])}: add "
            "patterns, so that each parameter belongs to a block."
        )
    return labels


def layer_blocks(model: Model, params: Tree, stats: Tree) -> dict[str, str]:
    """Returns the block of each layer by path; a norm layer may have statistics alone."""
    blocks = jax.tree.leaves(block_labels(model, params))
    block_of_layer = dict(zip(map(layer, paths(params)), blocks, strict=True))
    for path in paths(stats):
        if layer(path) not in block_of_layer:
            block_of_layer[layer(path)] = next(
                (
                    block
                    for block, patterns in zip(model.blocks, model.block_patterns, strict=True)
                    if any(matcher(pattern)(path, None) for pattern in patterns)
                ),
                model.blocks[0],  # unknown: then each prefix depends on it
            )
    return block_of_layer


def inert_blocks(
    model: Model, shapes: tuple[Tree, Tree], labels: Tree, norms: Mapping[str, NormMode]
) -> tuple[tuple[str, ...], str]:
    """Returns the longest run of unchanged blocks from the input, and why the next one changes.

    Args:
      model: the network.
      shapes: parameters and statistics, or their shapes.
      labels: label tree of the stage.
      norms: mode of each norm layer.
    """
    params, stats = shapes
    block_of_layer = layer_blocks(model, params, stats)
    changing: dict[str, str] = {}
    for path, name in zip(paths(params), leaf_labels(params, labels), strict=True):
        if name != FROZEN:
            block = block_of_layer[layer(path)]
            changing[block] = f"{block} trains"
    for norm, mode in norms.items():
        if mode != "running":
            block = block_of_layer[norm]
            changing.setdefault(block, f"norm layers of {block} use the batch's statistics")
    inert = tuple(takewhile(lambda block: block not in changing, model.blocks))
    return inert, changing[model.blocks[len(inert)]]


def compile_prefix(
    model: Model,
    preprocessing: Preprocessing,
    devices: Devices,
    cuts: Sequence[str],
    like: tuple[Tree, Tree, Any],
    precision: MatmulPrecision = "default",
) -> dict[str, Any]:
    """Compiles `(params, stats, x) -> features` for the blocks up to each of `cuts`.

    A program for each cut makes the features the same to the last bit, whichever stage computes
    them.

    Args:
      model: the network.
      preprocessing: normalises the images.
      devices: where the programs run.
      cuts: blocks at which the prefix is cut.
      like: arguments of the first program, or their shapes; `x` is uint8 images `[b h w 3]`.
      precision: of float32 products.
    """
    programs: dict[str, Any] = {}
    params, stats, x = like
    first = model.blocks[0]
    for last in cuts:

        def step(
            params: Tree, stats: Tree, x: jax.Array, first: str = first, last: str = last
        ) -> jax.Array:
            x = x if programs else preprocessing.normalize(x)
            return model.apply(params, stats, x, norms="running", first=first, last=last)[0]

        lowered = devices.lower(jax.jit(with_precision(step, precision)), params, stats, x)
        x = devices.abstract_batch(lowered.out_info)
        programs[last] = lowered.compile()
        first = model.blocks[model.blocks.index(last) + 1]
    return programs
