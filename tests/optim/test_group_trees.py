"""Trees of the parameters of one label, and the size of a state with many labels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxft
from jaxft.optim.group_trees import compact_trees, masked_tree

M = optax.MaskedNode()


class Pair(NamedTuple):
    a: object
    b: object


@jax.tree_util.register_pytree_node_class
class Strict:
    """Accepts pairs alone."""

    def __init__(self, *pairs):
        assert all(isinstance(pair, Pair) for pair in pairs)
        self.pairs = pairs

    def __eq__(self, other):
        return self.pairs == other.pairs

    def tree_flatten(self):
        return self.pairs, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize(
    ("labels", "compact"),
    [
        ({"a": {"w": "y", "b": "y"}, "c": "x"}, {"a": M, "c": "x"}),
        ({"a": {"w": "y", "b": "x"}, "c": "y"}, {"a": {"w": M, "b": "x"}, "c": M}),
        ([("y", "y"), Pair("y", "x")], [M, Pair(M, "x")]),
        (
            {"a": {"w": "y", "b": None}, "b": {"w": "x", "b": None}},
            {"a": M, "b": {"w": "x", "b": None}},
        ),
        ([Strict(Pair("y", "y")), "x"], [M, "x"]),
        (Strict(Pair("y", "y"), Pair("x", "y")), Strict(Pair(M, M), Pair("x", M))),
        ("x", "x"),
    ],
    ids=["subtree", "leaf", "tuples", "None", "object", "children of an object", "array"],
)
def test_compact_trees(labels, compact):
    assert compact_trees(labels)["x"] == compact
    leaves = jax.tree.leaves(masked_tree(labels, "x"))
    assert leaves == jax.tree.leaves(compact)


def layers(num_layers, params_per_layer):
    def layer():
        return {f"m{i}": {"kernel": jnp.ones((2, 2))} for i in range(params_per_layer)}

    return {"layers": {str(i): layer() for i in range(num_layers)}}


def test_state_and_update_grow_with_parameters_rather_than_with_labels():
    """JAX traverses the state at each step, and compiles each equation."""
    params = layers(20, 20)
    rates = {f"layers.{i}": 1e-3 * 0.9**i for i in range(20)}
    (plan,) = jaxft.plan(jaxft.Stage("all", rates, 1), params)
    sizes, equations = [], []
    for tx in (plan.transform(jaxft.AdamW()), optax.adamw(1e-3)):
        state = tx.init(params)
        sizes.append(jax.tree.structure(state).num_nodes)
        equations.append(len(jax.make_jaxpr(tx.update)(params, state, params).eqns))
    assert sizes[0] < 2 * sizes[1]
    assert equations[0] < 1.3 * equations[1]
