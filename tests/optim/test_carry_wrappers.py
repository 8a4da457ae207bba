"""`carry` through transforms around and within a multi_transform."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import LabelError

PARAMS = {"body": {"w": jnp.ones((4, 4))}, "head": {"w": jnp.ones((4, 2))}}
HEAD, ALL = {"head": "head"}, {"head": "head", "body": "body"}


def labelled(rules, make=optax.adam, lr=1e-2):
    transforms = {name: make(lr) for name in rules.values()}
    return jaxft.multi_transform(transforms, jaxft.label(PARAMS, rules))


def injected(make):
    return lambda lr: optax.inject_hyperparams(make)(learning_rate=lr)


def masked(tx):
    return optax.masked(tx, jax.tree.map(lambda _: True, PARAMS))


def train(tx, state, steps):
    for step in range(steps):
        gradients = jax.tree.map(lambda p: jnp.cos(p + step), PARAMS)  # noqa: B023
        _, state = tx.update(gradients, state, PARAMS)
    return state


def partition_of(state):
    def is_partition(node):
        return hasattr(node, "inner_states")

    (partition,) = filter(is_partition, jax.tree.leaves(state, is_leaf=is_partition))
    return partition.inner_states


def moments(state, group):
    """Returns the state of Adam in a group, within any wrappers."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    inner = partition_of(state)[group].inner_state
    (partition,) = filter(is_adam, jax.tree.leaves(inner, is_leaf=is_adam))
    return partition


AROUND = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "chain, then a schedule": lambda tx: optax.chain(tx, optax.scale_by_schedule(lambda c: 1.0)),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("all", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": masked,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(optax.scale(scale), tx)
    )(scale=0.5),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step < 9),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda _: True),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.05)),
    "two wrappers": lambda tx: optax.MultiSteps(optax.chain(optax.clip(1.0), tx), 2),
}
WITHIN = {
    "inject_hyperparams": injected(optax.adam),
    "MultiSteps": lambda lr: optax.MultiSteps(optax.adam(lr), 2).gradient_transformation(),
    "apply_if_finite": lambda lr: optax.apply_if_finite(optax.adam(lr), 3),
    "masked": lambda lr: optax.masked(optax.adam(lr), lambda p: jax.tree.map(jnp.ndim, p)),
    "chain": lambda lr: optax.chain(optax.clip(1.0), optax.adam(lr)),
    "schedule": lambda lr: optax.adam(optax.cosine_decay_schedule(lr, 10)),
    "nested": lambda lr: optax.apply_if_finite(injected(optax.adam)(lr), 3),
}


def check_carried(before, after, fresh):
    """Checks that the head keeps moments and count, and that all else is as in `fresh`."""
    old, new = moments(before, "head"), moments(after, "head")
    assert int(old.count) == int(new.count) > 0
    np.testing.assert_array_equal(old.mu["head"]["w"], new.mu["head"]["w"])
    assert jax.tree.structure(after) == jax.tree.structure(fresh)
    carried, untouched = moments(after, "head"), moments(fresh, "head")
    kept = {id(leaf) for leaf in jax.tree.leaves(carried)}
    others = [leaf for leaf in jax.tree.leaves(after) if id(leaf) not in kept]
    replaced = {id(leaf) for leaf in jax.tree.leaves(untouched)}
    expected = [leaf for leaf in jax.tree.leaves(fresh) if id(leaf) not in replaced]
    jax.tree.map(np.testing.assert_array_equal, others, expected)


@pytest.mark.parametrize("wrapper", AROUND)
def test_carry_through_wrappers_around_multi_transform(wrapper):
    first, second = (AROUND[wrapper](labelled(rules)) for rules in (HEAD, ALL))
    before, fresh = train(first, first.init(PARAMS), 4), second.init(PARAMS)
    after = jaxft.carry(before, fresh)
    check_carried(before, after, fresh)
    train(second, after, 1)


@pytest.mark.parametrize("wrapper", WITHIN)
def test_carry_through_wrappers_within_a_group(wrapper):
    first = labelled(HEAD, WITHIN[wrapper], lr=0.1)
    second = labelled(ALL, WITHIN[wrapper], lr=0.001)
    before, fresh = train(first, first.init(PARAMS), 4), second.init(PARAMS)
    after = jaxft.carry(before, fresh)
    check_carried(before, after, fresh)
    train(second, after, 1)


def test_carry_uses_the_learning_rate_of_the_new_stage():
    first, second = labelled(HEAD, injected(optax.adam), 0.1), labelled(ALL, injected(optax.adam))
    state = jaxft.carry(train(first, first.init(PARAMS), 2), second.init(PARAMS))
    rates = [
        partition_of(train(second, state, 1))[group].inner_state.hyperparams["learning_rate"]
        for group in ("head", "body")
    ]
    np.testing.assert_allclose(rates, 1e-2)


def test_carry_into_and_out_of_a_wrapper():
    plain, wrapped = labelled(HEAD), labelled(ALL, injected(optax.adam))
    before = train(plain, plain.init(PARAMS), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = jaxft.carry(optax.MultiSteps(plain, 2).init(PARAMS), plain.init(PARAMS))
        after = jaxft.carry(before, wrapped.init(PARAMS))
    assert int(moments(after, "head").count) == 2


def test_carry_from_optax_multi_transform():
    labels = jaxft.label(PARAMS, HEAD)
    first = optax.multi_transform({"head": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)
    second = labelled(ALL)
    before = train(first, first.init(PARAMS), 2)
    check_carried(before, jaxft.carry(before, second.init(PARAMS)), second.init(PARAMS))


def test_carry_warns_about_moments_outside_of_multi_transform():
    first, second = (optax.chain(labelled(rules), optax.ema(0.9)) for rules in (HEAD, ALL))
    before = train(first, first.init(PARAMS), 2)
    with pytest.warns(UserWarning, match=r"outside of the multi_transform \(ema\) starts fresh"):
        after = jaxft.carry(before, second.init(PARAMS))
    assert int(after[1].count) == 0
    assert int(moments(after, "head").count) == 2


@pytest.mark.parametrize("place", ["around", "within"])
def test_carry_warns_about_accumulated_gradients(place):
    if place == "around":
        first, second = (optax.MultiSteps(labelled(rules), 2) for rules in (HEAD, ALL))
    else:
        first, second = (labelled(rules, WITHIN["MultiSteps"]) for rules in (HEAD, ALL))
    before = train(first, first.init(PARAMS), 3)
    with pytest.warns(UserWarning, match="the gradients of 1 mini-step towards its next step: "):
        after = jaxft.carry(before, second.init(PARAMS))
    assert int(moments(after, "head").count) == 1


@pytest.mark.parametrize(
    "other",
    [
        optax.adamw,
        lambda lr: optax.adam(optax.cosine_decay_schedule(lr, 10)),
        lambda lr: optax.chain(optax.clip(1.0), optax.adam(lr)),
    ],
    ids=["decay", "schedule", "clipping"],
)
def test_carry_keeps_the_moments_of_adam_in_any_chain(other):
    for make, later in ((optax.adam, other), (other, optax.adam)):
        first, second = labelled(HEAD, make), labelled(ALL, later)
        before = train(first, first.init(PARAMS), 2)
        after = jaxft.carry(before, second.init(PARAMS))
        assert int(moments(after, "head").count) == 2
        head = [moments(state, "head").nu["head"]["w"] for state in (before, after)]
        np.testing.assert_array_equal(*head)
        train(second, after, 1)


def test_carry_pairs_several_multi_transforms_in_order():
    def two(rules):
        return optax.chain(labelled(rules, lambda _: optax.trace(0.9)), labelled(rules))

    first, second = two(HEAD), two(ALL)
    before = train(first, first.init(PARAMS), 2)
    after = jaxft.carry(before, second.init(PARAMS))
    trace = [
        state[0].inner_states["head"].inner_state.trace["head"]["w"] for state in (before, after)
    ]
    np.testing.assert_array_equal(*trace)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (optax.adam(0.1), labelled(HEAD), "the old state, of type tuple, holds no multi_transform"),
        (labelled(HEAD), optax.MultiSteps(optax.adam(0.1), 2), "the new state, of type MultiSteps"),
        (
            optax.chain(labelled(HEAD), labelled(HEAD)),
            labelled(HEAD),
            "2 multi_transforms and .* 1",
        ),
    ],
    ids=["no labels before", "no labels after", "several"],
)
def test_carry_rejects_states_without_multi_transform(old, new, message):
    with pytest.raises(LabelError, match=message):
        jaxft.carry(old.init(PARAMS), new.init(PARAMS))


def test_carry_cannot_park_without_a_frozen_label():
    first = labelled(ALL)
    labels = jaxft.label(PARAMS, HEAD, default="off")
    second = optax.multi_transform({"head": optax.adam(0.1), "off": optax.set_to_zero()}, labels)
    before = train(first, first.init(PARAMS), 1)
    with pytest.raises(LabelError, match=r"body cannot be parked.*jaxft.multi_transform"):
        jaxft.carry(before, second.init(PARAMS), park={"body"})


@pytest.mark.parametrize("wrapper", ["MultiSteps", "apply_if_finite", "chain"])
def test_multi_transform_initialised_with_the_trainable_half(wrapper):
    tx = AROUND[wrapper](labelled(HEAD))
    half, _ = jaxft.partition(PARAMS, jaxft.label(PARAMS, HEAD))
    updates, _ = tx.update(half, tx.init(half), half)
    assert updates["body"]["w"] is None
    updates, _ = labelled(HEAD).update(half, labelled(HEAD).init(half), half)
    assert np.all(updates["head"]["w"] != 0)


@pytest.mark.parametrize("update", ["half", "whole"])
@pytest.mark.parametrize("init", ["half", "whole"])
@pytest.mark.parametrize("wrapper", AROUND)
def test_trainable_only_accepts_all_parameters_and_their_trainable_half(wrapper, init, update):
    state = None
    for rules in (HEAD, ALL):
        labels = jaxft.label(PARAMS, rules)
        tx = jaxft.trainable_only(AROUND[wrapper](labelled(rules)), labels)
        trees = {"half": jaxft.partition(PARAMS, labels)[0], "whole": PARAMS}
        fresh = tx.init(trees[init])
        state = fresh if state is None else jaxft.carry(state, fresh)
        for _ in range(2):
            updates, state = tx.update(trees[update], state, trees[update])
        assert jax.tree.structure(updates) == jax.tree.structure(trees[update])
        assert not np.any(updates["body"]["w"]) or "body" in rules.values()
        assert np.all(updates["head"]["w"] != 0)
        if rules == HEAD:
            assert all(np.shape(x) != PARAMS["body"]["w"].shape for x in jax.tree.leaves(state))


def test_trainable_only_passes_extra_arguments():
    labels = {"body": "frozen", "head": "head"}
    tx = jaxft.multi_transform({"head": optax.polyak_sgd()}, labels)
    tx = jaxft.trainable_only(optax.MultiSteps(tx, 1), labels)
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert np.all(updates["head"] < 0)
    with pytest.raises(LabelError, match="another structure than the parameters"):
        tx.init({"body": jnp.ones(2)})


def test_carry_through_lookahead_around_multi_transform():
    """`init` receives all parameters, `update` the trainable half."""
    state, both = None, optax.LookaheadParams.init_synced
    for rules in (HEAD, ALL):
        tx = optax.lookahead(labelled(rules), sync_period=2, slow_step_size=0.5)
        half, _ = jaxft.partition(PARAMS, jaxft.label(PARAMS, rules))
        fresh = tx.init(both(PARAMS))
        state = fresh if state is None else jaxft.carry(state, fresh)
        for _ in range(2):
            updates, state = tx.update(half, state, both(half))
    assert int(moments(state, "head").count) == 4
    assert int(moments(state, "body").count) == 2
    assert np.all(updates.slow["head"]["w"] != 0)


def test_carry_through_schedule_free_around_multi_transform():
    """Its average restarts at the parameters."""
    first, second = (optax.contrib.schedule_free(labelled(rules), 0.1) for rules in (HEAD, ALL))
    before = train(first, first.init(PARAMS), 2)
    with pytest.warns(UserWarning, match=r"outside of the multi_transform \(z\) starts fresh"):
        after = jaxft.carry(before, second.init(PARAMS))
    check_carried(before, after, second.init(PARAMS))
    train(second, after, 2)
