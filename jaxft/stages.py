"""Stages, and the plan they make: groups that are fixed for a run, a label tree for each stage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import optax

from jaxft.errors import PatternError, RecipeError
from jaxft.labels import FROZEN, Pattern, Tree, match, show, unflatten
from jaxft.optim import Optimizer, multi_transform, rated


@dataclass(frozen=True)
class EarlyStop:
    """Ends a stage once `patience` epochs in a row have not improved on its best."""

    monitor: Literal["accuracy", "loss"] = "accuracy"
    patience: int = 3

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise RecipeError(f"EarlyStop: patience is {self.patience}; it must be at least 1.")


@dataclass(frozen=True)
class Stage:
    """What trains, at which rate, for how long, and how it ends.

    Attributes:
      name: shown in tables and logs; unique within a recipe.
      train: pattern to learning rate; the first that matches a parameter wins, and what none
        matches is frozen.
      epochs: passes over the training data, at most.
      until: ends the stage earlier.
      hand_on: the next stage starts from this stage's `best` epoch by validation (its start
        counts: a stage that never improves hands on what it got) or from its `last`.
      carry: `reset` starts every group's optimizer afresh, like a new torch optimizer; `keep`
        keeps that of groups which trained in the stage before, like `add_param_group`.
    """

    name: str
    train: Mapping[Pattern, float]
    epochs: int
    until: EarlyStop | None = None
    hand_on: Literal["best", "last"] = "best"
    carry: Literal["reset", "keep"] = "reset"

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a saved recipe holds no unknown field

    def __post_init__(self) -> None:
        wrong = []
        if not self.name:
            wrong.append("its name is empty")
        if not self.train:
            wrong.append("it trains nothing; name a pattern and a rate in `train`")
        for pattern, rate in self.train.items():
            if not (math.isfinite(rate) and rate > 0):
                wrong.append(f"the rate of {pattern!r} is {rate}; it must be positive and finite")
        if self.epochs < 1:
            wrong.append(f"it has {self.epochs} epochs; it must have at least 1")
        if wrong:
            raise RecipeError(f"stage {self.name!r}: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class StagePlan:
    """One stage over actual parameters.

    Attributes:
      stage: what the user wrote.
      labels: the label tree; each leaf its group's name, or `frozen`.
      rates: the learning rate of each group that trains, in the order of `stage.train`.
    """

    stage: Stage
    labels: Tree
    rates: Mapping[str, float]

    def transform(self, optimizer: Optimizer) -> optax.GradientTransformation:
        """The stage's `multi_transform`: each group by `optimizer` at its own rate."""
        groups = {group: rated(optimizer, rate) for group, rate in self.rates.items()}
        return multi_transform(groups, self.labels)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises RecipeError if there are no stages, or two of one name."""
    names = [stage.name for stage in stages]
    if not names:
        raise RecipeError("there must be at least one stage.")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(f"stage names must be unique; {twice} occur more than once.")


def plan(stages: Sequence[Stage], params: Tree) -> tuple[StagePlan, ...]:
    """Compiles stages to one fixed set of groups and a label tree for each stage.

    Groups are the coarsest refinement that serves every stage: two parameters share one if and
    only if each stage matches them with the same pattern (or with none). They must not change
    within a run, because Adam counts its steps per group: parameters that thaw in different
    stages cannot share a count.

    Raises:
      RecipeError: no stages, or two of one name.
      PatternError: patterns that match nothing or are shadowed, in all stages at once.
    """
    check_stages(stages)
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
    plans = []
    for k, stage in enumerate(stages):
        labels = [FROZEN if s[k] is None else groups[s] for s in signatures]
        rates = {
            groups[s]: rate
            for i, rate in enumerate(stage.train.values())
            for s in groups
            if s[k] == i
        }
        plans.append(StagePlan(stage, unflatten(params, labels), rates))
    return tuple(plans)


Signature = tuple[int | None, ...]


def _name_groups(stages: Sequence[Stage], signatures: Sequence[Signature]) -> dict[Signature, str]:
    """Names each group that ever trains by its most telling pattern: the user's own word."""
    names: dict[Signature, str] = {}
    for signature in signatures:
        chosen = zip(stages, signature, strict=True)
        patterns = [list(stage.train)[i] for stage, i in chosen if i is not None]
        if not patterns:
            continue
        word = max(map(show, patterns), key=lambda word: len(word.replace("*", "")))
        taken = {FROZEN, *names.values()}
        numbered = (f"{word}#{i}" for i in range(2, len(taken) + 2))
        names[signature] = next(name for name in (word, *numbered) if name not in taken)
    return names
