"""Stages of each strategy by name, with default learning rates.

`jaxft finetune DATA --strategy NAME` trains by one of them, `jaxft compare` by several. All train
with Adam on a cosine schedule with running statistics in the norm layers, so that strategies differ
in which parameters train, when and at which learning rate, and in nothing else. Where a strategy
trains a new head by gradient steps, its learning rate is ten times that of the body.
"""

from collections.abc import Callable, Mapping, Sequence

from jaxft import strategies
from jaxft.anchor import L1SP, L2SP
from jaxft.block_order import block_tuples, decayed_lrs
from jaxft.errors import RecipeError, suggestion
from jaxft.linear_probe import LinearProbe
from jaxft.models.model import Architecture
from jaxft.optim.optimizers import Adam
from jaxft.optim.schedules import CosineAnnealingLR
from jaxft.patterns import Pattern
from jaxft.stages import Stage
from jaxft.strategies import Fields

Blocks = Mapping[str, tuple[Pattern, ...]]
"""Patterns of each block by name, from input to output."""

LR, EPOCHS = 3e-5, 5
"""Default learning rate of the body, and default length of all stages together."""

_HEAD_FACTOR = 10.0  # of a new head's learning rate to the body's
_FIELDS = Fields(optimizer=Adam(), schedule=CosineAnnealingLR(), norms="eval")


def names(network: Architecture) -> tuple[str, ...]:
    """Returns the names of all strategies for a network.

    Example:
      >>> from jaxft import models
      >>> names(models.create("cifar_resnet8", num_classes=5))[-3:]
      ('surgical-layer1', 'surgical-layer2', 'surgical-layer3')
    """
    return (*_FUNCTIONS, *(f"surgical-{block}" for block in network.blocks[:-1]))


def default_stages(
    name: str, network: Architecture, *, lr: float, epochs: int
) -> tuple[Stage, ...]:
    """Returns the stages of a strategy.

    Args:
      name: one of `names(network)`:

        - `probe`: logistic regression on the features before the head (`LinearProbe`).
        - `full`: all parameters at once.
        - `gradual`: gradual unfreezing from the last block to the first (Howard and Ruder 2018),
          in as many stages as there are blocks, at most `epochs`.
        - `gradual-first`: the same from the first block to the last; the head trains throughout.
        - `lp-ft`: the probe, then all parameters (Kumar et al. 2022).
        - `l2-sp`, `l1-sp`: all parameters, held to the pretrained ones (Li et al. 2018).
        - `layer-decay`: all parameters, each block of the body at 0.75 times the learning rate of
          the next (Bao et al. 2021).
        - `auto-rgn`: all tensors, learning rates by relative gradient norm (Lee et al. 2022).
        - `norms`: the head, and all scales and biases (BitFit, Ben Zaken et al. 2021).
        - `surgical-BLOCK`: the head and one block (Lee et al. 2022).
      network: the network, for its blocks.
      lr: learning rate of the body.
      epochs: total length of the stages that take gradient steps.

    Raises:
      RecipeError: there is no such strategy, or the network has a single block.
    """
    order = block_tuples(name, network.block_patterns)
    blocks = dict(zip(network.blocks, order, strict=True))
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](blocks, lr, epochs)
    known = names(network)
    if name not in known:
        raise RecipeError(
            f"no strategy is called {name!r}.{suggestion(name, known)} Strategies: "
            f"{', '.join(known)}."
        )
    block = blocks[name.removeprefix("surgical-")]
    return (_one_stage(blocks, dict.fromkeys(block, lr), lr, epochs),)


def _head(blocks: Blocks) -> tuple[Pattern, ...]:
    return list(blocks.values())[-1]


def _one_stage(
    blocks: Blocks, train: dict[Pattern, float], lr: float, epochs: int, **fields: object
) -> Stage:
    """Returns a stage that trains the head and these patterns."""
    head = dict.fromkeys(_head(blocks), _HEAD_FACTOR * lr)
    settings: Fields = _FIELDS | fields  # type: ignore[assignment]
    return Stage("all", head | train, epochs, **settings)


def _probe(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (Stage("probe", dict.fromkeys(_head(blocks), LinearProbe())),)


def _full(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (_one_stage(blocks, {"*": lr}, lr, epochs),)


def _gradual(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return _in_order(blocks, list(blocks)[-2::-1], lr, epochs)


def _gradual_first(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return _in_order(blocks, list(blocks)[:-1], lr, epochs)


def _in_order(blocks: Blocks, body: Sequence[str], lr: float, epochs: int) -> tuple[Stage, ...]:
    """Returns stages that unfreeze the blocks in `body`, in that order; the head trains in all."""
    count = min(len(body), epochs)
    ends = [len(body) * (k + 1) // count for k in range(count)]
    lengths = [epochs * (k + 1) // count - epochs * k // count for k in range(count)]
    head = dict.fromkeys(_head(blocks), _HEAD_FACTOR * lr)
    fields = _FIELDS | Fields(carry="keep")
    stages = []
    for end, length in zip(ends, lengths, strict=True):
        train = {pattern: lr for block in body[:end] for pattern in blocks[block]}
        # A first block "*" stands for all other parameters, and the first matching pattern wins.
        train = dict(sorted(train.items(), key=lambda item: item[0] == "*"))
        stages.append(Stage(f"to-{body[end - 1]}", head | train, length, **fields))
    return tuple(stages)


def _lp_ft(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return strategies.linear_probe_then_finetune(
        list(blocks.values()), lr, epochs=epochs, **_FIELDS
    )


def _l2_sp(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (_one_stage(blocks, {"*": lr}, lr, epochs, anchor=L2SP()),)


def _l1_sp(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (_one_stage(blocks, {"*": lr}, lr, epochs, anchor=L1SP(body=1e-3)),)


def _layer_decay(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (_one_stage(blocks, decayed_lrs(list(blocks.values())[:-1], lr, 0.75), lr, epochs),)


def _auto_rgn(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    return (_one_stage(blocks, {"*": _HEAD_FACTOR * lr}, lr, epochs, auto_rgn=True),)


def _norms(blocks: Blocks, lr: float, epochs: int) -> tuple[Stage, ...]:
    vectors: dict[Pattern, float] = dict.fromkeys(("**.scale", "**.bias"), _HEAD_FACTOR * lr)
    return (_one_stage(blocks, vectors, lr, epochs),)


_FUNCTIONS: dict[str, Callable[[Blocks, float, int], tuple[Stage, ...]]] = {
    "probe": _probe,
    "full": _full,
    "gradual": _gradual,
    "gradual-first": _gradual_first,
    "lp-ft": _lp_ft,
    "l2-sp": _l2_sp,
    "l1-sp": _l1_sp,
    "layer-decay": _layer_decay,
    "auto-rgn": _auto_rgn,
    "norms": _norms,
}

STRATEGIES = (*_FUNCTIONS, "surgical-BLOCK")
"""Names of all strategies, for help texts."""
