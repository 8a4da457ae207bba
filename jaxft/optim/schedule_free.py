"""The weights that `optax.contrib.schedule_free` evaluates, which are not those that it steps.

Gradients are computed at y, between the average x and the iterates z in the optimizer state:

    y = b1 * x + (1 - b1) * z

Validation, the best epoch and the start of the next stage use x. The steps of a stage move y.

Reference: Defazio et al. 2024 (arXiv:2405.15682).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.labels import FROZEN, Tree

_Move = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def evaluation_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Returns the parameters to evaluate: x where the optimizer is schedule-free, else `params`.

    Applies `optax.contrib.schedule_free_eval_params` to each group.

    Args:
      opt_state: state of a `StagePlan.transform`, which may be wrapped.
      params: parameters that the steps move, y: all of them, or the trainable half.
    """
    return _map(lambda y, z, b1: (y - (1 - b1) * z) / b1, opt_state, params)


def gradient_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Inverts `evaluation_params`: returns the parameters that the steps move."""
    return _map(lambda x, z, b1: b1 * x + (1 - b1) * z, opt_state, params)


def _map(move: _Move, opt_state: optax.OptState, params: Tree) -> Tree:
    """Moves the parameters of schedule-free groups, except where they equal z, as at the start."""

    def moved(z: Any, p: jax.Array, b1: jax.Array) -> jax.Array:
        if isinstance(z, optax.MaskedNode):  # of another group
            return p
        return jnp.where(p == z, p, move(p, z, b1).astype(p.dtype))

    for state in _active_states(opt_state):
        params = jax.tree.map(partial(moved, b1=state.b1), state.z, params, is_leaf=_is_masked)
    return params


def _active_states(opt_state: optax.OptState) -> list[optax.contrib.ScheduleFreeState]:
    """Returns the schedule-free states of groups that train; parked parameters stay at x."""
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_schedule_free)
    parked = jax.tree_util.DictKey(FROZEN)
    return [node for path, node in nodes if _is_schedule_free(node) and parked not in path]


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
