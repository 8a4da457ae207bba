"""Stages: what trains, at which rate, for how long. Plain values; `groups` makes them a plan."""

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import optax

from jaxft.choices import Augment, Balance, NormChoice
from jaxft.dataclass_checks import checked
from jaxft.early_stopping import EarlyStop, Mode, Monitor, Plateau, default_mode
from jaxft.errors import RecipeError
from jaxft.l2_sp import Anchor
from jaxft.labels import Pattern, show
from jaxft.linear_probe import LogisticRegression
from jaxft.optim.optimizers import Optimizer, Rule
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import ClosedForm, Constant, Schedule

_RATE = "each group in train has a rate of its own, train={'fc': 1e-3}"


# The stage checks an update's values, because it can name the pattern.
@checked("lr", "schedule", "optimizer", "weight_decay")
@dataclass(frozen=True)
class Update:
    """How a group trains, where a rate alone does not say it.

    Attributes:
      lr: the base learning rate.
      schedule: what becomes of it within the stage; else the stage's.
      optimizer: one of ours, or any optax transform that gives the update before the rate is
        applied (`optax.scale_by_lion()`); else the stage's.
      weight_decay: replaces that of the optimizer.
    """

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    weight_decay: float | None = None


@checked(
    "schedule",
    "optimizer",
    "norms",
    lr=_RATE,
    learning_rate=_RATE,
    early_stopping="write until=EarlyStop(patience=3)",
    scheduler="it is called schedule",
    lr_scheduler="it is called schedule",
    max_grad_norm="it is called clip_norm",
    grad_accum="it is called accumulate",
    freeze="what no pattern in train matches is frozen",
)
@dataclass(frozen=True)
class Stage:
    """What trains, at which rate, for how long, and how it ends.

    A stage is as long as `epochs` or `steps` say, whichever is over first, and ends earlier by
    `until` or `minutes`. Validation follows each epoch, and the last one however short it is.

    Attributes:
      name: shown in tables and logs; unique within a recipe.
      train: pattern to learning rate (or `Update`); the first that matches a parameter wins,
        and what none matches is frozen. `{"fc": LogisticRegression()}` solves the head instead of
        stepping it: such a stage has but a name, `hand_on`, `monitor` and `carry` besides, and
        counts as one step of one epoch.
      epochs: passes over the training data, at most.
      schedule: of all groups that name none of their own; constant by default.
      optimizer: likewise; the recipe's by default.
      until: ends the stage earlier.
      hand_on: the next stage starts from this stage's `best` epoch by validation or from its
        `last`. The stage's start is a candidate for the best; of equal ones the first is taken.
      carry: `reset` starts every group's optimizer afresh, like a new torch optimizer; `keep`
        keeps that of groups which have trained before, like `add_param_group`, whatever becomes of
        their hyperparameters. Weights and optimizer state are handed on together: after a stage
        with `hand_on="best"`, moments and step counts are those of its best epoch.
      monitor: metric that the best epoch is chosen by: `accuracy`, `top5` or `loss`; by default
        that of `until=EarlyStop(...)`, else the accuracy.
      steps: optimizer steps, at most.
      minutes: of training and validation, at most. What such a stage does depends on the machine.
      norms: what the norm layers use, one of `jaxft.choices.NormChoice` for all of them or for
        those that each pattern selects (B for the rest): `{"layer4": "A", "*": "E"}`.
      clip_norm: gradients are scaled down to this norm over all that trains.
      accumulate: a batch is worked through in so many parts, one after another, for their memory.
        `batch_size` is the effective one, of one optimizer step, not that of a part as in torch's
        loops. An epoch's last batch has as many parts as it fills, its step divides by its own
        number of images, and no step is left over for the next epoch.
        On CPU that loop is slow with convolutions of networks other than jaxft's own.
      ema: the decay, each step, of an average of the weights and running statistics since the
        stage's start; it is what validation sees and what the stage hands on. 0.999, say.
      anchor: a penalty that holds the weights near the pretrained ones (L2-SP).
      class_weights: one a class, as torch's `CrossEntropyLoss(weight=...)`; instead of `balance`.
        The mean divides by the sum of the images' weights, or with mixup or cutmix by the number
        of images, as torch does for probabilities. Validation losses are plain cross entropy.
      relative_rates: at the start of each epoch every tensor's rate becomes the base rate times its
        relative gradient norm, by the largest one's, and every optimizer starts afresh (Auto-RGN,
        see `jaxft.train.auto_rgn`).
      batch_size, augment, views, erasing, mixup, cutmix, label_smoothing, balance: instead of the
        recipe's.

    >>> from jaxft import Adam, schedules
    >>> stage = Stage(
    ...     "late",
    ...     train={"fc": 1e-3, "layer4": Update(1e-4, optimizer=Adam())},
    ...     epochs=10,
    ...     schedule=schedules.CosineAnnealingLR(),
    ...     until=EarlyStop("accuracy", patience=3),
    ... )
    """

    name: str
    train: Mapping[Pattern, float | Update | LogisticRegression]
    epochs: int | None = None
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    until: EarlyStop | Plateau | None = None
    hand_on: Literal["best", "last"] = "best"
    carry: Literal["reset", "keep"] = "reset"
    _: KW_ONLY
    monitor: Monitor | None = None
    steps: int | None = None
    minutes: float | None = None
    norms: NormChoice | Mapping[str, NormChoice] = "B"
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    anchor: Anchor | None = None
    class_weights: tuple[float, ...] | None = None
    relative_rates: bool = False
    batch_size: int | None = None
    augment: Augment | None = None
    views: int | None = None
    erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    label_smoothing: float | None = None
    balance: Balance | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a saved recipe holds no unknown field

    def __post_init__(self) -> None:
        if self.solver:
            wrong = self._wrong_if_solved()
        else:
            wrong = [*self._wrong_rates(), *self._wrong_limits()]
        if not self.name:
            wrong.insert(0, "its name is empty")
        if wrong:
            raise RecipeError(f"stage {self.name!r}: {'; '.join(wrong)}.")

    def _wrong_if_solved(self) -> list[str]:
        wrong = []
        if len(self.train) > 1:
            wrong.append("beside a LogisticRegression nothing else trains")
        said = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("name", "train", "hand_on", "monitor", "carry")
            and getattr(self, field.name) != field.default
        ]
        if said:
            wrong.append(f"it is solved and takes no steps; leave out {', '.join(said)}")
        return wrong

    def _wrong_rates(self) -> list[str]:
        wrong, rules = [], {"its optimizer": self.optimizer}
        if not self.train:
            wrong.append("it trains nothing; name a pattern and a rate in `train`")
        for pattern, update in self.updates.items():
            name = show(pattern)
            lr, rule, decay = update.lr, update.optimizer, update.weight_decay
            if not (_is_number(lr) and lr > 0):
                wrong.append(
                    f"the rate of {name!r} is {lr!r}; it must be a positive, finite number"
                )
            if decay is not None and not (_is_number(decay) and decay >= 0):
                wrong.append(f"the weight_decay of {name!r} is {decay!r}; it must not be negative")
            rules[f"the optimizer of {name!r}"] = rule
        for place, rule in rules.items():
            if not isinstance(rule, Optimizer | optax.GradientTransformation | None):
                wrong.append(
                    f"{place} is {rule!r}; it must be one of jaxft's or an optax transform"
                )
        for place, schedule in self._schedules().items():
            if not isinstance(schedule, Schedule | ReduceLROnPlateau | None):
                wrong.append(
                    f"{place} is {schedule!r}; it must be one of jaxft.schedules or a "
                    "ReduceLROnPlateau"
                )
        return wrong

    def _schedules(self) -> dict[str, object]:
        own = {
            f"the schedule of {show(p)!r}": update.schedule for p, update in self.updates.items()
        }
        return {"its schedule": self.schedule, **own}

    def _wrong_limits(self) -> list[str]:
        wrong = []
        if self.epochs is None and self.steps is None:
            wrong.append("it has no length; give it epochs or steps")
        for limit in ("epochs", "steps", "accumulate"):
            if (count := getattr(self, limit)) is not None and count < 1:
                wrong.append(f"it has {count} {limit}; it must have at least 1")
        for limit in ("minutes", "clip_norm"):
            if (value := getattr(self, limit)) is not None and not (
                _is_number(value) and value > 0
            ):
                wrong.append(f"{limit} is {value}; it must be a positive, finite number")
        if self.ema is not None and not 0 < self.ema < 1:
            wrong.append(f"ema is {self.ema}; a decay lies between 0 and 1")
        if self.class_weights is not None and not (
            all(_is_number(w) and w >= 0 for w in self.class_weights) and any(self.class_weights)
        ):
            wrong.append(f"class_weights are {self.class_weights}; none is negative, not all are 0")
        if not isinstance(self.norms, str | Mapping):
            wrong.append(f"norms is {self.norms!r}; it must be a letter or a mapping of patterns")
            return wrong
        for choice in self.norm_choices.values():
            if choice not in get_args(NormChoice):
                wrong.append(
                    f"norms has {choice!r}; it must be one of {', '.join(get_args(NormChoice))}"
                )
        if isinstance(self.until, Plateau) and not any(
            isinstance(schedule, ReduceLROnPlateau) for schedule in self._schedules().values()
        ):
            wrong.append("until is a Plateau, which counts those of a ReduceLROnPlateau schedule")
        return wrong

    @property
    def solver(self) -> LogisticRegression | None:
        """What solves the head, if the stage takes no steps."""
        return next((x for x in self.train.values() if isinstance(x, LogisticRegression)), None)

    @property
    def updates(self) -> Mapping[Pattern, Update]:
        """`train` with an `Update` for each rate; nothing if the stage is solved."""
        return {
            pattern: given if isinstance(given, Update) else Update(given)
            for pattern, given in self.train.items()
            if not isinstance(given, LogisticRegression)
        }

    @property
    def norm_choices(self) -> Mapping[str, NormChoice]:
        """`norms` by pattern, in order of precedence."""
        return {"*": self.norms} if isinstance(self.norms, str) else self.norms

    @property
    def best_by(self) -> tuple[Monitor, Mode]:
        """The metric that the best epoch is chosen by, and whether less or more of it is better."""
        until = self.until
        if isinstance(until, EarlyStop) and self.monitor in (None, until.monitor):
            return until.monitor, until.mode or default_mode(until.monitor)
        monitor = self.monitor or "accuracy"
        return monitor, default_mode(monitor)

    def length(self, steps_per_epoch: int) -> int:
        """Its steps, if nothing ends it earlier; one if it is solved."""
        if self.solver:
            return 1
        epochs = [] if self.epochs is None else [self.epochs * steps_per_epoch]
        return min(epochs + ([] if self.steps is None else [self.steps]))

    def resolve(self, pattern: Pattern, optimizer: Rule) -> "Resolved":
        """How what `pattern` selects trains, every default filled in.

        Raises RecipeError where a foreign optimizer is to take a weight_decay.
        """
        update = self.updates[pattern]
        rule = update.optimizer or self.optimizer or optimizer
        if update.weight_decay is not None:
            if isinstance(rule, optax.GradientTransformation):
                raise RecipeError(
                    f"stage {self.name!r}: {show(pattern)!r} has a weight_decay, but its optimizer "
                    "is an optax transform: put the decay into that."
                )
            rule = dataclasses.replace(rule, weight_decay=update.weight_decay)
        schedule = update.schedule or self.schedule or Constant()
        return Resolved(float(update.lr), schedule, rule)


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


class Resolved(NamedTuple):
    """An `Update` with nothing left open."""

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau
    optimizer: Rule


def check_stages(stages: "Stage | Sequence[Stage]") -> tuple[Stage, ...]:
    """Returns the stages; raises RecipeError if there are none, or two of one name."""
    each = (stages,) if isinstance(stages, Stage) else tuple(stages)
    if wrong := [stage for stage in each if not isinstance(stage, Stage)]:
        raise RecipeError(f"stages must be Stage(...), not {reprlib.repr(wrong[0])}.")
    if not each:
        raise RecipeError("there must be at least one stage.")
    names = [stage.name for stage in each]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(f"stage names must be unique; {twice} occur more than once.")
    return each
