"""Learning-rate schedules in closed form: torch's, fastai's and ULMFiT's, from a stage's start.

A schedule is a value without a state: an interrupted run changes nothing, and a new stage starts
it anew. (ReduceLROnPlateau, which depends on what validation says, is in `plateau`.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite, log, pi
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError

Unit = Literal["epoch", "step"]
Shape = Literal["cos", "linear"]
Time = jax.Array | int
Number = jax.Array | float


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as a function of time: the epoch, or step, t trains at the rate of t.

    `t` counts from 0 at the stage's start and may be traced, or an array of times; `total`, the
    stage's length in the same unit, is static; `lr` is the group's base rate. Results are in
    jax's default float type.
    """

    @property
    def by(self) -> Unit:
        """What times count."""

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """The learning rate at a time."""

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """The momentum (Adam: b1) at a time; None where the schedule leaves it alone."""
        return None


# Arguments of torch's schedulers, and what to write here.
OF_TORCH = {
    "optimizer": "the stage that names a schedule applies it to its groups",
    "last_epoch": "a schedule starts with its stage",
    "verbose": "the rates of each epoch are in metrics.jsonl",
    "max_lr": "the maximum is the group's rate, Stage(..., train={'fc': 1e-3})",
    "epochs": "a schedule lasts as long as its stage, Stage(..., epochs=5)",
    "steps_per_epoch": "a schedule lasts as long as its stage, Stage(..., epochs=5)",
}


class Checked:
    """A dataclass whose fields obey the rules of their names.

    Raises RecipeError that lists all that do not.
    """

    def __post_init__(self) -> None:
        if wrong := self.wrong_values(vars(self)):
            raise RecipeError(f"{type(self).__name__}: {'; '.join(wrong)}.")

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns a complaint for each value out of its range."""
        return [
            f"{name} is {values[name]!r}; it must be {rule}"
            for rule, (names, obeys) in _RULES.items()
            for name in names.split()
            if values.get(name) is not None and not obeys(values[name])
        ]


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "at least 1": ("step_size t_max total_iters total_steps length ratio", lambda x: 1 <= x < inf),
    "at least 0": (
        "eta_min patience threshold cooldown min_lr eps momentum weight_decay",
        lambda x: 0 <= x < inf,
    ),
    "positive": ("gamma power div div_final div_factor final_div_factor", lambda x: 0 < x < inf),
    "above 0 and below 1": ("factor", lambda x: 0 < x < 1),
    "in [0, 1]": ("start_factor end_factor pct_start cut_frac alpha", lambda x: 0 <= x <= 1),
    "in [0, 1)": ("base_momentum max_momentum b1 b2", lambda x: 0 <= x < 1),
    "three of [0, 1)": ("moms", lambda x: all(0 <= m < 1 for m in x)),
    "a rising tuple, from 1": ("milestones", lambda x: x == tuple(sorted({*x})) and x[:1] > (0,)),
    "a schedule in closed form": ("then", lambda x: isinstance(x, Schedule)),
    "finite": ("dampening", isfinite),
}


@checked(**OF_TORCH)
@dataclass(frozen=True)
class Constant(Checked, Schedule):
    """The base rate throughout."""

    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """The base rate."""
        return jnp.full_like(_float(t), lr)


@checked(**OF_TORCH)
@dataclass(frozen=True)
class StepLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.StepLR`: times gamma every step_size."""

    step_size: int
    gamma: float = 0.1
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·gamma^⌊t/step_size⌋."""
        return lr * _power(self.gamma, jnp.asarray(t) // self.step_size)


@checked(**OF_TORCH)
@dataclass(frozen=True)
class MultiStepLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.MultiStepLR`: times gamma at each milestone."""

    milestones: tuple[int, ...]
    gamma: float = 0.1
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·gamma^(how many milestones are at or before t)."""
        return lr * _power(self.gamma, sum(jnp.asarray(t) >= m for m in self.milestones))


@checked(**OF_TORCH)
@dataclass(frozen=True)
class ExponentialLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.ExponentialLR`: times gamma each time."""

    gamma: float
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·gamma^t."""
        return lr * _power(self.gamma, t)


@checked(**OF_TORCH)
@dataclass(frozen=True)
class CosineAnnealingLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.CosineAnnealingLR`: half a cosine from lr to eta_min at t_max.

    Without t_max that is the stage's end, which its last epoch does not quite reach. After t_max
    the rate rises again, as torch's does.

    >>> [f"{CosineAnnealingLR().rate(1.0, t, total=4):.2f}" for t in range(5)]
    ['1.00', '0.85', '0.50', '0.15', '0.00']
    """

    t_max: int | None = None
    eta_min: float = 0.0
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """eta_min + (lr - eta_min)·(1 + cos(π·t/t_max))/2."""
        end = self.t_max or total
        back_and_forth = end - abs(end - jnp.asarray(t) % (2 * end))
        return _through([lr, self.eta_min], [end], back_and_forth, "cos")


@checked(**OF_TORCH)
@dataclass(frozen=True)
class PolynomialLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.PolynomialLR`: to 0 at total_iters (else the stage's end)."""

    total_iters: int | None = None
    power: float = 1.0
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·(1 - t/total_iters)^power, then 0."""
        end = self.total_iters or total
        return lr * (jnp.maximum(end - _float(t), 0) / end) ** self.power


@checked(**OF_TORCH)
@dataclass(frozen=True)
class LinearLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.LinearLR`: from one factor (also 0) to another, then constant."""

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: int = 5
    by: Unit = "epoch"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·(start_factor + (end_factor - start_factor)·min(t/total_iters, 1))."""
        return lr * _through([self.start_factor, self.end_factor], [self.total_iters], t, "linear")


@checked("then", **OF_TORCH)
@dataclass(frozen=True)
class Warmup(Checked, Schedule):
    """A linear rise to lr, and any schedule that starts after it, in that schedule's unit.

    Torch's `SequentialLR([LinearLR(start_factor, total_iters=length), then], [length])`.

    >>> schedule = Warmup(2, then=CosineAnnealingLR(by="step"), start_factor=0.5)
    >>> schedule.by, [f"{schedule.rate(1.0, t, total=6):.2f}" for t in range(6)]
    ('step', ['0.50', '0.75', '1.00', '0.85', '0.50', '0.15'])
    """

    length: int
    then: "ClosedForm"
    start_factor: float = 1 / 3

    @property
    def by(self) -> Unit:
        """What times count: the same as for the schedule that follows."""
        return self.then.by

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·(start_factor + (1 - start_factor)·t/length), then `then` as if time started anew."""
        rise = LinearLR(self.start_factor, total_iters=self.length).rate(lr, t, total)
        return jnp.where(t < self.length, rise, self.then.rate(lr, *self._since(t, total)))

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """That of `then`, which waits at its start during the rise."""
        return self.then.momentum(*self._since(t, total))

    def _since(self, t: Time, total: int) -> tuple[jax.Array, int]:
        return jnp.maximum(jnp.asarray(t) - self.length, 0), max(total - self.length, 1)


@checked(**OF_TORCH)
@dataclass(frozen=True)
class OneCycleLR(Checked, Schedule):
    """`torch.optim.lr_scheduler.OneCycleLR`: up to lr and down to next to nothing (Smith 2018).

    The base rate is the maximum. `three_phase` comes down the way it went up before it goes on
    to the end. Unlike torch's it may have its peak at the first step, and stays where it ended.
    """

    total_steps: int | None = None
    pct_start: float = 0.3
    anneal_strategy: Shape = "cos"
    cycle_momentum: bool = True
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    by: Unit = "step"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """From lr/div_factor through lr to lr/(div_factor·final_div_factor)."""
        low = 1 / self.div_factor
        return lr * self._cycle([low, 1.0, low, low / self.final_div_factor], t, total)

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """From max_momentum through base_momentum back to max_momentum; None if not cycled."""
        high, low = self.max_momentum, self.base_momentum
        return self._cycle([high, low, high, high], t, total) if self.cycle_momentum else None

    def _cycle(self, knots: list[float], t: Time, total: int) -> jax.Array:
        steps = self.total_steps or total
        peak = self.pct_start * steps - 1
        ends = [peak, 2 * peak, steps - 1]
        if not self.three_phase:
            del knots[2], ends[1]
        return _through(knots, ends, t, self.anneal_strategy)


@checked(**OF_TORCH)
@dataclass(frozen=True)
class FastaiOneCycle(Checked, Schedule):
    """fastai's `fit_one_cycle`: like OneCycleLR, but each step stands at t/total.

    The base rate is the maximum; the last step does not quite reach the end. `moms` are the
    momenta at start, peak and end.
    """

    pct_start: float = 0.25
    div: float = 25.0
    div_final: float = 1e5
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95)
    by: Unit = "step"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """From lr/div through lr to lr/div_final, on cosines."""
        knots = [1 / self.div, 1.0, 1 / self.div_final]
        return lr * _through(knots, [self.pct_start * total, total], t, "cos")

    def momentum(self, t: Time, total: int) -> jax.Array:
        """Through `moms`, on cosines."""
        return _through(self.moms, [self.pct_start * total, total], t, "cos")


@checked(**OF_TORCH)
@dataclass(frozen=True)
class SlantedTriangular(Checked, Schedule):
    """A short linear rise from lr/ratio to lr and a long fall (ULMFiT, Howard and Ruder 2018).

    The fall takes the rest, total - cut, as in the authors' code. The paper has
    cut·(1/cut_frac - 1), the same if total·cut_frac is whole, but else rates may turn negative.
    """

    cut_frac: float = 0.1
    ratio: float = 32.0
    by: Unit = "step"

    def rate(self, lr: Number, t: Time, total: int) -> jax.Array:
        """lr·(1 + p·(ratio - 1))/ratio with p from 0 to 1 at cut = ⌊total·cut_frac⌋, and back."""
        cut = max(floor(total * self.cut_frac), 1)
        p = _through([0.0, 1.0, 0.0], [cut, total], t, "linear")
        return lr * (1 + p * (self.ratio - 1)) / self.ratio


ClosedForm = (
    Constant | StepLR | MultiStepLR | ExponentialLR | CosineAnnealingLR | PolynomialLR | LinearLR
    | Warmup | OneCycleLR | FastaiOneCycle | SlantedTriangular
)  # fmt: skip
"""The schedules that a recipe can name."""


def _through(knots: Sequence[Number], ends: Sequence[float], t: Time, shape: Shape) -> jax.Array:
    """From the first knot at time 0 to each next one at its end; the last one ever after."""
    t = _float(t)
    value = jnp.full_like(t, knots[-1])
    segments = list(zip((0.0, *ends), ends, knots, knots[1:], strict=False))
    for start, end, a, b in reversed(segments):
        if start >= end:  # a phase of no length: its neighbours meet there
            continue
        left, done = (end - t) / (end - start), (t - start) / (end - start)
        if shape == "cos":  # (1 ± cos(π·done))/2, in a form that keeps its digits near 0
            left, done = jnp.sin(pi / 2 * left) ** 2, jnp.sin(pi / 2 * done) ** 2
        value = jnp.where(t <= end, a * left + b * done, value)
    return value


def _power(gamma: float, n: Time) -> jax.Array:
    # The logarithm in double, or float32 would raise the rounding error of gamma to the n.
    return jnp.exp(log(gamma) * _float(n))


def _float(x: Number) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(float))
