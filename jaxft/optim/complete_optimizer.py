"""Recognises optax optimizers that jaxft cannot apply.

A recipe names no optimizer whose update needs the loss, and a stage takes no complete optimizer,
such as `optax.adam(1e-3)`, other than by name.

A direction, such as `optax.scale_by_adam()`, leaves out the learning rate and the minus sign. jaxft
multiplies it by minus the learning rate of the stage. With a complete optimizer, that would climb.
"""

import warnings
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import optax

from jaxft.labels import Tree

WAY_OUT = (
    "includes a learning rate and the minus sign, and jaxft applies those of the stage. Name the "
    'optimizer, and the stage sets its learning rate: Optax("optax.adam") instead of '
    "optax.adam(1e-3). Or pass the direction alone, optax.scale_by_adam(). Or use complete "
    "optimizers in jaxft.multi_transform({group: optimizer for group in plan.lr}, plan.labels)."
)
_SMALL_TREE = {"bias": np.ones(2), "kernel": np.ones((2, 2))}


def unfit_reason(transform: optax.GradientTransformation) -> str:
    """Returns why no stage can use a transform, as a relative clause; empty if it can.

    `optax.contrib.momo` needs the value of the loss, `optax.lbfgs` the loss as a function,
    `optax.contrib.dpsgd` the gradient of each example. `optax.contrib.galore` stores empty arrays.
    """

    def step(params: Tree) -> tuple[Tree, optax.OptState]:
        return transform.update(params, transform.init(params), params)

    try:
        updates, state = jax.eval_shape(step, _SMALL_TREE)
    except Exception as error:  # whatever the transform raises
        return (
            f"whose update fails: {' '.join(str(error).split())}. jaxft passes it gradients and "
            "parameters, not the loss (value, value_fn)"
        )
    if jax.tree.map(np.shape, updates) != jax.tree.map(np.shape, _SMALL_TREE):
        return "whose update needs the gradient of each example"
    if any(x.size == 0 for x in jax.tree.leaves(state)):
        return "whose state has empty arrays, which a checkpoint cannot hold"
    return ""


def is_complete(transform: optax.GradientTransformation, params: Tree = _SMALL_TREE) -> bool | None:
    """Returns whether the updates of a transform descend, without another factor.

    Takes steps with positive gradients. A complete optimizer has a step with a negative update: not
    always the first, because a warmup starts at 0, `MultiSteps` waits, and `sam` climbs first.

    Args:
      transform: an optax transform.
      params: the structure and the number of axes of the parameters.

    Returns:
      True for a complete optimizer, False for a direction; None if it is unknown, because the
      transform needs other parameters, more arguments or more steps.
    """
    leaves, structure = jax.tree.flatten(params)
    return _is_complete(transform, structure, tuple(map(np.ndim, leaves)))


@lru_cache(maxsize=128)
def _is_complete(
    transform: optax.GradientTransformation, structure: Any, axes: tuple[int, ...]
) -> bool | None:
    params = structure.unflatten([np.ones((2,) * n, np.float32) for n in axes])
    # Not constant, because centralised gradients would be zero.
    gradients = jax.tree.map(
        lambda p: p + np.arange(p.size, dtype=p.dtype).reshape(p.shape), params
    )

    @jax.jit
    def step(state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        updates, state = transform.update(gradients, state, params)
        return optax.tree.vdot(updates, gradients), state

    products = []
    try:
        # Outside of the trace, as a transform may be initialised under jit.
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = transform.init(jax.tree.map(jax.numpy.asarray, params))
            for _ in range(64):
                product, state = step(state)
                if product < 0:
                    return True
                products += [product] if product > 0 else []
                if len(products) == 8:
                    return False
    except Exception:  # whatever the transform raises: it does not accept the probe
        return None
    return False if products else None
