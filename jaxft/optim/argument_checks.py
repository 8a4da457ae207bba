"""Checks the arguments of optimizers and schedules: value ranges, and hints for torch's names."""

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

from jaxft.errors import RecipeError

TORCH_HINTS = {
    "optimizer": "the stage that names a schedule applies it to its groups",
    "last_epoch": "a schedule starts with its stage",
    "verbose": "metrics.jsonl holds the learning rates of each epoch",
    "max_lr": "the maximum is the group's learning rate, Stage(..., train={'fc': 1e-3})",
    "epochs": "a schedule lasts as long as its stage, Stage(..., epochs=5)",
    "steps_per_epoch": "a schedule lasts as long as its stage, Stage(..., epochs=5)",
}
"""Arguments of torch's schedulers, each with its equivalent here."""


class RangeChecked:
    """Base of dataclasses that check the range of each field by its name.

    Raises:
      RecipeError: fields are out of their range; the message lists all of them.
    """

    def __post_init__(self) -> None:
        if wrong := self.wrong_values(vars(self)):
            raise RecipeError(f"{type(self).__name__}: {'; '.join(wrong)}.")

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each value out of its range."""
        return [
            f"{name} is {values[name]!r}; it must be {rule}"
            for rule, (names, is_valid) in _RULES.items()
            for name in names.split()
            if values.get(name) is not None and not is_valid(values[name])
        ]


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "at least 1": (
        "step_size step_size_up step_size_down t_0 t_mult t_max total_iters total_steps length "
        "ratio",
        lambda x: 1 <= x < inf,
    ),
    "at least 0": (
        "eta_min patience threshold cooldown min_lr eps momentum weight_decay momentum_decay "
        "lr_decay initial_accumulator_value",
        lambda x: 0 <= x < inf,
    ),
    "positive": ("gamma power div div_final div_factor final_div_factor", lambda x: 0 < x < inf),
    "above 0 and below 1": ("factor", lambda x: 0 < x < 1),
    "in [0, 1]": ("start_factor end_factor pct_start cut_frac alpha", lambda x: 0 <= x <= 1),
    "in [0, 1)": ("base_momentum max_momentum b1 b2", lambda x: 0 <= x < 1),
    "three of [0, 1)": ("moms", lambda x: all(0 <= m < 1 for m in x)),
    "a rising tuple, from 1": ("milestones", lambda x: x == tuple(sorted({*x})) and x[:1] > (0,)),
    "finite": ("dampening", isfinite),
}
