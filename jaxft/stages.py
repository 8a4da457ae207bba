"""Stages: which parameters train, at which learning rate, for how long. Plain frozen values.

`jaxft.stage_plan` applies them to actual parameters.
"""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import optax

from jaxft.anchor import Anchor
from jaxft.dataclass_checks import checked
from jaxft.early_stopping import EarlyStop, Mode, Monitor, PlateauStop, default_mode
from jaxft.ema import EMA, wrong_decay
from jaxft.errors import RecipeError
from jaxft.linear_probe import LinearProbe
from jaxft.losses import LossChoice
from jaxft.optim.optax_rule import Optax
from jaxft.optim.optimizers import Optimizer, Rule
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import ClosedForm, Constant, Schedule
from jaxft.patterns import Pattern, PatternKey, pattern_text
from jaxft.stage_options import Augment, Balance, NormChoice
from jaxft.update import Resolved, Update, is_finite_number
from jaxft.weight_averaging import WiSE

_LR = "each pattern in train has its learning rate, train={'fc': 1e-3}"


@checked(
    "schedule",
    "optimizer",
    "norms",
    "loss",
    lr=_LR,
    learning_rate=_LR,
    early_stopping="write until=EarlyStop(patience=3)",
    scheduler="it is called schedule",
    lr_scheduler="it is called schedule",
    max_grad_norm="it is called clip_norm",
    clip_grad_norm="it is called clip_norm",
    clip_grad_value="it is called clip_value",
    grad_accum="it is called accumulate",
    freeze="parameters that no pattern in train matches are frozen",
    criterion="it is called loss",
)
@dataclass(frozen=True)
class Stage:
    """A stage of training: which parameters train, at which learning rate, and how it ends.

    It ends after `epochs` or `steps`, whichever comes first, or earlier by `until` or
    `max_minutes`. Validation follows each epoch; the last epoch may be incomplete.

    Attributes:
      name: shown in tables and logs; unique within a recipe.
      train: pattern to learning rate or `Update`. The first pattern that matches a parameter
        applies; parameters that no pattern matches are frozen. `{"fc": LinearProbe()}`
        solves for the head instead: the stage takes no optimizer steps, counts as one step of one
        epoch, and may set only `restore`, `monitor` and `carry` besides.
      epochs: maximum number of passes over the training data.
      schedule: learning-rate schedule of all groups that set none; constant by default.
      optimizer: optimizer of all groups that set none; the recipe's by default.
      until: rule that ends the stage early.
      restore: the weights that the next stage starts from: the `best` epoch by validation, or the
        `last`. The start of the stage is a candidate for the best; ties go to the earlier epoch.
      carry: `reset` gives every group a new optimizer state, as a new torch optimizer does. `keep`
        continues the state of groups that trained before, as `add_param_group` does, even if their
        hyperparameters change. With `restore="best"`, moments and step counts are also handed on
        from the best epoch.
      schedule_time: `restart` starts the schedules at time 0. `continue` continues the time of the
        stage before, so that one schedule spans several stages, as one torch scheduler does over
        `add_param_group`. Its length is the sum of the stages' maximum lengths. The next stage
        starts at its planned time even if this one ends early by `until` or `max_minutes`.
      monitor: metric of the best epoch: `accuracy`, `top5`, `loss`, or the name of one of the
        recipe's metrics, of which larger values are better; by default the monitor and mode of
        `until=EarlyStop(...)`, else the accuracy.
      steps: maximum number of optimizer steps.
      max_minutes: maximum duration of training and validation. The result then depends on the
        machine.
      norms: statistics of the norm layers, see `jaxft.stage_options.NormChoice`: one choice for all
        layers, or a mapping of patterns, `{"layer4": "batch", "*": "eval"}`; the
        other layers use `frozen_eval`.
      clip_norm: maximum norm of the gradients of all trainable parameters.
      clip_value: maximum absolute value of each element of the gradients, clipped before the norm.
      accumulate: number of equal parts into which each batch is divided to save memory.
        `batch_size` is the effective size, of one optimizer step. The last batch of an epoch uses
        as many parts as it fills, and divides by its number of images; no part is left for the next
        epoch. On CPU this loop is slow for convolutions of networks other than jaxft's.
      ema: exponential moving average of weights and running statistics: its decay per step, e.g.
        0.999, or `EMA(0.9998, every=32, warmup=True)`. It starts with the stage; validation and the
        next stage use the average.
      anchor: L2-SP or L1-SP penalty, which pulls the weights to the pretrained ones.
      class_weights: weight of each class in the loss, as in torch's `CrossEntropyLoss(weight=...)`;
        replaces `balance`. The mean divides by the sum of the images' weights, or with mixup or
        cutmix by the number of images, as torch does for probabilities. Other losses than the cross
        entropy are multiplied by the weight of the image's class. The validation loss is
        unweighted.
      finish: `WiSE()` ends the stage with the best average of its start and its end.
      merge_lora: at the start of the stage, merge the adapters of `Recipe.lora` into their kernels
        and set `lora_b` to zero; the outputs do not change. The stage freezes the adapters.
      auto_rgn: at the start of each epoch, scale each tensor's learning rate by its relative
        gradient norm divided by the largest one, and reset the optimizer state (Auto-RGN, see
        `jaxft.train.auto_rgn`).
      batch_size, augment, num_views, random_erasing, mixup, cutmix, loss, label_smoothing, balance:
        override the recipe's fields.

    Raises:
      RecipeError: fields are unknown, wrong or contradictory; the message lists all of them.

    Example:
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
    train: Mapping[PatternKey, float | Update | LinearProbe]
    epochs: int | None = None
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    until: EarlyStop | PlateauStop | None = None
    restore: Literal["best", "last"] = "best"
    carry: Literal["reset", "keep"] = "reset"
    _: KW_ONLY
    schedule_time: Literal["restart", "continue"] = "restart"
    monitor: Monitor | None = None
    steps: int | None = None
    max_minutes: float | None = None
    norms: NormChoice | Mapping[str, NormChoice] = "frozen_eval"
    clip_norm: float | None = None
    clip_value: float | None = None
    accumulate: int = 1
    ema: float | EMA | None = None
    anchor: Anchor | None = None
    class_weights: tuple[float, ...] | None = None
    finish: WiSE | None = None
    merge_lora: bool = False
    auto_rgn: bool = False
    batch_size: int | None = None
    augment: Augment | None = None
    num_views: int | None = None
    random_erasing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    loss: LossChoice | None = None
    label_smoothing: float | None = None
    balance: Balance | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a saved recipe holds no unknown field

    def __post_init__(self) -> None:
        if self.linear_probe:
            errors = self._linear_probe_errors()
        else:
            errors = [*self._train_errors(), *self._limit_errors()]
        if not self.name:
            errors.insert(0, "its name is empty")
        if errors:
            raise RecipeError(f"stage {self.name!r}: {'; '.join(errors)}.")

    def _linear_probe_errors(self) -> list[str]:
        errors = []
        if len(self.train) > 1:
            errors.append("a LinearProbe must be the only entry of train")
        changed = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("name", "train", "restore", "monitor", "carry")
            and getattr(self, field.name) != field.default
        ]
        if changed:
            errors.append(f"a linear probe takes no steps; leave out {', '.join(changed)}")
        return errors

    def _train_errors(self) -> list[str]:
        errors, rules = [], {"its optimizer": self.optimizer}
        if not self.train:
            errors.append("it trains nothing; name a pattern and a learning rate in `train`")
        for pattern, update in self.updates.items():
            name = pattern_text(pattern)
            errors += update.number_errors(name)
            rules[f"the optimizer of {name!r}"] = update.optimizer
        for place, rule in rules.items():
            if not isinstance(rule, Optimizer | optax.GradientTransformation | None):
                errors.append(
                    f"{place} is {rule!r}; it must be one of jaxft's or an optax transform"
                )
        for place, schedule in self._schedules().items():
            if not isinstance(schedule, Schedule | ReduceLROnPlateau | None):
                errors.append(
                    f"{place} is {schedule!r}; it must be one of jaxft.schedules or a "
                    "ReduceLROnPlateau"
                )
        return errors

    def _schedules(self) -> dict[str, object]:
        group_schedules = {
            f"the schedule of {pattern_text(pattern)!r}": update.schedule
            for pattern, update in self.updates.items()
        }
        return {"its schedule": self.schedule, **group_schedules}

    def _limit_errors(self) -> list[str]:
        errors = []
        if self.epochs is None and self.steps is None:
            errors.append("it has no length; give it epochs or steps")
        for limit in ("epochs", "steps", "accumulate"):
            if (count := getattr(self, limit)) is not None and count < 1:
                errors.append(f"it has {count} {limit}; it must have at least 1")
        for limit in ("max_minutes", "clip_norm", "clip_value"):
            value = getattr(self, limit)
            if value is not None and not (is_finite_number(value) and value > 0):
                errors.append(f"{limit} is {value}; it must be a positive, finite number")
        if not isinstance(self.ema, EMA | None):
            errors += wrong_decay("ema", self.ema)
        if self.class_weights is not None and not (
            all(is_finite_number(w) and w >= 0 for w in self.class_weights)
            and any(self.class_weights)
        ):
            errors.append(
                f"class_weights are {self.class_weights}; none may be negative, one must be above 0"
            )
        if isinstance(self.until, PlateauStop) and not any(
            isinstance(schedule, ReduceLROnPlateau) for schedule in self._schedules().values()
        ):
            errors.append("until is a PlateauStop, which needs a ReduceLROnPlateau schedule")
        if self.schedule_time == "continue" and any(
            isinstance(schedule, ReduceLROnPlateau) for schedule in self._schedules().values()
        ):
            errors.append("schedule_time is 'continue', but a ReduceLROnPlateau has no time")
        choices = get_args(NormChoice)
        if not isinstance(self.norms, str | Mapping):
            errors.append(
                f"norms is {self.norms!r}; it must be one of {', '.join(choices)}, or a mapping of "
                "patterns to them"
            )
            return errors
        for choice in self.norm_choices.values():
            if choice not in choices:
                errors.append(f"norms has {choice!r}; it must be one of {', '.join(choices)}")
        return errors

    @property
    def linear_probe(self) -> LinearProbe | None:
        """Solver of the head, if the stage takes no optimizer steps; else None."""
        return next((x for x in self.train.values() if isinstance(x, LinearProbe)), None)

    @property
    def updates(self) -> Mapping[Pattern, Update]:
        """`train` with each learning rate as an `Update`; empty for a linear probe."""
        return {
            pattern: value if isinstance(value, Update) else Update(value)
            for pattern, value in self.train.items()
            if not isinstance(value, LinearProbe)
        }

    @property
    def norm_choices(self) -> Mapping[str, NormChoice]:
        """`norms` as a mapping of patterns, in order of precedence."""
        return {"*": self.norms} if isinstance(self.norms, str) else self.norms

    @property
    def averaging(self) -> EMA | None:
        """`ema` as an `EMA`; None without an average."""
        return EMA(self.ema) if isinstance(self.ema, float) else self.ema

    @property
    def monitors(self) -> tuple[Monitor, ...]:
        """Metrics that the stage names."""
        of_until = self.until.monitor if isinstance(self.until, EarlyStop) else None
        return tuple(filter(None, (self.monitor, of_until)))

    @property
    def best_by(self) -> tuple[Monitor, Mode]:
        """Metric of the best epoch, and whether `min` or `max` of it is better."""
        until = self.until
        if isinstance(until, EarlyStop) and self.monitor in (None, until.monitor):
            return until.monitor, until.mode or default_mode(until.monitor)
        monitor = self.monitor or "accuracy"
        return monitor, default_mode(monitor)

    def length(self, steps_per_epoch: int) -> int:
        """Returns the maximum number of steps; 1 for a linear probe."""
        if self.linear_probe:
            return 1
        epochs = [] if self.epochs is None else [self.epochs * steps_per_epoch]
        return min(epochs + ([] if self.steps is None else [self.steps]))

    def resolve(self, pattern: Pattern, optimizer: Rule) -> Resolved:
        """Returns the update of a pattern of `train` with all defaults filled in.

        Args:
          pattern: a key of `train`.
          optimizer: used if neither the update nor the stage sets one.

        Raises:
          RecipeError: see `Update.resolve`; or the stage has `auto_rgn`, and the optimizer takes
            one learning rate for all tensors.
        """
        update = self.updates[pattern].resolve(
            self.schedule or Constant(),
            self.optimizer or optimizer,
            place=f"stage {self.name!r}",
            name=pattern_text(pattern),
        )
        rule = update.optimizer
        if self.auto_rgn and isinstance(rule, Optax) and rule.takes_lr:
            raise RecipeError(
                f"stage {self.name!r} has auto_rgn, which sets a learning rate for each tensor, "
                f"but {rule.function!r} takes one for all tensors of a group. Use one of jaxft's "
                'optimizers, or a direction such as Optax("optax.scale_by_lion").'
            )
        return update


def check_stages(stages: "Stage | Sequence[Stage]") -> tuple[Stage, ...]:
    """Returns the stages as a tuple.

    Raises:
      RecipeError: there are none, or two have the same name.
    """
    stages = (stages,) if isinstance(stages, Stage) else tuple(stages)
    if wrong := [stage for stage in stages if not isinstance(stage, Stage)]:
        raise RecipeError(f"stages must be Stage(...), not {reprlib.repr(wrong[0])}.")
    if not stages:
        raise RecipeError("there must be at least one stage.")
    names = [stage.name for stage in stages]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(f"stage names must be unique; {repeated} occur more than once.")
    return stages


def check_shared_schedules(stages: Sequence[Stage], batch_size: int) -> None:
    """Checks that a stage which continues a schedule has the batch size of the stage before.

    Args:
      stages: the stages.
      batch_size: batch size of stages that set none.

    Raises:
      RecipeError: it has another one.
    """
    for earlier, stage in pairwise(stages):
        sizes = [each.batch_size or batch_size for each in (stage, earlier)]
        if stage.schedule_time == "continue" and sizes[0] != sizes[1]:
            raise RecipeError(
                f"stage {stage.name!r} continues the schedule of {earlier.name!r}, but their "
                f"batch sizes are {sizes[0]} and {sizes[1]}. Give both the same batch_size."
            )
