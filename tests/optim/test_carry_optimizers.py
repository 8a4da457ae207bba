"""`carry` with optax's optimizers within a label, and its report."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxft

PARAMS = {
    "body": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)},
    "head": {"w": jnp.full((4, 2), 0.5), "b": jnp.ones(2)},
}
FIRST = {"head": "head"}
SECOND = {"head": "head", "body": "late"}

OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-3),
    "adamw": optax.adamw(1e-3),
    "ademamix": contrib.ademamix(1e-3),
    "adopt": contrib.adopt(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "dog": contrib.dog(),
    "lamb": optax.lamb(1e-3),
    "lars": optax.lars(1e-2),
    "lion": optax.lion(1e-4),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "muon": contrib.muon(1e-3),
    "novograd": optax.novograd(1e-3),
    "prodigy": contrib.prodigy(),
    "rprop": optax.rprop(1e-3),
    "sam": contrib.sam(
        optax.adam(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2
    ),
    "schedule_free_adamw": contrib.schedule_free_adamw(1e-3),
    "sm3": optax.sm3(1e-3),
    # Wrappers.
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "conditionally_mask": optax.conditionally_mask(optax.adam(0.1), lambda step: step < 3),
    "conditionally_transform": optax.conditionally_transform(optax.adam(0.1), lambda _: True),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "masked": optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}
# Per optimizer, fields that start with the stage.
RESET = {
    "schedule_free_adamw": ("b1", "step_count"),
    "muon": ("inner_states['muon'].inner_state[0].ns_coeffs",),
    "sam": ("steps_since_sync", "adv_state", "cache"),
    "conditionally_mask": ("step",),
    "conditionally_transform": ("step",),
    "inject_hyperparams": ("count", "hyperparams", "hyperparams_states"),
    "MultiSteps": ("mini_step", "gradient_step", "acc_grads"),
    "apply_if_finite": ("notfinite_count", "last_finite", "total_notfinite"),
}


def labelled(rules, optimizer):
    labels = jaxft.label(PARAMS, rules)
    return jaxft.multi_transform(dict.fromkeys(rules.values(), optimizer), labels), labels


def train(tx, state, steps, tree=PARAMS):
    for step in range(steps):
        gradients = jax.tree.map(lambda p: jnp.cos(p + step), tree)  # noqa: B023
        updates, state = tx.update(gradients, state, tree)
    return updates, state


def leaves(state):
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_carry_keeps_the_state_of_optimizers_within_a_label(name):
    """The head keeps all but what starts with the stage; the late layers start fresh.

    `init` receives all parameters, `update` the trainable half.
    """
    (first, labels), (second, more) = (labelled(x, OPTIMIZERS[name]) for x in (FIRST, SECOND))
    half, next_half = (jaxft.partition(PARAMS, tree)[0] for tree in (labels, more))
    _, before = train(first, first.init(PARAMS), 2, half)
    fresh = second.init(PARAMS)
    after, report = jaxft.carry(before, fresh, report=True)
    assert report.warnings == ()
    actions = {choice.group: choice.action for choice in report.choices if choice.action != "reset"}
    assert actions == {"head": "carried", "late": "fresh"}
    assert jax.tree.structure(after) == jax.tree.structure(fresh)
    old, new, start = (leaves(x.inner_states["head"].inner_state) for x in (before, after, fresh))
    reset = RESET.get(name, ())
    for path, leaf in new.items():
        is_reset = any(path.startswith(f".{field}") for field in reset)
        np.testing.assert_array_equal(leaf, (start if is_reset else old)[path], err_msg=path)
    jax.tree.map(
        np.testing.assert_array_equal, after.inner_states["late"], fresh.inner_states["late"]
    )
    updates, _ = train(second, after, 2, next_half)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_carry_uses_hyperparameters_of_the_new_stage():
    """Also those that optax keeps in the state of the optimizer."""
    (first, _), (second, _) = (
        labelled(FIRST, contrib.muon(1e-3, ns_coeffs=coefficients))
        for coefficients in ((3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5))
    )
    _, before = train(first, first.init(PARAMS), 2)
    after = jaxft.carry(before, second.init(PARAMS))
    muon = after.inner_states["head"].inner_state.inner_states["muon"].inner_state[0]
    np.testing.assert_allclose(muon.ns_coeffs, (2.0, -1.5, 0.5))
    assert int(muon.count) == 2


def test_carry_warns_about_sam_between_two_syncs():
    (first, _), (second, _) = (labelled(x, OPTIMIZERS["sam"]) for x in (FIRST, SECOND))
    _, before = train(first, first.init(PARAMS), 1)
    with pytest.warns(UserWarning, match="sam is 1 step past its last sync"):
        jaxft.carry(before, second.init(PARAMS))


def test_carry_report():
    stages = [
        jaxft.Stage("1", {"head": 0.1, "body.w": 0.1, "body.b": 0.1}, 1),
        jaxft.Stage("2", {"head": jaxft.Update(0.1, optimizer=jaxft.SGD(momentum=0.9))}, 1),
    ]
    first, second = (plan.transform(jaxft.Adam()) for plan in jaxft.plan(stages, PARAMS))
    _, before = train(first, first.init(PARAMS), 1)
    _, report = jaxft.carry(before, second.init(PARAMS), park={"body.w"}, report=True)
    assert report.choices == (
        ("head", "fresh", "has another optimizer now"),
        ("head", "reset", "Group: position"),
        ("body.w", "parked", "name it in park at each carry until it trains again"),
        ("body.b", "dropped", "not named in park"),
    )
    assert report.warnings == ("group 'head' has another optimizer now: it starts fresh.",)
    assert str(report).splitlines() == [
        "group   action   reason",
        "head    fresh    has another optimizer now",
        "head    reset    Group: position",
        "body.w  parked   name it in park at each carry until it trains again",
        "body.b  dropped  not named in park",
        "Warning: group 'head' has another optimizer now: it starts fresh.",
    ]


def test_carry_report_of_wrappers_names_their_fields():
    def wrapped(rules):
        inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
        return optax.MultiSteps(labelled(rules, inner)[0], 2)

    first, second = wrapped(FIRST), wrapped(SECOND)
    _, before = train(first, first.init(PARAMS), 2)
    _, report = jaxft.carry(before, second.init(PARAMS), report=True)
    assert report.choices == (
        ("head", "carried", "the state of 'head'"),
        ("head", "reset", "InjectStatefulHyperparams: count, hyperparams"),
        ("late", "fresh", "its parameters have no state yet"),
        ("late", "reset", "InjectStatefulHyperparams: count, hyperparams"),
        ("", "reset", "MultiSteps: mini_step, gradient_step, acc_grads"),
    )


def adam(rules):
    return labelled(rules, optax.adam(0.1))[0]


def counts(state):
    return {
        group: int(x.inner_state[0].count)
        for group, x in state.inner_states.items()
        if group != "frozen"
    }


def test_carry_prefers_state_of_training_parameters_to_parked_state():
    """The head is parked as `old`, trains as `x` and is then renamed."""
    head, other, renamed = adam({"head": "old"}), adam({"body": "late"}), adam({"head": "x"})
    _, state = train(head, head.init(PARAMS), 3)
    state = jaxft.carry(state, other.init(PARAMS), park={"old"})
    stale = state.inner_states["frozen"]
    state, report = jaxft.carry(state, renamed.init(PARAMS), park={"old"}, report=True)
    assert report.choices[0] == ("x", "carried", "the parked state of 'old'")
    assert jax.tree.leaves(state.inner_states["frozen"]) == []  # as it trains now
    _, state = train(renamed, state, 2)
    state = state._replace(inner_states={**state.inner_states, "frozen": stale})
    last = adam({"head": "y"})
    state, report = jaxft.carry(state, last.init(PARAMS), park={"old"}, report=True)
    assert report.choices[0] == ("y", "carried", "the state of 'x'")
    assert counts(state) == {"y": 5}


def test_carry_parks_only_parameters_that_do_not_train():
    whole, part, back = adam({"body": "body"}), adam({"body.w": "w"}), adam({"body": "body"})
    _, state = train(whole, whole.init(PARAMS), 3)
    state = jaxft.carry(state, part.init(PARAMS), park={"body"})
    parked = state.inner_states["frozen"].inner_state["body"][0]
    assert list(leaves(parked.mu)) == ["['body']['b']"]
    _, state = train(part, state, 1)
    with pytest.warns(UserWarning, match="'body' mixes"):
        jaxft.carry(state, back.init(PARAMS))


def test_carry_drops_parked_state_that_is_not_named_again():
    first, second = adam({"head": "head", "body": "body"}), adam({"head": "head"})
    _, state = train(first, first.init(PARAMS), 1)
    state = jaxft.carry(state, second.init(PARAMS), park={"body"})
    state, report = jaxft.carry(state, second.init(PARAMS), report=True)
    assert report.choices[1:] == (("body", "dropped", "not named in park"),)
    assert counts(jaxft.carry(state, first.init(PARAMS))) == {"head": 1, "body": 0}


def test_carry_under_jit_renames_but_does_not_merge():
    first, merged = adam({"head": "a", "body": "b"}), adam({"head": "x", "body": "x"})
    _, state = train(first, first.init(PARAMS), 2)
    renamed = adam({"head": "c", "body": "d"})
    after = jax.jit(lambda state: jaxft.carry(state, renamed.init(PARAMS)))(state)
    assert counts(after) == {"c": 2, "d": 2}
    with pytest.raises(jaxft.LabelError, match=r"'x' merges 'a' and 'b'.*under jax.jit"):
        jax.jit(lambda state: jaxft.carry(state, merged.init(PARAMS)))(state)
    assert counts(jaxft.carry(state, merged.init(PARAMS))) == {"x": 2}


def test_carry_warns_about_arrays_of_another_dtype():
    tx = adam({"head": "head"})
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.warns(UserWarning, match="'head' has arrays of another shape or dtype now"):
        jaxft.carry(tx.init(half), tx.init(PARAMS))


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array


def layer():
    return Layer(jnp.ones((2, 2)), jnp.ones(2))


TREES = {
    "NamedTuples": {"body": layer(), "head": layer()},
    "NamedTuple": Layer(jnp.ones(2), jnp.ones(2)),
    "tuple of NamedTuples": (layer(), layer()),
    "list of pairs": [tuple(layer()), tuple(layer())],
    "pair of pairs": (tuple(layer()), tuple(layer())),
}


@pytest.mark.parametrize("name", TREES)
def test_carry_of_any_tree_of_parameters(name):
    params = TREES[name]
    first = jaxft.paths(params)[0].split(".")[0]
    labels = [jaxft.label(params, rules) for rules in ({first: "x"}, {"*": "x"}, {"*": "y"})]
    x, both, renamed = (
        jaxft.multi_transform({label: optax.trace(0.9)}, tree)
        for label, tree in zip("xxy", labels, strict=True)
    )
    _, state = train(x, x.init(params), 2, params)
    after, report = jaxft.carry(state, both.init(params), report=True)
    assert report.warnings == ()
    old, new = (leaves(s.inner_states["x"].inner_state.trace) for s in (state, after))
    assert 0 < len(old) < len(new) == len(jax.tree.leaves(params))
    for path, leaf in new.items():
        np.testing.assert_array_equal(leaf, old.get(path, 0 * leaf))
    again = leaves(jaxft.carry(after, renamed.init(params)).inner_states["y"].inner_state.trace)
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_carry_of_a_single_array():
    x, y = (jaxft.multi_transform({label: optax.adam(0.1)}, label) for label in "xy")
    array = jnp.ones(3)
    _, state = train(x, x.init(array), 2, array)
    assert counts(jaxft.carry(state, y.init(array))) == {"y": 2}
