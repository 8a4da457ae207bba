"""`carry` where a label has other parameters than before, or uses less of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import SGD, RMSprop

PARAMS = {"body": jnp.ones(3), "head": jnp.ones(2)}
MOMENTUM, PLAIN = SGD(momentum=0.9), SGD()


def transform(rules, default=MOMENTUM, **optimizers):
    """Returns the transform of labels, with the optimizers of `optimizers` where it names one."""
    directions = {name: optimizers.get(name, default).direction() for name in rules.values()}
    return jaxft.multi_transform(directions, jaxft.label(PARAMS, rules))


def trained(tx, state, gradient):
    return tx.update(jax.tree.map(lambda x: gradient * x, PARAMS), state, PARAMS)[1]


def buffer(state, group):
    return state.inner_states[group].inner_state.buffer


def actions(report):
    return [choice for choice in report.choices if choice.action != "reset"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_carry_of_unused_state_leaves_out_parameters_of_other_groups(first):
    """The head leaves the group `a`, whose momentum pauses, trains as `b`, and returns."""
    both = transform({"body": "a", "head": "a"})
    rules = {"body": "a", "head": "b"}
    order = sorted(rules, key=lambda name: rules[name] != first)
    apart = transform({name: rules[name] for name in order}, a=PLAIN)
    state = trained(both, both.init(PARAMS), 1.0)
    state = trained(apart, jaxft.carry(state, apart.init(PARAMS)), 10.0)
    state = jaxft.carry(state, both.init(PARAMS))
    np.testing.assert_allclose(buffer(state, "a")["head"], 0.9 + 10)
    np.testing.assert_allclose(buffer(state, "a")["body"], 1)


def test_carry_of_a_label_whose_parameters_all_left_keeps_no_unused_state():
    head = transform({"head": "a"})
    swapped = transform({"body": "a", "head": "b"}, a=PLAIN)
    state = trained(head, head.init(PARAMS), 1.0)
    state, report = jaxft.carry(state, swapped.init(PARAMS), report=True)
    assert buffer(state, "a") is None
    assert actions(report) == [
        ("a", "fresh", "its optimizer has no state"),
        ("b", "carried", "the state of 'a'"),
    ]
    assert report.warnings == ()


def test_carry_of_unused_fields_follows_parameters_into_renamed_groups():
    """RMSprop keeps its momentum buffers while its momentum is 0."""
    momentum, plain = RMSprop(momentum=0.9), RMSprop()
    before = transform({"body": "x", "head": "y"}, momentum)
    swapped = transform({"body": "y", "head": "x"}, plain)
    again = transform({"body": "y", "head": "x"}, momentum)
    trained_once = trained(before, before.init(PARAMS), 1.0)
    state = jaxft.carry(trained_once, swapped.init(PARAMS))
    state = jaxft.carry(trained(swapped, state, 1.0), again.init(PARAMS))
    for old, new, name in (("x", "y", "body"), ("y", "x", "head")):
        np.testing.assert_array_equal(buffer(state, new)[name], buffer(trained_once, old)[name])
        assert np.all(buffer(state, new)[name] != 0)


def test_carry_of_unused_fields_into_a_merged_group():
    momentum = RMSprop(momentum=0.9)
    before = transform({"body": "x", "head": "y"}, momentum)
    merged = transform({"body": "y", "head": "y"}, RMSprop())
    state = trained(before, before.init(PARAMS), 1.0)
    after = jaxft.carry(state, merged.init(PARAMS))
    expected = {"body": buffer(state, "x")["body"], "head": buffer(state, "y")["head"]}
    jax.tree.map(np.testing.assert_array_equal, buffer(after, "y"), expected)


def test_carry_with_park_of_a_label_whose_parameters_all_train():
    """Nothing has to be parked, so no frozen label is needed."""
    first = transform({"head": "old"})
    labels = {"body": "new", "head": "x"}
    second = optax.multi_transform({name: MOMENTUM.direction() for name in ("new", "x")}, labels)
    state = trained(first, first.init(PARAMS), 1.0)
    state = jaxft.carry(state, second.init(PARAMS), park={"old"})
    np.testing.assert_array_equal(buffer(state, "x")["head"], 1)


def test_carry_reports_a_dropped_group_whose_name_has_other_parameters():
    first, second = transform({"body": "a"}), transform({"head": "a"})
    state = trained(first, first.init(PARAMS), 1.0)
    _, report = jaxft.carry(state, second.init(PARAMS), park={"a"}, report=True)
    assert actions(report) == [
        ("a", "fresh", "its parameters have no state yet"),
        ("a", "dropped", "its name has other parameters now"),
    ]


def test_carry_reports_a_group_that_loses_its_state_once():
    first, second = transform({"head": "a"}), transform({"head": "a"}, RMSprop())
    state = trained(first, first.init(PARAMS), 1.0)
    _, report = jaxft.carry(state, second.init(PARAMS), report=True)
    assert actions(report) == [("a", "fresh", "has another optimizer now")]


def test_carry_into_an_optimizer_without_state_reports_the_loss():
    first = transform({"head": "a"}, RMSprop())
    second = transform({"head": "a"}, PLAIN)
    state = trained(first, first.init(PARAMS), 1.0)
    with pytest.warns(UserWarning, match="'a' has another optimizer now"):
        jaxft.carry(state, second.init(PARAMS))
