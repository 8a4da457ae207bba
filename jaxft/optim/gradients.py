"""Transformations of gradients between `jax.grad` and the optimizer: clip, accumulate, check.

Each function reads every gradient that it receives. Pass the trainable half alone
(`jaxft.partition`), so that XLA can leave out the backward pass of the frozen layers. For the same
reason, an average of the weights (`optax.incremental_update`) should cover the trainable half only.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxft.labels import Tree

T = TypeVar("T")
C = TypeVar("C")


def clip(gradients: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
    """Clips gradients by their global norm, as `torch.nn.utils.clip_grad_norm_`.

    Args:
      gradients: a pytree of gradients.
      max_norm: maximum L2 norm over all leaves.

    Returns:
      `(gradients, norm)`: the gradients times min(1, max_norm / (norm + 1e-6)), and their norm
      before clipping, [].

    Example:
      >>> clipped, norm = clip({"a": jnp.array([3.0, 4.0]), "b": None}, max_norm=1.0)
      >>> float(norm), clipped["a"].round(3).tolist()
      (5.0, [0.6000000238418579, 0.800000011920929])
    """
    norm = optax.tree.norm(gradients)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), norm


def clip_value(gradients: Tree, max_value: float) -> Tree:
    """Clips each element of the gradients, as `torch.nn.utils.clip_grad_value_`.

    Args:
      gradients: a pytree of gradients.
      max_value: maximum absolute value.

    Example:
      >>> clip_value({"a": jnp.array([3.0, -0.5]), "b": None}, max_value=1.0)["a"].tolist()
      [1.0, -0.5]
    """
    return jax.tree.map(lambda g: jnp.clip(g, -max_value, max_value), gradients)


def group_norms(tree: Tree, groups: Sequence[str]) -> dict[str, jax.Array]:
    """Returns the L2 norm, [], of each group's leaves.

    Args:
      tree: a pytree, e.g. of gradients.
      groups: the group of each leaf of `tree`, in leaf order.

    Example:
      >>> tree = {"a": jnp.array([3.0, 4.0]), "b": None, "c": jnp.ones(1)}
      >>> {group: float(norm) for group, norm in group_norms(tree, ["x", "y"]).items()}
      {'x': 5.0, 'y': 1.0}
    """
    leaves = jax.tree.leaves(tree)
    return {
        group: optax.tree.norm([x for x, g in zip(leaves, groups, strict=True) if g == group])
        for group in dict.fromkeys(groups)
    }


def accumulate(value_and_grad: Callable[[Any], T], batches: Any) -> T:
    """Averages `value_and_grad(batch)` over several batches, one batch at a time.

    Needs the memory of a single batch. With batches of equal size, the result is the mean over all
    examples; norm layers still see the statistics of one batch at a time.

    Args:
      value_and_grad: returns a pytree for one batch.
      batches: batches stacked along a leading axis, [n b ...].

    Returns:
      The mean of the n results.

    Example:
      >>> accumulate(lambda x: (x.sum(), {"w": x}), jnp.array([[1.0], [3.0]]))[1]["w"].tolist()
      [2.0]
    """
    count = jax.tree.leaves(batches)[0].shape[0]
    total, _ = accumulate_sums(lambda _, batch: (value_and_grad(batch), None), None, batches)
    return jax.tree.map(lambda x: x / count, total)


def accumulate_sums(
    function: Callable[[C, Any], tuple[T, C]], carry: C, parts: Any, rest: Any = None
) -> tuple[T, C]:
    """Sums `function(carry, part) -> (value, carry)` over the leading axis of `parts`, in a loop.

    The carry, such as running statistics, passes from each part to the next.

    Args:
      function: returns the value of a part, and the carry for the next part.
      carry: argument of the first call.
      parts: pytree of arrays with a leading axis of parts.
      rest: one more part after them, which may have another shape.

    Returns:
      The sum of the values, and the last carry.
    """
    shapes, _ = jax.eval_shape(function, carry, jax.tree.map(lambda x: x[0], parts))
    zeros: T = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sofar: tuple[T, C], part: Any) -> tuple[tuple[T, C], None]:
        total, carry = sofar
        value, carry = function(carry, part)
        return (jax.tree.map(jnp.add, total, value), carry), None

    sofar, _ = jax.lax.scan(add, (zeros, carry), parts)
    return sofar if rest is None else add(sofar, rest)[0]


def if_finite(gradients: Tree, new: T, old: T) -> tuple[T, jax.Array]:
    """Skips a step with non-finite gradients: returns `new` if all are finite, else `old`.

    Args:
      gradients: a pytree of gradients.
      new: parameters, optimizer state etc. after the step.
      old: the same before the step.

    Returns:
      `(new or old, finite)`, where `finite` is bool [].

    Example:
      >>> state, finite = if_finite({"a": jnp.array(jnp.nan)}, new=jnp.ones(()), old=jnp.zeros(()))
      >>> float(state), bool(finite)
      (0.0, False)
    """
    finite = all_finite(gradients)
    return select(finite, new, old), finite


def all_finite(tree: Tree) -> jax.Array:
    """Returns whether all elements of all leaves are finite, bool `[]`."""
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.array(leaves, bool).all()


def select(condition: jax.Array, new: T, old: T) -> T:
    """Returns the pytree `new` where the condition, bool `[]`, is true, else `old`."""
    selected: T = jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
    return selected
