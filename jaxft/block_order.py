"""The order of a network's blocks: its checks, and learning rates that decay with depth."""

from collections.abc import Callable, Sequence
from math import inf

from jaxft.errors import RecipeError
from jaxft.patterns import Pattern, pattern_text

Blocks = Sequence[Pattern | tuple[Pattern, ...]]
"""Blocks from input to output, e.g. `[("conv1", "bn1"), "layer1", "layer2", "fc"]`."""

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_scale": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "no_opt_scale": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "factor": ("at least 1", lambda x: 1 <= x < inf),
    "at_once": ("at least 1", lambda x: 1 <= x < inf),
    "low": ("positive and finite", lambda x: 0 < x < inf),
    "high": ("positive and finite", lambda x: 0 < x < inf),
}


def block_tuples(
    method: str, blocks: Blocks, minimum: int = 2, **values: float | None
) -> list[tuple[Pattern, ...]]:
    """Returns each block as a tuple of patterns, after checking the arguments of a method.

    `Stage` checks learning rates and lengths.

    Args:
      method: name of the method, for error messages.
      blocks: blocks from input to output.
      minimum: minimum number of blocks.
      **values: arguments to check against `_RANGES`; None is always valid.

    Raises:
      RecipeError: blocks or values are wrong; the message lists all of them.
    """
    errors = [
        f"{name} is {value}; it must be {_RANGES[name][0]}"
        for name, value in values.items()
        if value is not None and not _RANGES[name][1](value)
    ]
    items = () if isinstance(blocks, str) else blocks
    tuples = [tuple(item) if isinstance(item, list | tuple) else (item,) for item in items]
    if len(tuples) < minimum or () in tuples:
        errors.append(f"blocks is {blocks!r}; it must be {minimum} or more, each with a pattern")
    patterns = [pattern for block in tuples for pattern in block]
    if repeated := [pattern_text(p) for p in dict.fromkeys(patterns) if patterns.count(p) > 1]:
        errors.append(f"blocks has {', '.join(map(repr, repeated))} more than once")
    if errors:
        raise RecipeError(f"{method}: {'; '.join(errors)}.")
    return tuples


def decayed_lrs(
    blocks: Sequence[tuple[Pattern, ...]],
    lr: float,
    decay: float,
    *,
    min_scale: float = 0.0,
    no_opt_scale: float | None = None,
) -> dict[Pattern, float]:
    """Returns the patterns of the blocks that train, last block first, with lr·scale.

    The scale is decay^(blocks after it), raised to `min_scale`. Blocks whose scale is then below
    `no_opt_scale` are left out.
    """
    scales = [max(min_scale, decay**i) for i in range(len(blocks))]
    return {
        pattern: lr * scale
        for scale, block in zip(scales, reversed(blocks), strict=True)
        for pattern in block
        if scale >= (no_opt_scale or 0)
    }
