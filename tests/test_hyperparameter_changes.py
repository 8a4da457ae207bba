"""Hyperparameters that change between stages with carry="keep", against torch's param_groups.

Random plans in float64: the groups that train in each stage, and their hyperparameters.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import SGD, Adam, AdamW, RMSprop, Stage, Update

GOLDEN = Path(__file__).parent / "golden" / "hyperparameter_changes.npz"
SHAPES = {"a": (3,), "b": (2, 2), "c": (2,)}
RULES = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}
STEPS = 3
RECORDED, LIVE = range(12), range(12, 28)


def start():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradient(p, step):
    return np.cos(3 * p + 0.7 * step)


def random_plan(seed):
    """Returns an optimizer's name and, for each of four stages, the options of its groups."""
    rng = np.random.default_rng(seed)
    name = [*RULES][seed % 4]
    stages = []
    for _ in range(4):
        groups = [g for g in SHAPES if rng.random() < 0.7] or ["a"]
        stages.append({group: options(name, rng) for group in groups})
    if name == "rmsprop":  # torch creates the buffers at a parameter's first step, or never
        for group in SHAPES:
            if first := next((stage[group] for stage in stages if group in stage), None):
                first |= {"momentum": 0.9, "centered": True}
    return name, stages


def options(name, rng):
    drawn = {"lr": rng.choice([0.03, 0.1]), "weight_decay": rng.choice([0.0, 0.1])}
    if name in ("adam", "adamw"):
        return drawn | {"b1": rng.choice([0.0, 0.9]), "b2": rng.choice([0.9, 0.99]), "eps": 1e-6}
    drawn["momentum"] = rng.choice([0.0, 0.5, 0.9])
    if name == "rmsprop":
        return drawn | {"alpha": rng.choice([0.8, 0.9]), "centered": bool(rng.integers(2))}
    kind = rng.integers(3) if drawn["momentum"] else 0
    return drawn | {"dampening": 0.3 * (kind == 1), "nesterov": bool(kind == 2)}


def train(seed):
    """Returns the parameters after each stage, as rows."""
    name, plan = random_plan(seed)
    stages = []
    for k, groups in enumerate(plan):
        trains = {
            group: Update(float(opts["lr"]), optimizer=RULES[name](**without_lr(opts)))
            for group, opts in groups.items()
        }
        stages.append(Stage(str(k), trains, epochs=1, carry="keep"))
    params, state, rows, step = jax.tree.map(jnp.asarray, start()), None, [], 0
    for plan in jaxft.plan(stages, params):
        transform = plan.transform()
        fresh = transform.init(params)
        state = fresh if state is None else jaxft.carry(state, fresh, park=plan.park)
        for _ in range(STEPS):
            gradients = {group: jnp.asarray(gradient(p, step)) for group, p in params.items()}
            updates, state = transform.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            step += 1
        rows.append(np.hstack([np.ravel(p) for p in params.values()]))
    return np.stack(rows)


def without_lr(opts):
    return {name: getattr(x, "item", lambda x=x: x)() for name, x in opts.items() if name != "lr"}


@pytest.mark.parametrize("seed", RECORDED)
def test_carry_with_changed_hyperparameters_equals_recorded_torch(seed, golden):
    with jax.enable_x64(True):
        np.testing.assert_allclose(train(seed), golden[str(seed)], rtol=1e-12, atol=1e-12)


def test_carry_with_changed_hyperparameters_equals_torch():
    pytest.importorskip("torch")
    from record_hyperparameter_changes import record

    with jax.enable_x64(True):
        for seed in [*RECORDED, *LIVE]:
            np.testing.assert_allclose(train(seed), record(seed), rtol=1e-12, atol=1e-12)


def test_sgd_and_rmsprop_without_momentum_have_no_buffer():
    params = start()
    for rule, arrays in ((SGD(), 0), (RMSprop(), 3), (SGD(momentum=0.9), 3)):
        (plan,) = jaxft.plan([Stage("x", {"*": 0.1}, 1, optimizer=rule)], params)
        state = plan.transform().init(params).inner_states["*"].inner_state.rule
        assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state)) == arrays


def test_carry_from_adam_to_adamw():
    params = start()
    stages = [
        Stage("1", {"*": 0.1}, 1, optimizer=Adam()),
        Stage("2", {"*": 0.1}, 1, optimizer=AdamW(weight_decay=0.3), carry="keep"),
    ]
    first, second = (plan.transform() for plan in jaxft.plan(stages, params))
    _, state = first.update(params, first.init(params), params)
    carried = jaxft.carry(state, second.init(params))
    assert int(carried.inner_states["*"].inner_state.rule.count) == 1
