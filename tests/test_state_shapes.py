"""`abstract_state`: the structure of an optimizer state in a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxft
from jaxft import Adam, LinearProbe, RecipeError, Stage, Update

README = Path(jaxft.__file__).with_name("README.md")
PARAMS = {"body": {"w": jnp.ones((8, 4)), "b": jnp.ones(8)}, "head": {"w": jnp.ones((4, 8))}}
BOTH = {"head": 1e-3, "body": 1e-4}
STAGES = [
    Stage("both", BOTH, 1),
    Stage("head", {"head": Update(1e-3, jaxft.ReduceLROnPlateau())}, 1, carry="keep"),
    Stage("probe", {"head": LinearProbe()}, carry="keep"),
    Stage("again", BOTH, 1, carry="keep", optimizer=optax.scale_by_lion()),
    Stage("anew", BOTH, 1),
]


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def states(plans, transform):
    """Yields the optimizer state at the start of each stage."""
    state = None
    for plan in plans:
        fresh = transform(plan).init(PARAMS)
        keep = plan.stage.carry == "keep"
        state = jaxft.carry(state, fresh, park=plan.park, report=True)[0] if keep else fresh
        yield state


def plain(plan):
    if plan.stage.linear_probe:
        return jaxft.multi_transform({}, jax.tree.map(lambda _: "frozen", PARAMS))
    return plan.transform(Adam())


def wrapped(plan):
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), plain(plan)), 2)
    return tx if plan.stage.linear_probe else jaxft.trainable_only(tx, plan.labels)


@pytest.mark.parametrize("transform", [plain, wrapped])
def test_abstract_state_has_the_shapes_of_each_stage(transform):
    plans = jaxft.plan(STAGES, PARAMS)
    arguments = {"optimizer": Adam()} if transform is plain else {"transform": wrapped}
    for k, state in enumerate(states(plans, transform)):
        for stage in (k, STAGES[k].name):
            shapes = jaxft.abstract_state(plans, stage, jax.eval_shape(lambda: PARAMS), **arguments)
            assert shapes_of(shapes) == shapes_of(state)
            assert jax.tree.structure(shapes) == jax.tree.structure(state)
    parked = jaxft.abstract_state(plans, "head", PARAMS, Adam()).inner_states["frozen"]
    assert len(jax.tree.leaves(parked)) == 5


@pytest.mark.parametrize("stage", ["late", 5, -1])
def test_abstract_state_of_an_unknown_stage(stage):
    plans = jaxft.plan(STAGES, PARAMS)
    with pytest.raises(RecipeError, match=r"no stage .*; the stages are both, head, probe"):
        jaxft.abstract_state(plans, stage, PARAMS)


SHARDED = """
import pathlib, sys
import jax, jax.numpy as jnp, optax
import jaxft

mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, sys.argv[3]),))
jax.set_mesh(mesh)
rows = jax.sharding.NamedSharding(mesh, jax.P("x"))
params = {"body": {"w": jnp.ones((8, 4)), "b": jnp.ones(8)}, "head": {"w": jnp.ones((8, 2))}}
params = jax.tree.map(lambda x: jax.device_put(x, rows), params)
names = {"params": params, "folder": pathlib.Path(sys.argv[2])}
names |= {"jax": jax, "jnp": jnp, "optax": optax, "jaxft": jaxft}
names["loss"] = lambda params: sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(params))
save, restore = pathlib.Path(sys.argv[1]).read_text().split("# ---")
exec(save, names)
saved = names["opt_state"]
parked = jax.tree.leaves(saved.inner_states["frozen"])
assert len(parked) == 5 and all(x.any() for x in parked)
exec(restore, names)
restored = names["restored"]["opt_state"]
assert jax.tree.structure(restored) == jax.tree.structure(saved)
for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
    assert (a == b).all()
    assert b.sharding.is_equivalent_to(rows if b.ndim else rows.update(spec=jax.P()), b.ndim)
for group in ("head", "body"):
    assert names["opt_state"].inner_states[group].inner_state.rule.count == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_parked_state_is_restored_on_eight_devices(tmp_path, axes):
    """Runs the example of the README with sharded parameters."""
    section = README.read_text().split("\n## Save and restore across a re-labelling\n")[1]
    save, restore = (block.split("```")[0] for block in section.split("```python\n")[1:3])
    (tmp_path / "example.py").write_text(f"{save}# ---\n{restore}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path / "example.py", tmp_path, axes],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
