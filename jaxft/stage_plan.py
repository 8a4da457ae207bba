"""Groups: stages compiled, over actual parameters, to a label tree and a transform for each.

Groups are fixed for a run, because an optimizer counts its steps per group: parameters that thaw
in different stages must not share a count.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax

from jaxft.errors import PatternError, RecipeError
from jaxft.labels import FROZEN, Tree, match, paths, unflatten
from jaxft.optim.optimizers import SGD, Rule
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.transform import group_rate, group_transform, multi_transform
from jaxft.patterns import Pattern, pattern_text, shallow_warnings
from jaxft.stages import Resolved, Stage, check_stages


@dataclass(frozen=True)
class StagePlan:
    """One stage over actual parameters.

    Attributes:
      stage: what the user wrote.
      labels: the label tree; each leaf its group's name, or `frozen`.
      patterns: the pattern that selects each group that trains, in the order of `stage.train`.
      park: the groups that do not train here and whose optimizer state a later stage takes up
        again; what `carry` needs to know.
      remarks: sentences on patterns that select less than may be meant.
    """

    stage: Stage
    labels: Tree
    patterns: Mapping[str, Pattern]
    park: frozenset[str]
    remarks: tuple[str, ...] = ()

    @property
    def rates(self) -> dict[str, float]:
        """The base learning rate of each group that trains; none of one that is solved."""
        return {group: update.lr for group, update in self.updates().items()}

    def updates(self, optimizer: Rule = SGD()) -> dict[str, Resolved]:
        """How each group trains, every default filled in; `optimizer` is the last resort.

        Of a stage that is solved, nothing.
        """
        if self.stage.solver:
            return {}
        return {g: self.stage.resolve(p, optimizer) for g, p in self.patterns.items()}

    def transform(
        self, optimizer: Rule = SGD(), *, steps_per_epoch: int = 1
    ) -> optax.GradientTransformationExtraArgs:
        """The stage's `multi_transform`: each group by its own rule, rate and schedule.

        `optimizer` is that of groups for which neither `Update` nor stage name one.
        `steps_per_epoch` turns steps into the epochs that schedules count.

        Raises RecipeError for a stage that is solved.
        """
        if self.stage.solver:
            raise RecipeError(
                f"stage {self.stage.name!r} is solved and has no optimizer: put kernel and bias of "
                "jaxft.logistic_regression(features, targets, ...) in the head's place."
            )
        length = self._length(steps_per_epoch)
        groups = {
            group: group_transform(
                update.optimizer,
                update.lr,
                update.schedule,
                relative=self.stage.relative_rates,
                **length,
            )
            for group, update in self.updates(optimizer).items()
        }
        return multi_transform(groups, self.labels)

    def rates_at(self, opt_state: optax.OptState, *, steps_per_epoch: int = 1) -> dict[str, float]:
        """The learning rate of each group's next step; where rates are relative, the largest."""
        length = self._length(steps_per_epoch)
        states = {group: opt_state.inner_states[group].inner_state for group in self.patterns}
        # The few numbers that count, of whichever devices they are on.
        states = {
            group: jax.device_get(state._replace(rule=None)) for group, state in states.items()
        }
        return {
            group: float(group_rate(update.lr, update.schedule, states[group], **length))
            for group, update in self.updates().items()
        }

    def _length(self, steps_per_epoch: int) -> dict[str, int]:
        steps = self.stage.length(steps_per_epoch)
        return {"steps": steps, "steps_per_epoch": steps_per_epoch}

    def reductions(self, opt_state: optax.OptState) -> int:
        """How often a ReduceLROnPlateau of the stage has reduced its rate; the most of several."""
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
        """Tells ReduceLROnPlateau how an epoch went, by validation; other schedules do not ask.

        A schedule of mode `min` watches the loss, one of mode `max` the accuracy.
        """
        states = dict(opt_state.inner_states)
        for group, update in self.updates().items():
            if isinstance(update.schedule, ReduceLROnPlateau):
                inner = states[group].inner_state
                value = loss if update.schedule.mode == "min" else accuracy
                # Rounded as `best` is, or a value could be better than itself.
                value = np.asarray(value, inner.plateau.best.dtype).item()
                before = PlateauState(*(leaf.item() for leaf in inner.plateau))
                after = update.schedule.after_epoch(before, value)
                inner = inner._replace(plateau=after.as_arrays())
                states[group] = states[group]._replace(inner_state=inner)
        return opt_state._replace(inner_states=states)


def plan(stages: Stage | Sequence[Stage], params: Tree) -> tuple[StagePlan, ...]:
    """Compiles stages to one fixed set of groups and a label tree for each stage.

    Groups are the coarsest refinement that serves every stage: two parameters share one if and
    only if each stage matches them with the same pattern (or with none). They must not change
    within a run, because Adam counts its steps per group: parameters that thaw in different
    stages cannot share a count.

    Raises:
      RecipeError: no stages, or two of one name.
      PatternError: patterns that match nothing or are shadowed, in all stages at once.

    Warns of `*.bias` and the like where `**.bias` selects more.

    >>> params = {"stem": 0.0, "layer4": 0.0, "fc": 0.0}
    >>> head, late = plan(
    ...     [Stage("head", {"fc": 1e-3}, 5), Stage("late", {"fc": 1e-3, "*": 1e-4}, 5)], params
    ... )
    >>> head.labels
    {'fc': 'fc', 'layer4': 'frozen', 'stem': 'frozen'}
    >>> late.labels, late.rates
    ({'fc': 'fc', 'layer4': '*', 'stem': '*'}, {'fc': 0.001, '*': 0.0001})
    """
    stages = check_stages(stages)
    chosen, complaints = [], []
    for stage in stages:
        indices, wrong = match(params, list(stage.train))
        chosen.append(indices)
        complaints += [f"stage {stage.name!r}: {complaint}" for complaint in wrong]
    if complaints:
        raise PatternError("\n".join(complaints))

    # A leaf's signature: which pattern of each stage matches it. Equal ones are one group.
    signatures: list[Signature] = list(zip(*chosen, strict=True))
    groups = _name_groups(stages, list(dict.fromkeys(signatures)))
    patterns = [
        {groups[s]: p for i, p in enumerate(stage.train) for s in groups if s[k] == i}
        for k, stage in enumerate(stages)
    ]
    plans = []
    for k, stage in enumerate(stages):
        labels = [FROZEN if s[k] is None else groups[s] for s in signatures]
        park = _parked(stages, patterns, k)
        remarks = tuple(shallow_warnings(list(stage.train), paths(params)))
        for remark in remarks:
            warnings.warn(f"stage {stage.name!r}: {remark}", stacklevel=2)
        plans.append(StagePlan(stage, unflatten(params, labels), patterns[k], park, remarks))
        plans[-1].updates()  # what cannot be resolved is an error now, not when its stage begins
    return tuple(plans)


def _parked(stages: Sequence[Stage], active: Sequence[Collection[str]], k: int) -> frozenset[str]:
    """The groups that sit out stage k, with `keep` from where they trained to where they will."""
    resets = [i for i, stage in enumerate(stages) if i == 0 or stage.carry == "reset"]
    first = max(i for i in resets if i <= k)
    last = min((i for i in resets if i > k), default=len(stages))
    before, after = set().union(*active[first:k]), set().union(*active[k + 1 : last])
    return frozenset((before & after) - set(active[k]))


Signature = tuple[int | None, ...]


def _name_groups(stages: Sequence[Stage], signatures: Sequence[Signature]) -> dict[Signature, str]:
    """Names each group that ever trains by its most telling pattern: the user's own word."""
    names: dict[Signature, str] = {}
    for signature in signatures:
        chosen = zip(stages, signature, strict=True)
        patterns = [list(stage.train)[i] for stage, i in chosen if i is not None]
        if not patterns:
            continue
        word = max(map(pattern_text, patterns), key=lambda word: len(word.replace("*", "")))
        taken = {FROZEN, *names.values()}
        numbered = (f"{word}#{i}" for i in range(2, len(taken) + 2))
        names[signature] = next(name for name in (word, *numbered) if name not in taken)
    return names
