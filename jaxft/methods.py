"""Published ways to fine-tune, as ordinary stages: print them, edit them, put them in a recipe.

`blocks` is the network's order from input to output, each item a pattern or several. Our models
declare theirs (`model.block_patterns`); that of any other network is yours to say, never guessed.
Later blocks choose their parameters first, so the first may be `*`: whatever is left. Rates are
base rates, lengths are in epochs; what cannot be is a RecipeError. Every method takes further
fields of `Stage`, which go before its own in all of its stages that take steps.

>>> from jaxft import SGD, EarlyStop
>>> stages = full(1e-3, epochs=5, optimizer=SGD(momentum=0.9), until=EarlyStop("loss"))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Literal, TypedDict, Unpack

from jaxft.early_stopping import EarlyStop, Monitor, Plateau
from jaxft.errors import RecipeError
from jaxft.l2_sp import Anchor
from jaxft.linear_probe import LogisticRegression
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

Blocks = Sequence[Pattern | tuple[Pattern, ...]]
"""A network's order, e.g. `[("conv1", "bn1"), "layer1", "layer2", "fc"]`."""


class Fields(TypedDict, total=False):
    """What a stage has besides its name, what trains, and its length; see `Stage`."""

    schedule: ClosedForm | ReduceLROnPlateau | None
    optimizer: Rule | None
    until: EarlyStop | Plateau | None
    hand_on: Literal["best", "last"]
    monitor: Monitor | None
    carry: Literal["reset", "keep"]
    steps: int | None
    minutes: float | None
    norms: NormChoice | Mapping[str, NormChoice]
    clip_norm: float | None
    accumulate: int
    ema: float | None
    anchor: Anchor | None
    class_weights: tuple[float, ...] | None
    relative_rates: bool
    batch_size: int | None
    augment: Augment | None
    erasing: float | None
    mixup: float | None
    cutmix: float | None
    label_smoothing: float | None
    balance: Balance | None


# What the sources use.
LPFT = Fields(optimizer=SGD(momentum=0.9), norms="E")
SURGICAL = Fields(optimizer=Adam(weight_decay=1e-4), norms="E")
ULMFIT = Fields(
    optimizer=Adam(b1=0.7, b2=0.99), schedule=SlantedTriangular(), carry="keep", hand_on="last"
)
BIT = Fields(optimizer=SGD(momentum=0.9), batch_size=512, hand_on="last")
FASTAI = Fields(
    optimizer=AdamW(b2=0.99, eps=1e-5, weight_decay=0.01, decay_vectors=False), hand_on="last"
)


def full(lr: float, *, epochs: int, **fields: Unpack[Fields]) -> tuple[Stage, ...]:
    """Everything at one rate.

    >>> [(stage.name, stage.train, stage.epochs) for stage in full(1e-3, epochs=25)]
    [('all', {'*': 0.001}, 25)]
    """
    return (Stage("all", {"*": lr}, epochs, **fields),)


def bit(lr: float = 0.003, *, images: int, **fields: Unpack[Fields]) -> tuple[Stage, ...]:
    """Everything, for as long as the number of training images asks for: BiT's hyper-rule.

    From Kolesnikov et al. 2019, arXiv:1912.11370: 500 steps with fewer than 20,000 images, 10,000
    with fewer than 500,000, else 20,000; a tenth of the rate after 30, 60 and 90 % of them; mixup
    from 20,000 images on. As in the authors' code (google-research/big_transfer) it first rises
    from 0, for 100 of 500 steps or 500 of more, and a step that is a milestone still has the rate
    of those before. (There 500 steps have theirs at 40, 60 and 80 %.) The head starts at zero:
    that is `Recipe(head="zeros")`.

    >>> import jax.numpy as jnp
    >>> (stage,) = bit(images=2000)
    >>> rates = stage.schedule.rate(0.003, jnp.array([0, 50, 100, 150, 151, 301, 451]), 500)
    >>> print(*(f"{rate:.1e}" for rate in rates))
    0.0e+00 1.5e-03 3.0e-03 3.0e-03 3.0e-04 3.0e-05 3.0e-06
    """
    if images < 1:
        raise RecipeError(f"bit: images is {images}; it must be at least 1.")
    steps, rise = (500, 100) if images < 20_000 else (10_000 if images < 500_000 else 20_000, 500)
    drops = tuple(steps * percent // 100 + 1 - rise for percent in (30, 60, 90))
    rule = Fields(
        steps=steps,
        schedule=Warmup(rise, then=MultiStepLR(drops, by="step"), start_factor=0.0),
        mixup=0.0 if images < 20_000 else 0.1,
    )
    return (Stage("all", {"*": lr}, **BIT | rule | fields),)


def layer_decay(
    blocks: Blocks, lr: float, decay: float, *, epochs: int, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """All blocks, the last at `lr` and each one before at `decay` times the rate of the next.

    As in BEiT (Bao et al. 2021, arXiv:2106.08254) and timm; 0.65 to 0.9 is common.

    >>> [stage.train for stage in layer_decay(["*", "layer4", "fc"], 1.0, 0.5, epochs=10)]
    [{'fc': 1.0, 'layer4': 0.5, '*': 0.25}]
    """
    order = _order("layer_decay", blocks, decay=decay)
    return (Stage("all", _rates(order, lr, decay), epochs, **fields),)


def surgical(
    blocks: Blocks, block: Pattern, lr: float, *, epochs: int, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """One of the blocks, named by any of its patterns, alone (Lee et al. 2022, arXiv:2210.11466).

    An early block suits inputs that have shifted, the last one targets that have.

    >>> surgical([("conv1", "layer1"), "layer2", "fc"], "conv1", 1e-3, epochs=15)[0].train
    {'conv1': 0.001, 'layer1': 0.001}
    """
    order = _order("surgical", blocks, least=1)
    found = [patterns for patterns in order if block in patterns]
    if not found:
        raise RecipeError(f"surgical: block {pattern_text(block)!r} is none of blocks {blocks!r}.")
    return (Stage(pattern_text(block), dict.fromkeys(found[0], lr), epochs, **SURGICAL | fields),)


def auto_rgn(
    patterns: Sequence[Pattern], lr: float, *, epochs: int, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """Each tensor at a rate by its relative gradient norm, the largest at `lr` (Lee et al. 2022).

    The authors train all but the tensors with "bn" in their torch names, which leaves them the
    norms of the shortcuts. Of torchvision's ResNets the patterns are these:

    >>> auto_rgn(["**.kernel", "**.downsample", "fc"], 1e-3, epochs=15)[0].train
    {'**.kernel': 0.001, '**.downsample': 0.001, 'fc': 0.001}
    """
    relative = Fields(relative_rates=True)
    return (Stage("all", dict.fromkeys(patterns, lr), epochs, **SURGICAL | relative | fields),)


def linear_probe_then_finetune(
    blocks: Blocks,
    lr: float,
    *,
    c: tuple[float, ...] = LogisticRegression.c,
    epochs: int = 20,
    **fields: Unpack[Fields],
) -> tuple[Stage, ...]:
    """The last block solved, then everything on a cosine (Kumar et al. 2022, arXiv:2202.10054).

    The probe is a logistic regression, see `LogisticRegression` for `c`; of `fields` it takes
    `hand_on`, `monitor` and `carry`. The paper's `lr` is the best of several from 3e-7 to 1e-2.

    >>> probe, every = linear_probe_then_finetune(["body", "fc"], 1e-4)
    >>> probe.name, list(probe.train), every.train, every.epochs
    ('probe', ['fc'], {'*': 0.0001}, 20)
    """
    head = _order("linear_probe_then_finetune", blocks)[-1]
    cosine = Fields(schedule=CosineAnnealingLR())
    return (
        Stage(
            "probe",
            dict.fromkeys(head, LogisticRegression(c)),
            hand_on=fields.get("hand_on", "best"),
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
    """The last block, then the one before as well, and so on to the first; a stage for each.

    `at_once` blocks thaw per stage, `epochs` is the length of each. The last block trains at `lr`,
    each one before at the rate of the next divided by `factor`.

    >>> stages = gradual_unfreeze(["stem", "body", "fc"], 1.0, epochs=2, factor=2, at_once=2)
    >>> [(stage.name, stage.train) for stage in stages]
    [('body+fc', {'fc': 1.0, 'body': 0.5}), ('stem', {'fc': 1.0, 'body': 0.5, 'stem': 0.25})]
    """
    order = _order("gradual_unfreeze", blocks, factor=factor, at_once=at_once)
    fields = Fields(carry="keep") | fields
    stages = []
    for end in range(len(order), 0, -at_once):
        start = max(end - at_once, 0)
        thawed = "+".join(pattern_text(pattern) for block in order[start:end] for pattern in block)
        stages.append(Stage(thawed, _rates(order[start:], lr, 1 / factor), epochs, **fields))
    return tuple(stages)


def ulmfit(
    blocks: Blocks, lr: float = 0.01, *, epochs: int, factor: float = 2.6, **fields: Unpack[Fields]
) -> tuple[Stage, ...]:
    """`gradual_unfreeze`, a block an epoch, then `epochs` with all; each stage slanted triangular.

    From Howard and Ruder 2018, arXiv:1801.06146. `lr` is the last block's peak.

    >>> for stage in ulmfit(["body", "fc"], epochs=10):
    ...     print(stage.epochs, {block: f"{rate:.5f}" for block, rate in stage.train.items()})
    1 {'fc': '0.01000'}
    10 {'fc': '0.01000', 'body': '0.00385'}
    """
    *thaw, last = gradual_unfreeze(blocks, lr, epochs=1, factor=factor, **ULMFIT | fields)
    return (*thaw, replace(last, epochs=epochs))


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
    """The last block, then all of them, each stage one cycle: `fine_tune` of fastai.

    Rates rise from `low` at the first block to `high` at the last in equal ratios, fastai's
    `slice(low, high)`. Alone, the last block trains at `head_lr`, and with it `train_norms` at a
    tenth of that: in fastai all of the network's. Its own three blocks of a ResNet are the stem
    to layer2, layer3 and layer4, and the head.

    >>> for stage in discriminative([("stem", "layer1"), "layer2", "fc"], epochs=5):
    ...     print(stage.name, {block: f"{rate:g}" for block, rate in stage.train.items()})
    head {'fc': '0.002'}
    all {'fc': '0.001', 'layer2': '0.0001', 'stem': '1e-05', 'layer1': '1e-05'}
    """
    order = _order("discriminative", blocks, low=low, high=high)
    head = dict.fromkeys(order[-1], head_lr) | dict.fromkeys(train_norms, head_lr / 10)
    every = _rates(order, high, (low / high) ** (1 / (len(order) - 1)))
    rise = Fields(schedule=FastaiOneCycle(pct_start=0.99))
    cycle = Fields(schedule=FastaiOneCycle(pct_start=0.3, div=5.0))
    return (
        Stage("head", head, head_epochs, **FASTAI | rise | fields),
        Stage("all", every, epochs, **FASTAI | cycle | fields),
    )


_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "factor": ("at least 1", lambda x: 1 <= x < inf),
    "at_once": ("at least 1", lambda x: 1 <= x < inf),
    "low": ("positive and finite", lambda x: 0 < x < inf),
    "high": ("positive and finite", lambda x: 0 < x < inf),
}


def _order(
    method: str, blocks: Blocks, least: int = 2, **values: float
) -> list[tuple[Pattern, ...]]:
    """The blocks, each as a tuple. What becomes a stage's rate or length, `Stage` checks."""
    rules = [(name, value, *_RULES[name]) for name, value in values.items()]
    wrong = [f"{name} is {x}; it must be {rule}" for name, x, rule, obeys in rules if not obeys(x)]
    each = () if isinstance(blocks, str) else blocks
    order = [tuple(b) if isinstance(b, list | tuple) else (b,) for b in each]
    if len(order) < least or () in order:
        wrong.append(f"blocks is {blocks!r}; it must be {least} or more, each with a pattern")
    patterns = [pattern for block in order for pattern in block]
    if twice := [pattern_text(p) for p in dict.fromkeys(patterns) if patterns.count(p) > 1]:
        wrong.append(f"blocks has {', '.join(map(repr, twice))} more than once")
    if wrong:
        raise RecipeError(f"{method}: {'; '.join(wrong)}.")
    return order


def _rates(order: Sequence[tuple[Pattern, ...]], lr: float, decay: float) -> dict[Pattern, float]:
    """lr·decay^(L-1-i) for the patterns of block i of L, the last block first."""
    return {p: lr * decay**i for i, block in enumerate(reversed(order)) for p in block}
