"""Published fine-tuning strategies as tuples of ordinary stages: print, edit and combine them.

Most take `blocks`, the network's blocks from input to output, each a pattern or a tuple of
patterns. jaxft's networks declare theirs (`model.block_patterns`); for other networks, write them
down. Patterns of later blocks apply first, so the first block may be `*`: all other parameters.

Learning rates are base values and lengths are in epochs. Each function accepts the fields of
`Stage` as keyword arguments, which override its defaults in all stages that take optimizer steps.
Wrong arguments raise a RecipeError.

Example:
  >>> from jaxft import SGD, EarlyStop
  >>> stages = full(1e-3, epochs=5, optimizer=SGD(momentum=0.9), until=EarlyStop("loss"))
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack

from jaxft.anchor import Anchor
from jaxft.block_order import Blocks, block_tuples, decayed_lrs
from jaxft.early_stopping import EarlyStop, Monitor, PlateauStop
from jaxft.ema import EMA
from jaxft.errors import RecipeError
from jaxft.linear_probe import LinearProbe
from jaxft.losses import LossChoice
from jaxft.optim.optimizers import SGD, Adam, AdamW, Rule
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import (
    ClosedForm,
    CosineAnnealingLR,
    FastaiOneCycle,
    MultiStepLR,
    SlantedTriangular,
    Warmup,
)
from jaxft.patterns import Pattern, pattern_text
from jaxft.stage_options import Augment, Balance, NormChoice
from jaxft.stages import Stage
from jaxft.weight_averaging import WiSE


class Fields(TypedDict, total=False):
    """Fields of `Stage` other than name, train and epochs."""

    schedule: ClosedForm | ReduceLROnPlateau | None
    optimizer: Rule | None
    until: EarlyStop | PlateauStop | None
    restore: Literal["best", "last"]
    monitor: Monitor | None
    carry: Literal["reset", "keep"]
    schedule_time: Literal["restart", "continue"]
    steps: int | None
    max_minutes: float | None
    norms: NormChoice | Mapping[str, NormChoice]
    clip_norm: float | None
    clip_value: float | None
    accumulate: int
    ema: float | EMA | None
    anchor: Anchor | None
    class_weights: tuple[float, ...] | None
    finish: WiSE | None
    merge_lora: bool
    auto_rgn: bool
    batch_size: int | None
    augment: Augment | None
    num_views: int | None
    random_erasing: float | None
    mixup: float | None
    cutmix: float | None
    loss: LossChoice | None
    label_smoothing: float | None
    balance: Balance | None


# Defaults of the published strategies.
LPFT = Fields(optimizer=SGD(momentum=0.9), norms="eval")
SURGICAL = Fields(optimizer=Adam(weight_decay=1e-4), norms="eval")
ULMFIT = Fields(
    optimizer=Adam(b1=0.7, b2=0.99), schedule=SlantedTriangular(), carry="keep", restore="last"
)
BIT = Fields(optimizer=SGD(momentum=0.9), batch_size=512, restore="last")
FASTAI = Fields(
    optimizer=AdamW(b2=0.99, eps=1e-5, weight_decay=0.01, decay_vectors=False), restore="last"
)


def full(lr: float, *, epochs: int, **fields: Unpack[Fields]) -> tuple[Stage, ...]:
    """Trains all parameters at one learning rate.

    Example:
      >>> [(stage.name, stage.train, stage.epochs) for stage in full(1e-3, epochs=25)]
      [('all', {'*': 0.001}, 25)]
    """
    return (Stage("all", {"*": lr}, epochs, **fields),)


def bit(lr: float = 0.003, *, images: int, **fields: Unpack[Fields]) -> tuple[Stage, ...]:
    """Trains all parameters by BiT's hyper-rule (Kolesnikov et al. 2019, arXiv:1912.11370).

    The number of training images sets the length: 500 steps below 20,000 images, 10,000 below
    500,000, else 20,000. The learning rate drops to a tenth after 30, 60 and 90 % of the steps;
    from 20,000 images on, mixup is used. The learning rate first rises from 0, for 100 of 500
    steps, otherwise for 500 steps; a step at a milestone still has the learning rate before the
    drop. Both are as in the authors' code (google-research/big_transfer), whose 500-step schedule
    drops after 40, 60 and 80 % instead. The paper starts from a zero head: set
    `Recipe(head="zeros")`.

    Args:
      lr: base learning rate.
      images: number of training images.
      **fields: fields of `Stage`.

    Example:
      >>> import jax.numpy as jnp
      >>> (stage,) = bit(images=2000)
      >>> steps = jnp.array([0, 50, 100, 150, 151, 301, 451])
      >>> print(*(f"{lr:.1e}" for lr in stage.schedule.lr_at(0.003, steps, 500)))
      0.0e+00 1.5e-03 3.0e-03 3.0e-03 3.0e-04 3.0e-05 3.0e-06
    """
    if images < 1:
        raise RecipeError(f"bit: images is {images}; it must be at least 1.")
    steps, warmup = (500, 100) if images < 20_000 else (10_000 if images < 500_000 else 20_000, 500)
    drops = tuple(steps * percent // 100 + 1 - warmup for percent in (30, 60, 90))
    rule = Fields(
        steps=steps,
        schedule=Warmup(warmup, then=MultiStepLR(drops, by="step"), start_factor=0.0),
        mixup=0.0 if images < 20_000 else 0.1,
    )
    return (Stage("all", {"*": lr}, **BIT | rule | fields),)


def layer_decay(
    blocks: Blocks,
    lr: float,
    decay: float,
    *,
    epochs: int,
    min_scale: float = 0.0,
    no_opt_scale: float | None = None,
    **fields: Unpack[Fields],
) -> tuple[Stage, ...]:
    """Trains all blocks with layer-wise learning-rate decay, as BEiT and timm.

    From Bao et al. 2021 (BEiT, arXiv:2106.08254). `min_scale` and `no_opt_scale` are arguments of
    timm's `param_groups_layer_decay`.

    Args:
      blocks: blocks from input to output.
      lr: learning rate of the last block.
      decay: each earlier block trains at `decay` times the learning rate of the next one; 0.65 to
        0.9 is common.
      epochs: length.
      min_scale: least share of `lr` at which a block trains.
      no_opt_scale: blocks whose share, at least `min_scale`, is below this one stay frozen.
      **fields: fields of `Stage`.

    Example:
      >>> [stage.train for stage in layer_decay(["*", "layer4", "fc"], 1.0, 0.5, epochs=10)]
      [{'fc': 1.0, 'layer4': 0.5, '*': 0.25}]
    """
    order = block_tuples(
        "layer_decay", blocks, decay=decay, min_scale=min_scale, no_opt_scale=no_opt_scale
    )
    lrs = decayed_lrs(order, lr, decay, min_scale=min_scale, no_opt_scale=no_opt_scale)
    return (Stage("all", lrs, epochs, **fields),)


def surgical(
    blocks: Blocks, block: Pattern, lr: float, *, epochs: int, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """Trains a single block: surgical fine-tuning (Lee et al. 2022, arXiv:2210.11466).

    An early block suits shifted inputs, the last one shifted targets.

    Args:
      blocks: blocks from input to output.
      block: any pattern of the block to train.
      lr: learning rate.
      epochs: length.
      **fields: fields of `Stage`.

    Example:
      >>> surgical([("conv1", "layer1"), "layer2", "fc"], "conv1", 1e-3, epochs=15)[0].train
      {'conv1': 0.001, 'layer1': 0.001}
    """
    order = block_tuples("surgical", blocks, minimum=1)
    selected = [patterns for patterns in order if block in patterns]
    name = pattern_text(block)
    if not selected:
        raise RecipeError(f"surgical: block {name!r} is none of blocks {blocks!r}.")
    return (Stage(name, dict.fromkeys(selected[0], lr), epochs, **SURGICAL | fields),)


def auto_rgn(
    patterns: Sequence[Pattern], lr: float, *, epochs: int, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """Scales each tensor's learning rate by its relative gradient norm: Auto-RGN (Lee et al. 2022).

    The authors train all tensors without "bn" in their torch names, which includes the norm layers
    of the shortcuts. For torchvision's ResNets, these are the patterns of the example.

    Args:
      patterns: parameters to train.
      lr: learning rate of the tensor with the largest relative gradient norm.
      epochs: length.
      **fields: fields of `Stage`.

    Example:
      >>> auto_rgn(["**.kernel", "**.downsample", "fc"], 1e-3, epochs=15)[0].train
      {'**.kernel': 0.001, '**.downsample': 0.001, 'fc': 0.001}
    """
    relative = Fields(auto_rgn=True)
    return (Stage("all", dict.fromkeys(patterns, lr), epochs, **SURGICAL | relative | fields),)


def linear_probe_then_finetune(
    blocks: Blocks,
    lr: float,
    *,
    c: tuple[float, ...] = LinearProbe.c,
    epochs: int = 20,
    **fields: Unpack[Fields],
) -> tuple[Stage, ...]:
    """Solves for the last block, then trains all parameters on a cosine schedule: LP-FT.

    From Kumar et al. 2022 (arXiv:2202.10054).

    Args:
      blocks: blocks from input to output.
      lr: learning rate of the second stage. The paper takes the best of several from 3e-7 to 1e-2.
      c: inverse strengths of the probe's penalty, see `LinearProbe`.
      epochs: length of the second stage.
      **fields: fields of the second stage; the probe takes `restore`, `monitor` and `carry` too.

    Example:
      >>> probe, full_stage = linear_probe_then_finetune(["body", "fc"], 1e-4)
      >>> probe.name, list(probe.train), full_stage.train, full_stage.epochs
      ('probe', ['fc'], {'*': 0.0001}, 20)
    """
    head = block_tuples("linear_probe_then_finetune", blocks)[-1]
    cosine = Fields(schedule=CosineAnnealingLR())
    return (
        Stage(
            "probe",
            dict.fromkeys(head, LinearProbe(c)),
            restore=fields.get("restore", "best"),
            monitor=fields.get("monitor"),
            carry=fields.get("carry", "reset"),
        ),
        Stage("all", {"*": lr}, epochs, **LPFT | cosine | fields),
    )


def gradual_unfreeze(
    blocks: Blocks,
    lr: float,
    *,
    epochs: int,
    factor: float = 2.6,
    at_once: int = 1,
    **fields: Unpack[Fields],
) -> tuple[Stage, ...]:
    """Trains the last block, then the last two, and so on: one stage per newly unfrozen block.

    Args:
      blocks: blocks from input to output.
      lr: learning rate of the last block.
      epochs: length of each stage.
      factor: each earlier block trains at the learning rate of the next one divided by `factor`.
      at_once: number of blocks that each stage unfreezes.
      **fields: fields of `Stage`.

    Example:
      >>> stages = gradual_unfreeze(["stem", "body", "fc"], 1.0, epochs=2, factor=2, at_once=2)
      >>> [(stage.name, stage.train) for stage in stages]
      [('body+fc', {'fc': 1.0, 'body': 0.5}), ('stem', {'fc': 1.0, 'body': 0.5, 'stem': 0.25})]
    """
    order = block_tuples("gradual_unfreeze", blocks, factor=factor, at_once=at_once)
    fields = Fields(carry="keep") | fields
    stages = []
    for end in range(len(order), 0, -at_once):
        start = max(end - at_once, 0)
        unfrozen = [pattern for block in order[start:end] for pattern in block]
        name = "+".join("all" if p == "*" else pattern_text(p) for p in unfrozen)
        stages.append(Stage(name, decayed_lrs(order[start:], lr, 1 / factor), epochs, **fields))
    return tuple(stages)


def ulmfit(
    blocks: Blocks, lr: float = 0.01, *, epochs: int, factor: float = 2.6, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """Unfreezes one block per epoch, then trains all of them, as ULMFiT does.

    From Howard and Ruder 2018 (arXiv:1801.06146). Each stage has a slanted triangular schedule.

    Args:
      blocks: blocks from input to output.
      lr: maximum learning rate of the last block.
      epochs: length of the last stage.
      factor: each earlier block trains at the learning rate of the next one divided by `factor`.
      **fields: fields of `Stage`.

    Example:
      >>> for stage in ulmfit(["body", "fc"], epochs=10):
      ...     print(stage.epochs, {block: f"{lr:.5f}" for block, lr in stage.train.items()})
      1 {'fc': '0.01000'}
      10 {'fc': '0.01000', 'body': '0.00385'}
    """
    *first, last = gradual_unfreeze(blocks, lr, epochs=1, factor=factor, **ULMFIT | fields)
    return (*first, replace(last, epochs=epochs))


def discriminative(
    blocks: Blocks,
    low: float = 1e-5,
    high: float = 1e-3,
    *,
    epochs: int,
    head_lr: float = 2e-3,
    head_epochs: int = 1,
    train_norms: Sequence[Pattern] = (),
    **fields: Unpack[Fields],
) -> tuple[Stage, ...]:
    """Trains the last block, then all with discriminative learning rates: fastai's `fine_tune`.

    Each stage is one cycle of the 1cycle policy. fastai divides a ResNet into three blocks: the
    stem to layer2, layer3 and layer4, and the head.

    Args:
      blocks: blocks from input to output.
      low: learning rate of the first block in the second stage.
      high: learning rate of the last block in the second stage; the others are spaced evenly on a
        logarithmic scale, as fastai's `slice(low, high)`.
      epochs: length of the second stage.
      head_lr: learning rate of the last block in the first stage.
      head_epochs: length of the first stage.
      train_norms: patterns of norm layers that train in the first stage too, at `head_lr / 10`; in
        fastai, all norm layers.
      **fields: fields of `Stage`.

    Example:
      >>> for stage in discriminative([("stem", "layer1"), "layer2", "fc"], epochs=5):
      ...     print(stage.name, {block: f"{lr:g}" for block, lr in stage.train.items()})
      head {'fc': '0.002'}
      all {'fc': '0.001', 'layer2': '0.0001', 'stem': '1e-05', 'layer1': '1e-05'}
    """
    order = block_tuples("discriminative", blocks, low=low, high=high)
    head = dict.fromkeys(order[-1], head_lr) | dict.fromkeys(train_norms, head_lr / 10)
    all_blocks = decayed_lrs(order, high, (low / high) ** (1 / (len(order) - 1)))
    rising = Fields(schedule=FastaiOneCycle(pct_start=0.99))
    cycle = Fields(schedule=FastaiOneCycle(pct_start=0.3, div=5.0))
    return (
        Stage("head", head, head_epochs, **FASTAI | rising | fields),
        Stage("all", all_blocks, epochs, **FASTAI | cycle | fields),
    )
