"""`carry`: optimizer state across every kind of re-labelling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft import SGD, Adam, RMSprop, Stage, Update
from jaxft.optim.schedules import CosineAnnealingLR

PARAMS = {name: {"kernel": jnp.arange(3.0), "bias": jnp.arange(2.0)} for name in "abc"}


def gradients(step):
    return jax.tree.map(lambda p: jnp.cos(p + step), PARAMS)


def train(transform, state, steps, *, start=0):
    for step in range(start, start + steps):
        _, state = transform.update(gradients(step), state, PARAMS)
    return state


def relabel(rules, rule=optax.adam):
    """Returns a transform over the labels of `rules`, with an optax optimizer for each label."""
    labels = jaxft.label(PARAMS, rules)
    return jaxft.multi_transform({name: rule(0.1) for name in rules.values()}, labels)


def adam_of(state, group):
    return state.inner_states[group].inner_state[0]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_carry_keeps_groups_that_stay_and_starts_new_ones_fresh():
    old, new = relabel({"c": "c"}), relabel({"c": "c", "b": "b"})
    before = train(old, old.init(PARAMS), 3)
    after = jaxft.carry(before, new.init(PARAMS))
    assert_equal(adam_of(after, "c"), adam_of(before, "c"))
    assert_equal(adam_of(after, "b"), adam_of(new.init(PARAMS), "b"))
    assert jax.tree.structure(after) == jax.tree.structure(new.init(PARAMS))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": "x", "b": "y"}, {"a": "y", "b": "x"}),  # names swap
        ({"a": "x", "b": "x"}, {"a": "x", "b": "y"}),  # one splits
        ({"a.kernel": "x", "a": "y"}, {"a": "z"}),  # two with equal step counts merge
        ({"*": "x"}, {"*": "y"}),
        ({"*": "x"}, {"a": "x", "*": "y"}),
    ],
    ids=str,
)
def test_carry_follows_parameters_into_renamed_split_and_merged_groups(before, after):
    old, new = relabel(before), relabel(after)
    state = train(old, old.init(PARAMS), 3)
    carried = jaxft.carry(state, new.init(PARAMS))
    assert_equal(
        train(new, carried, 2, start=3), train(new, train(new, new.init(PARAMS), 3), 2, start=3)
    )


def test_carry_does_not_merge_groups_with_different_step_counts():
    first, second = relabel({"a": "a"}), relabel({"a": "a", "b": "b"})
    state = train(first, first.init(PARAMS), 2)
    state = train(second, jaxft.carry(state, second.init(PARAMS)), 2)
    merged = relabel({"a": "both", "b": "both"})
    with pytest.warns(UserWarning, match="'both' mixes parameters that have trained for different"):
        carried = jaxft.carry(state, merged.init(PARAMS))
    assert_equal(carried, merged.init(PARAMS))


def test_carry_restarts_a_counting_group_with_new_parameters():
    old, new = relabel({"a": "x"}), relabel({"a": "x", "b": "x"})
    state = train(old, old.init(PARAMS), 2)
    with pytest.warns(UserWarning, match="'x' mixes"):
        assert_equal(jaxft.carry(state, new.init(PARAMS)), new.init(PARAMS))


def test_carry_adds_new_parameters_to_a_group_without_count():
    def momentum(rate):
        return optax.sgd(rate, momentum=0.9)

    old, new = relabel({"a": "x"}, momentum), relabel({"a": "x", "b": "x"}, momentum)
    state = train(old, old.init(PARAMS), 2)
    trace = jaxft.carry(state, new.init(PARAMS)).inner_states["x"].inner_state[0].trace
    assert_equal(trace["a"], state.inner_states["x"].inner_state[0].trace["a"])
    assert not np.any(trace["b"]["kernel"])


@pytest.mark.parametrize("other", [SGD(momentum=0.9), RMSprop()], ids=["sgd", "rmsprop"])
def test_carry_warns_about_a_changed_optimizer(other):
    plan = jaxft.plan([Stage("all", {"*": 0.1}, 1)], PARAMS)[0]
    old, new = plan.transform(Adam()), plan.transform(other)
    with pytest.warns(UserWarning, match=r"group '\*' has another optimizer now"):
        state = jaxft.carry(train(old, old.init(PARAMS), 1), new.init(PARAMS))
    assert_equal(state, new.init(PARAMS))


def test_carry_restarts_schedules_of_optax_optimizers():
    def scheduled(_):
        return optax.adam(optax.linear_schedule(1.0, 0.0, 100))

    old, new = relabel({"a": "a"}, scheduled), relabel({"a": "a", "b": "b"}, scheduled)
    state = jaxft.carry(train(old, old.init(PARAMS), 5), new.init(PARAMS))
    adam, schedule = state.inner_states["a"].inner_state
    assert (int(adam.count), int(schedule.count)) == (5, 0)


def test_carry_names_only_groups_whose_optimizer_changed():
    stages = [
        Stage("1", {"a": Update(0.1, optimizer=SGD(momentum=0.9)), "b": 0.1}, 1),
        Stage("2", {"a": 0.1, "b": 0.1}, 1, carry="keep"),
    ]
    old, new = (plan.transform(Adam()) for plan in jaxft.plan(stages, PARAMS))
    _, report = jaxft.carry(train(old, old.init(PARAMS), 1), new.init(PARAMS), report=True)
    assert report.warnings == ("group 'a' has another optimizer now: it starts fresh.",)


def test_carry_from_an_optimizer_without_state():
    plan = jaxft.plan([Stage("all", {"*": 0.1}, 1)], PARAMS)[0]
    old, new = plan.transform(SGD()), plan.transform(Adam())
    assert_equal(jaxft.carry(old.init(PARAMS), new.init(PARAMS)), new.init(PARAMS))


def test_carry_restarts_schedules():
    stage = Stage("all", {"*": Update(0.1, CosineAnnealingLR())}, epochs=5)
    plan = jaxft.plan([stage], PARAMS)[0]
    transform = plan.transform(Adam())
    state = train(transform, transform.init(PARAMS), 4)
    carried = jaxft.carry(state, transform.init(PARAMS)).inner_states["*"].inner_state
    assert int(carried.position) == 0
    assert int(carried.rule.count) == 4


def run_plan(stages, *, steps=2):
    """Returns the plans of the stages and the optimizer states at their ends."""
    plans = jaxft.plan(stages, PARAMS)
    state, ends = None, []
    for plan in plans:
        transform = plan.transform(Adam())
        fresh = transform.init(PARAMS)
        keep = state is not None and plan.stage.carry == "keep"
        state = jaxft.carry(state, fresh, park=plan.park) if keep else fresh
        state = train(transform, state, steps, start=steps * len(ends))
        ends.append(state)
    return plans, ends


def rule_of(state, group):
    return state.inner_states[group].inner_state.rule


def test_carry_parks_a_refrozen_group_until_it_trains_again():
    def stage(name, *patterns, carry="keep"):
        return Stage(name, dict.fromkeys(patterns, 0.1), 1, carry=carry)

    plans, ends = run_plan([stage("1", "a", "b"), stage("2", "a"), stage("3", "a", "b", "c")])
    assert [set(plan.park) for plan in plans] == [set(), {"b"}, set()]
    frozen = ends[1].inner_states["frozen"].inner_state
    assert_equal(frozen, {"b": rule_of(ends[0], "b")})
    counts = {group: int(rule_of(ends[2], group).count) for group in "abc"}
    assert counts == {"a": 6, "b": 4, "c": 2}
    assert jax.tree.leaves(ends[2].inner_states["frozen"]) == []


@pytest.mark.parametrize(
    ("carries", "park"),
    [
        (("reset", "keep", "keep"), {"b"}),
        (("reset", "reset", "keep"), set()),  # dropped before it could be parked
        (("reset", "keep", "reset"), set()),  # no later stage needs it
    ],
)
def test_plan_parks_only_groups_that_train_again(carries, park):
    trained = [{"a": 0.1, "b": 0.1}, {"a": 0.1}, {"a": 0.1, "b": 0.1}]
    stages = [Stage(str(k), trained[k], 1, carry=carry) for k, carry in enumerate(carries)]
    plans, ends = run_plan(stages)
    assert plans[1].park == park
    assert bool(jax.tree.leaves(ends[1].inner_states["frozen"])) == bool(park)


subsets = st.lists(
    st.sampled_from(["a", "b", "c", "a.kernel"]), min_size=1, max_size=4, unique=True
)


@settings(deadline=None, max_examples=30)
@given(subsets, subsets)
def test_carry_there_and_back_loses_nothing(first, second):
    def stage(name, patterns):
        rates = dict.fromkeys(sorted(patterns, key=len, reverse=True), 0.1)
        return Stage(name, rates, 1, carry="keep")

    stages = [stage("there", first), stage("away", second), stage("back", first)]
    try:
        plans = jaxft.plan(stages, PARAMS)
    except jaxft.PatternError:
        return
    there, away, back = (plan.transform(Adam()) for plan in plans)
    before = train(there, there.init(PARAMS), 2)
    state, report = jaxft.carry(before, away.init(PARAMS), park=plans[1].park, report=True)
    assert not report.warnings
    state, report = jaxft.carry(state, back.init(PARAMS), park=plans[2].park, report=True)
    assert not report.warnings
    for group in plans[0].lr:
        assert_equal(rule_of(state, group), rule_of(before, group))


def test_carry_under_eval_shape():
    plans = jaxft.plan([Stage("x", {"a": 0.1}, 1), Stage("y", {"*": 0.1}, 1, carry="keep")], PARAMS)
    old, new = (plan.transform(Adam()) for plan in plans)
    shapes = jax.eval_shape(lambda: jaxft.carry(old.init(PARAMS), new.init(PARAMS)))
    assert jax.tree.structure(shapes) == jax.tree.structure(new.init(PARAMS))
