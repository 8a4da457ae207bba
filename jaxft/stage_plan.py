"""Plans: stages applied to actual parameters, each as a label tree and an optax transform.

Parameters that every stage treats alike form a group. Groups are fixed for a run, because an
optimizer counts its steps per group: parameters unfrozen in different stages must not share a
count.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax

from jaxft.errors import PatternError, RecipeError
from jaxft.labels import FROZEN, Tree, leaf_labels, match, paths, unflatten
from jaxft.lora_adapters import hide_adapters
from jaxft.optim.optimizers import SGD, Rule
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.schedule_base import Span
from jaxft.optim.transform import group_lr, group_transform, multi_transform
from jaxft.patterns import Pattern, pattern_text, shallow_warnings
from jaxft.stages import Stage, check_stages
from jaxft.tree_paths import alias_warnings
from jaxft.update import Resolved


@dataclass(frozen=True)
class StagePlan:
    """A stage applied to actual parameters.

    Attributes:
      stage: the stage.
      labels: label tree with each parameter's group, or `frozen`.
      patterns: pattern of each group that trains, in the order of `stage.train`.
      park: groups that do not train here but continue in a later stage; an argument of `carry`.
      remarks: warnings about patterns that may select less than intended.
      before, after: stages before and after this one whose schedules share its time, see
        `Stage.schedule_time`.
    """

    stage: Stage
    labels: Tree
    patterns: Mapping[str, Pattern]
    park: frozenset[str]
    remarks: tuple[str, ...] = ()
    before: tuple[Stage, ...] = ()
    after: tuple[Stage, ...] = ()

    @property
    def lr(self) -> dict[str, float]:
        """Base learning rate of each group that trains; empty for a linear probe."""
        return {group: update.lr for group, update in self.updates().items()}

    def updates(self, optimizer: Rule = SGD()) -> dict[str, Resolved]:
        """Returns how each group trains, with all defaults filled in.

        Args:
          optimizer: used for groups that have none from `Update` or `Stage`.

        Returns:
          An update for each group; empty for a linear probe.
        """
        if self.stage.linear_probe:
            return {}
        return {
            group: self.stage.resolve(pattern, optimizer)
            for group, pattern in self.patterns.items()
        }

    def transform(
        self, optimizer: Rule = SGD(), *, steps_per_epoch: int = 1
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the stage's `multi_transform`: optimizer, learning rate and schedule per group.

        Args:
          optimizer: used for groups that have none from `Update` or `Stage`.
          steps_per_epoch: converts steps to epochs, for schedules by epoch; the same in all stages
            whose schedules share their time.

        Raises:
          RecipeError: the stage is a linear probe and has no optimizer.
        """
        if self.stage.linear_probe:
            raise RecipeError(
                f"stage {self.stage.name!r} is a linear probe and has no optimizer: put kernel and "
                "bias of jaxft.logistic_regression(features, targets, ...) in the head's place."
            )
        span = self.span(steps_per_epoch)
        transforms = {
            group: group_transform(
                update.optimizer,
                update.lr,
                update.schedule,
                span,
                relative=self.stage.auto_rgn,
            )
            for group, update in self.updates(optimizer).items()
        }
        return multi_transform(transforms, self.labels)

    def lr_at(self, opt_state: optax.OptState, *, steps_per_epoch: int = 1) -> dict[str, float]:
        """Returns the learning rate of each group's next step.

        With relative learning rates, it is the largest of the group's tensors.
        """
        span = self.span(steps_per_epoch)
        states = {group: opt_state.inner_states[group].inner_state for group in self.patterns}
        # Fetch the schedules' few numbers at once, without the moments.
        states = {
            group: jax.device_get(state._replace(rule=None)) for group, state in states.items()
        }
        return {
            group: float(group_lr(update.lr, update.schedule, states[group], span))
            for group, update in self.updates().items()
        }

    def span(self, steps_per_epoch: int) -> Span:
        """Returns the steps that the stage's schedules cover."""
        before, now, after = (
            [stage.length(steps_per_epoch) for stage in stages if not stage.linear_probe]
            for stages in (self.before, (self.stage,), self.after)
        )
        steps = [*before, *now, *after]
        epochs = [-(-length // steps_per_epoch) for length in steps]
        return Span(
            steps=sum(steps),
            epochs=sum(epochs),
            steps_per_epoch=steps_per_epoch,
            steps_before=sum(before),
            epochs_before=sum(epochs[: len(before)]),
        )

    def reductions(self, opt_state: optax.OptState) -> int:
        """Returns how often the stage's `ReduceLROnPlateau` has reduced its learning rate.

        If several groups have such a schedule, returns the largest number.
        """
        return max(
            (
                int(opt_state.inner_states[group].inner_state.plateau.reductions)
                for group, update in self.updates().items()
                if isinstance(update.schedule, ReduceLROnPlateau)
            ),
            default=0,
        )

    def after_epoch(
        self, opt_state: optax.OptState, *, loss: float, accuracy: float = math.nan
    ) -> optax.OptState:
        """Passes an epoch's validation scores to `ReduceLROnPlateau` schedules.

        Args:
          opt_state: state of `transform`.
          loss: metric of schedules with mode `min`.
          accuracy: metric of schedules with mode `max`.

        Returns:
          The state with updated schedules; other schedules are unchanged.
        """
        states = dict(opt_state.inner_states)
        for group, update in self.updates().items():
            if isinstance(update.schedule, ReduceLROnPlateau):
                state = states[group].inner_state
                metric = loss if update.schedule.mode == "min" else accuracy
                # Round it as `best` is rounded; otherwise a value could beat itself.
                metric = np.asarray(metric, state.plateau.best.dtype).item()
                before = PlateauState(*(leaf.item() for leaf in state.plateau))
                after = update.schedule.after_epoch(before, metric)
                state = state._replace(plateau=after.as_arrays())
                states[group] = states[group]._replace(inner_state=state)
        return opt_state._replace(inner_states=states)


def plan(stages: Stage | Sequence[Stage], params: Tree) -> tuple[StagePlan, ...]:
    """Applies stages to parameters: forms groups and a label tree for each stage.

    Two parameters are in the same group if and only if every stage matches them with the same
    pattern, or with none. Warns about a pattern such as `*.bias` where `**.bias` selects more, and
    about an array at two paths in different groups.

    Args:
      stages: one or several stages.
      params: a pytree of parameters; only its structure, paths and dtypes are read (a predicate
        also sees the leaves). Leaves that are no parameters are frozen, as in `label`.

    Returns:
      A plan for each stage.

    Raises:
      RecipeError: there are no stages, or two have the same name.
      PatternError: patterns match nothing or are shadowed; the message covers all stages.
      LabelError: an NNX module holds the same variable at two paths.

    Example:
      >>> params = {"stem": np.zeros(2), "layer4": np.zeros(2), "fc": np.zeros(2)}
      >>> head, late = plan(
      ...     [Stage("head", {"fc": 1e-3}, 5), Stage("late", {"fc": 1e-3, "*": 1e-4}, 5)], params
      ... )
      >>> head.labels
      {'fc': 'fc', 'layer4': 'frozen', 'stem': 'frozen'}
      >>> late.labels, late.lr
      ({'fc': 'fc', 'layer4': '*', 'stem': '*'}, {'fc': 0.001, '*': 0.0001})
    """
    stages = check_stages(stages)
    matches, errors = [], []
    for stage in stages:
        trainable = hide_adapters(params) if stage.merge_lora else params
        indices, stage_errors = match(trainable, list(stage.train))
        matches.append(indices)
        errors += [f"stage {stage.name!r}: {error}" for error in stage_errors]
    if errors:
        raise PatternError("\n".join(errors))

    # The signature of a leaf: the pattern that matches it in each stage. Leaves with the same
    # signature form a group.
    signatures: list[Signature] = list(zip(*matches, strict=True))
    names = _name_groups(stages, list(dict.fromkeys(signatures)))
    for warning in alias_warnings(params, [names.get(s, FROZEN) for s in signatures]):
        warnings.warn(warning, stacklevel=2)
    patterns = [
        {
            names[signature]: pattern
            for i, pattern in enumerate(stage.train)
            for signature in names
            if signature[k] == i
        }
        for k, stage in enumerate(stages)
    ]
    plans = []
    for k, stage in enumerate(stages):
        labels = [FROZEN if s[k] is None else names[s] for s in signatures]
        park = _parked_groups(stages, patterns, k)
        remarks = tuple(shallow_warnings(list(stage.train), paths(params)))
        for remark in remarks:
            warnings.warn(f"stage {stage.name!r}: {remark}", stacklevel=2)
        first, end = _schedule_bounds(stages, k)
        plans.append(
            StagePlan(
                stage,
                unflatten(params, labels),
                patterns[k],
                park,
                remarks,
                before=stages[first:k],
                after=stages[k + 1 : end],
            )
        )
        plans[-1].updates()  # raises errors now instead of when the stage begins
    return tuple(plans)


def _parked_groups(
    stages: Sequence[Stage], active: Sequence[Collection[str]], k: int
) -> frozenset[str]:
    """Returns the groups that pause in stage k: trained before and after it, without a reset."""
    resets = [i for i, stage in enumerate(stages) if i == 0 or stage.carry == "reset"]
    first = max(i for i in resets if i <= k)
    last = min((i for i in resets if i > k), default=len(stages))
    before, after = set().union(*active[first:k]), set().union(*active[k + 1 : last])
    return frozenset((before & after) - set(active[k]))


def _schedule_bounds(stages: Sequence[Stage], k: int) -> tuple[int, int]:
    """Returns the indices of the stages that share the schedule's time of stage k: [first, end)."""
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage.schedule_time == "restart"]
    first = max(i for i in starts if i <= k)
    return first, min((i for i in starts if i > k), default=len(stages))


Signature = tuple[int | None, ...]


def _name_groups(stages: Sequence[Stage], signatures: Sequence[Signature]) -> dict[Signature, str]:
    """Names each group that ever trains after its longest pattern, without counting stars."""
    names: dict[Signature, str] = {}
    for signature in signatures:
        matched = zip(stages, signature, strict=True)
        patterns = [list(stage.train)[i] for stage, i in matched if i is not None]
        if not patterns:
            continue
        longest = max(map(pattern_text, patterns), key=lambda text: len(text.replace("*", "")))
        taken = {FROZEN, *names.values()}
        numbered = (f"{longest}#{i}" for i in range(2, len(taken) + 2))
        names[signature] = next(name for name in (longest, *numbered) if name not in taken)
    return names


def untrained_frozen_remarks(plans: Sequence[StagePlan], params: Tree) -> list[str]:
    """Returns a remark on the first stage that freezes parameters which no stage has trained yet.

    `params` are random; only their paths are read.
    """
    trained: set[str] = set()
    for each in plans:
        labels = dict(zip(paths(params), leaf_labels(params, each.labels), strict=True))
        trained |= {path for path, label in labels.items() if label != FROZEN}
        if untrained := [path for path in labels if path not in trained]:
            parts = ", ".join(dict.fromkeys(path.partition(".")[0] for path in untrained))
            return [
                f"Stage {each.stage.name!r} freezes random weights: {parts}. Nothing pretrained "
                "was given; name it by weights=... or start=..., or train these layers first."
            ]
    return []
