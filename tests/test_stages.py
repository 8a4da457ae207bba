"""Stages, and their plan: groups, label trees and transforms."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft import (
    SGD,
    EarlyStop,
    LinearProbe,
    PatternError,
    RecipeError,
    ReduceLROnPlateau,
    Stage,
)
from jaxft.labels import leaf_labels
from jaxft.optim.schedule_base import Span
from jaxft.optim.schedules import CosineAnnealingLR

SOLVER = LinearProbe()
PARAMS = {name: {"kernel": np.zeros(2), "bias": np.zeros(1)} for name in ("stem", "late", "fc")}


def test_plan_groups_are_the_common_refinement():
    plans = jaxft.plan(
        [
            Stage("head", {"fc": 1e-3}, epochs=1),
            Stage("late", {"fc.bias": 1e-2, "fc": 1e-3, "late": 1e-4}, epochs=1),
            Stage("all", {"fc": 1e-4, "*": 1e-5}, epochs=1),
        ],
        PARAMS,
    )
    assert [plan.labels["fc"] for plan in plans] == [{"kernel": "fc", "bias": "fc.bias"}] * 3
    assert [plan.labels["late"]["kernel"] for plan in plans] == ["frozen", "late", "late"]
    assert [plan.labels["stem"]["kernel"] for plan in plans] == ["frozen", "frozen", "*"]
    assert [dict(plan.lr) for plan in plans] == [
        {"fc.bias": 1e-3, "fc": 1e-3},
        {"fc.bias": 1e-2, "fc": 1e-3, "late": 1e-4},
        {"fc.bias": 1e-4, "fc": 1e-4, "late": 1e-5, "*": 1e-5},
    ]


def test_plan_numbers_groups_with_equal_patterns():
    params = {"frozen": np.zeros(1), "a": np.zeros(1)}
    plans = jaxft.plan([Stage("x", {"frozen": 1.0}, 1), Stage("y", {"*": 1.0}, 1)], params)
    assert plans[1].labels == {"frozen": "frozen#2", "a": "*"}
    assert plans[0].labels == {"frozen": "frozen#2", "a": "frozen"}


def test_schedule_time_continues_over_stages():
    stages = [
        Stage("probe", {"fc": SOLVER}),
        Stage("head", {"fc": 1.0}, epochs=2, schedule_time="continue"),
        Stage("late", {"fc": 1.0, "late": 1.0}, steps=7, schedule_time="continue"),
        Stage("again", {"fc": 1.0}, epochs=1),
        Stage("all", {"*": 1.0}, epochs=3, schedule_time="continue"),
    ]
    spans = [plan.span(steps_per_epoch=5) for plan in jaxft.plan(stages, PARAMS)]
    assert spans[1:] == [
        Span(17, 4, 5, steps_before=0, epochs_before=0),
        Span(17, 4, 5, steps_before=10, epochs_before=2),
        Span(20, 4, 5, steps_before=0, epochs_before=0),
        Span(20, 4, 5, steps_before=5, epochs_before=1),
    ]


patterns = st.lists(
    st.sampled_from(["*", "stem", "late", "fc", "*.bias", "fc.bias", "late.kernel"]),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(patterns, min_size=1, max_size=4))
def test_plan_groups_partition_the_parameters_and_refine_every_stage(stages):
    written = [
        Stage(f"s{k}", {p: 0.1 * (i + 1) for i, p in enumerate(names)}, epochs=1)
        for k, names in enumerate(stages)
    ]
    try:
        plans = jaxft.plan(written, PARAMS)
    except PatternError:  # shadowed patterns were drawn
        return
    columns = list(zip(*(leaf_labels(PARAMS, plan.labels) for plan in plans), strict=True))
    rates = [
        tuple(plan.lr.get(name) for plan, name in zip(plans, column, strict=True))
        for column in columns
    ]
    for column in columns:
        assert len(set(column) - {"frozen"}) <= 1  # one group in all stages
    for a, b, rate_a, rate_b in zip(columns, columns[1:], rates, rates[1:], strict=False):
        assert (a == b) == (rate_a == rate_b)  # the same group if every stage treats them alike


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "its name is empty"),
        ({"train": {"fc": 1.0, "late": float("inf")}}, "rate of 'late' is inf"),
        ({"epochs": 0}, "0 epochs"),
        ({"epochs": 0, "train": {}}, "trains nothing.*; it has 0 epochs"),
        ({"epochs": None}, "it has no length; give it epochs or steps"),
        ({"steps": 0, "accumulate": 0}, "it has 0 steps; .*; it has 0 accumulate"),
        (
            {"schedule": ReduceLROnPlateau(), "schedule_time": "continue"},
            "schedule_time is 'continue', but a ReduceLROnPlateau has no time",
        ),
        ({"max_minutes": 0.0, "clip_norm": -1.0}, "max_minutes is 0.0; .*; clip_norm is -1.0"),
        ({"clip_value": 0.0}, "clip_value is 0.0; it must be a positive, finite number"),
        ({"ema": 1.0}, "ema is 1.0; a decay lies between 0 and 1"),
        ({"class_weights": (0.0, 0.0)}, "class_weights are .*one must be above 0"),
        ({"class_weights": (1.0, -1.0)}, "class_weights are .*none may be negative"),
        (
            {"norms": "B"},
            "norms has 'B'; it must be one of batch, frozen_eval, train_all, frozen_batch, eval",
        ),
        ({"norms": {"fc": "b"}}, "norms has 'b'"),
    ],
    ids=str,
)
def test_stage_rejects_wrong_fields(fields, message):
    with pytest.raises(RecipeError, match=message):
        Stage(**{"name": "x", "train": {"fc": 1.0}, "epochs": 1, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1, "norms": "eval"}, "takes no steps; leave out epochs, norms"),
        (
            {"max_minutes": 1.0, "clip_norm": -1.0, "mixup": 0.1},
            "leave out max_minutes, clip_norm, mixup",
        ),
        ({"optimizer": SGD(), "until": EarlyStop()}, "leave out optimizer, until"),
        ({"train": {"fc": SOLVER, "late": 1.0}}, "a LinearProbe must be the only entry"),
        (
            {"train": {"late": -1.0, "fc": SOLVER}, "steps": 1},
            "must be the only entry.* out steps",
        ),
        ({"name": ""}, "its name is empty"),
    ],
    ids=str,
)
def test_stage_with_a_solver_rejects_other_fields(fields, message):
    with pytest.raises(RecipeError, match=message):
        Stage(**{"name": "x", "train": {"fc": SOLVER}, **fields})


def test_plan_of_a_stage_with_a_solver_has_a_group_and_no_optimizer():
    stages = [
        Stage("fc", {"fc": SOLVER}, restore="last", carry="keep"),
        Stage("all", {"*": 1.0}, epochs=1),
    ]
    solved, after = jaxft.plan(stages, PARAMS)
    assert solved.labels["fc"] == {"kernel": "fc", "bias": "fc"} == after.labels["fc"]
    assert (solved.lr, list(solved.patterns), stages[0].length(7)) == ({}, ["fc"], 1)
    with pytest.raises(
        RecipeError, match=r"stage 'fc' is a linear probe .*jaxft.logistic_regression"
    ):
        solved.transform()


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"epochs": 3}, 12),
        ({"steps": 5}, 5),
        ({"epochs": 1, "steps": 5}, 4),
        ({"epochs": 2, "steps": 5}, 5),
    ],
    ids=str,
)
def test_stage_length_is_the_lower_limit(fields, steps):
    assert Stage("x", {"fc": 1.0}, **fields).length(steps_per_epoch=4) == steps


def test_schedule_ends_with_the_steps_of_its_stage():
    stage = Stage("x", {"fc": 1.0}, steps=5, schedule=CosineAnnealingLR(by="step"))
    params = jax.tree.map(np.float32, PARAMS)
    (plan,) = jaxft.plan([stage], params)
    transform = plan.transform(steps_per_epoch=4)
    state = transform.init(params)
    rates = []
    for _ in range(6):
        rates.append(plan.lr_at(state, steps_per_epoch=4)["fc"])
        _, state = transform.update(params, state, params)
    assert rates[5] == pytest.approx(0.0, abs=1e-7)
    assert rates[4] > 0.09


def test_early_stop_rejects_wrong_patience():
    with pytest.raises(RecipeError, match="patience is 0"):
        EarlyStop(patience=0)


def test_reduce_lr_on_plateau_does_not_count_a_tie_as_improvement():
    """0.9 is no float32: `best` is rounded, so the values it is compared with must be rounded."""
    for mode, field in (("max", "accuracy"), ("min", "loss")):
        schedule = ReduceLROnPlateau(mode, patience=1, threshold=0.0, factor=0.5)
        (plan,) = jaxft.plan([Stage("a", {"fc": 1.0}, 9, schedule=schedule)], PARAMS)
        for value in (0.9, 0.1, 0.7):
            state = plan.transform().init(PARAMS)
            for _ in range(5):
                state = plan.after_epoch(state, **{"loss": 0.0, field: value})
            assert plan.lr_at(state) == {"fc": 0.25}


def test_plan_of_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert jaxft.plan([Stage("a", {"fc": 1.0}, 1)], shapes)[0].labels["fc"]["bias"] == "fc"
