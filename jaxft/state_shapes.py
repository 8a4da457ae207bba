"""Shapes of a stage's optimizer state, to restore it from a checkpoint."""

from collections.abc import Callable, Sequence

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.errors import RecipeError
from jaxft.labels import FROZEN, Tree
from jaxft.optim.carry import carry
from jaxft.optim.optimizers import SGD, Rule
from jaxft.optim.transform import multi_transform
from jaxft.stage_plan import StagePlan


def abstract_state(
    plans: Sequence[StagePlan],
    stage: int | str,
    params: Tree,
    optimizer: Rule = SGD(),
    *,
    transform: Callable[[StagePlan], optax.GradientTransformation] | None = None,
) -> optax.OptState:
    """Returns the shapes of a stage's optimizer state, with the groups parked in it.

    Computes no arrays. Checkpoint libraries need such a tree to restore a state; that of
    `jax.eval_shape(tx.init, params)` has no place for parked groups.

    Args:
      plans: the plans of all stages, from `jaxft.plan`.
      stage: index or name of the stage.
      params: all parameters, or their shapes.
      optimizer: the argument of `StagePlan.transform`.
      transform: returns the transform of a plan, where it is not `plan.transform(optimizer)`:
        `lambda plan: optax.MultiSteps(plan.transform(jaxft.Adam()), 2)`.

    Returns:
      A tree of `jax.ShapeDtypeStruct`. If parameters have shardings, then moments have those of
      their parameters, and all other arrays are replicated.

    Raises:
      RecipeError: there is no such stage.

    Example:
      >>> import jaxft
      >>> params = {"head": jax.ShapeDtypeStruct((2,), "float32")}
      >>> plans = jaxft.plan(jaxft.Stage("all", {"*": 0.1}, epochs=1), params)
      >>> state = abstract_state(plans, "all", params, jaxft.Adam())
      >>> state.inner_states["*"].inner_state.rule.mu
      {'head': ShapeDtypeStruct(shape=(2,), dtype=float32)}
    """
    names = [plan.stage.name for plan in plans]
    if stage not in names and stage not in range(len(plans)):
        raise RecipeError(f"there is no stage {stage!r}; the stages are {', '.join(names)}.")
    index = names.index(stage) if isinstance(stage, str) else stage

    def init(params: Tree) -> optax.OptState:
        state = None
        for plan in plans[: index + 1]:
            fresh = _transform(plan, optimizer, transform).init(params)
            if state is not None and plan.stage.carry == "keep":
                state, _ = carry(state, fresh, park=plan.park, report=True)
            else:
                state = fresh
        return state

    return _with_shardings(jax.eval_shape(init, params), params)


def _transform(
    plan: StagePlan,
    optimizer: Rule,
    transform: Callable[[StagePlan], optax.GradientTransformation] | None,
) -> optax.GradientTransformation:
    if transform:
        return transform(plan)
    if plan.stage.linear_probe:  # takes no steps, and parks what others train
        return multi_transform({}, jax.tree.map(lambda _: FROZEN, plan.labels))
    return plan.transform(optimizer)


def _with_shardings(state: optax.OptState, params: Tree) -> optax.OptState:
    """Returns shapes with the shardings of the parameters to which they belong."""
    sharded = {
        path: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if getattr(leaf, "sharding", None) is not None
    }
    if not sharded:
        return state
    sharding = next(iter(sharded.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())

    def with_sharding(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The path of a moment ends with the path of its parameter.
        owners = (sharded.get(path[i:]) for i in range(len(path) + 1))
        owner = next((x for x in owners if x is not None and x.shape == shape.shape), None)
        chosen = sharding if owner is None else owner.sharding
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=chosen)

    return jax.tree_util.tree_map_with_path(with_sharding, state)
