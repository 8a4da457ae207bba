"""Optax optimizers by name follow optax, used by hand with the same learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxft
from jaxft import Optax, RecipeError, ReduceLROnPlateau, Stage, Update, schedules
from jaxft.optim.schedule_free import evaluation_params, gradient_params

STEPS = 6
SCHEDULE = schedules.OneCycleLR(pct_start=0.4)
LRS = {"head": 3e-2, "*": 1e-2}

# In optax, each takes a schedule as its learning rate, except those in CONSTANT.
OPTIMIZERS = {
    "optax.adabelief": {},
    "optax.adafactor": {"min_dim_size_to_factor": 2},
    "optax.adan": {"weight_decay": 0.1},
    "optax.adamw": {"weight_decay": 0.1, "nesterov": True},
    "optax.fromage": {},
    "optax.lamb": {"weight_decay": 0.1},
    "optax.lars": {"weight_decay": 0.1},
    "optax.lion": {"weight_decay": 0.1},
    "optax.nadamw": {},
    "optax.novograd": {},
    "optax.sgd": {"momentum": 0.9},
    "optax.sign_sgd": {},
    "optax.sm3": {},
    "optax.yogi": {},
    "optax.contrib.ademamix": {},
    "optax.contrib.adopt": {},
    "optax.contrib.cocob": {},
    "optax.contrib.dadapt_adamw": {"estim_lr0": 1e-3},
    "optax.contrib.dog": {},
    "optax.contrib.madgrad": {},
    "optax.contrib.muon": {"weight_decay": 0.1, "consistent_rms": 0.2},
    "optax.contrib.prodigy": {"estim_lr0": 1e-3},
    "optax.contrib.schedule_free_adamw": {"weight_decay": 0.1},
    "optax.contrib.schedule_free_sgd": {},
}
CONSTANT = ("optax.sm3", "optax.contrib.schedule_free_adamw", "optax.contrib.schedule_free_sgd")
each_optimizer = pytest.mark.parametrize(("name", "arguments"), OPTIMIZERS.items(), ids=OPTIMIZERS)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def params():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    shapes = {"body": {"w": (3, 4), "b": (4,)}, "conv": {"w": (2, 2, 3, 4)}, "head": {"w": (4, 2)}}
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape, jnp.float64),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(params, step):
    """Returns gradients that depend on the parameters and differ by step."""
    return jax.tree.map(lambda p: jnp.sin(3 * p + step) + 0.1 * p, params)


def walk(tx, params, state, steps=range(STEPS)):
    step = jax.jit(lambda params, state, i: tx.update(gradients(params, i), state, params))
    for i in steps:
        updates, state = step(params, state, i)
        params = optax.apply_updates(params, updates)
    return params, state


def by_hand(name, arguments, lr, start=0):
    """Returns the optimizer of optax with a stage's learning rates from its step `start` on."""
    package, _, function = name.rpartition(".")
    create = getattr(contrib if package.endswith("contrib") else optax, function)

    def schedule(step):
        return SCHEDULE.lr_at(lr, step - start, STEPS)

    if name in CONSTANT:
        return optax.inject_hyperparams(create)(learning_rate=schedule, **arguments)
    return create(schedule, **arguments)


def assert_close(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12), tree, expected)


def plans_of(rule, *trains, schedule=SCHEDULE):
    stages = [
        Stage(str(i), train, steps=STEPS, optimizer=rule, schedule=schedule, carry="keep")
        for i, train in enumerate(trains)
    ]
    return jaxft.plan(stages, params())


QUICK = ("optax.lion", "optax.contrib.muon", "optax.contrib.schedule_free_adamw")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(*item, marks=[pytest.mark.slow] * (item[0] not in QUICK), id=item[0])
        for item in OPTIMIZERS.items()
    ],
)
def test_trajectory_is_that_of_optax(name, arguments):
    start = params()
    (plan,) = plans_of(Optax(name, arguments), LRS)
    tx = plan.transform(steps_per_epoch=STEPS)
    ours, _ = walk(tx, start, tx.init(start))
    labels = {"body": {"w": "*", "b": "*"}, "conv": {"w": "*"}, "head": {"w": "head"}}
    theirs = optax.multi_transform(
        {group: by_hand(name, arguments, lr) for group, lr in LRS.items()}, labels
    )
    expected, _ = walk(theirs, start, theirs.init(start))
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(lambda a, b: a != b, ours, start))))
    assert_close(ours, expected)


@pytest.mark.slow
@each_optimizer
def test_carry_continues_state_of_groups_that_pause(name, arguments):
    """The head trains in the first and the last stage, the body in the others."""
    trains = {"head": 3e-2}, {"body": 1e-2}, {"head": 2e-2, "body": 1e-2}
    ours, state = params(), None
    for i, plan in enumerate(plans_of(Optax(name, arguments), *trains)):
        tx = plan.transform(steps_per_epoch=STEPS)
        fresh = tx.init(ours)
        state = fresh if state is None else jaxft.carry(state, fresh, park=plan.park)
        ours, state = walk(tx, ours, state, range(i * STEPS, (i + 1) * STEPS))
    expected = params()
    for group, first in {"head": 0, "body": 1}.items():
        # optax counts the steps of both stages; the schedule starts with each.
        half, state = expected[group], None
        for i, start in ((first, 0), (2, STEPS)):
            tx = by_hand(name, arguments, trains[i][group], start)
            state = tx.init(half) if state is None else state
            half, state = walk(tx, half, state, range(i * STEPS, (i + 1) * STEPS))
        expected[group] = half
    assert_close(ours, expected)


def test_learning_rate_follows_plateau_schedule():
    plateau = ReduceLROnPlateau(patience=0, factor=0.5)
    (plan,) = plans_of(Optax("optax.sign_sgd"), {"head": 0.5}, schedule=plateau)
    tx, start = plan.transform(), params()
    state = tx.init(start)
    for lr in (0.5, 0.5, 0.25):
        updates, state = tx.update(start, state, start)
        assert_close(updates["head"]["w"], -lr * jnp.sign(start["head"]["w"]))
        state = plan.after_epoch(state, loss=1.0)


def test_matrices_get_muon_and_other_parameters_adam():
    (plan,) = plans_of(Optax("optax.contrib.muon"), {"head": 1e-3, "body": 1e-2})
    groups = plan.transform().init(params()).inner_states
    inner = groups["body"].inner_state.rule.inner_states
    moments = {name: inner[name].inner_state[0].mu for name in ("muon", "adam")}
    hole = optax.MaskedNode()
    shapes = jax.tree.map(jnp.shape, moments)
    assert shapes == {
        "muon": {"body": {"w": (3, 4), "b": hole}, "conv": {"w": hole}, "head": {"w": hole}},
        "adam": {"body": {"w": hole, "b": (4,)}, "conv": {"w": hole}, "head": {"w": hole}},
    }


def test_schedule_free_evaluates_its_average():
    """The head is schedule-free; the evaluated weights of the body are those that step."""
    rule = Optax("optax.contrib.schedule_free_sgd", {"b1": 0.8})
    start = params()
    stage = Stage("all", {"head": Update(0.1, optimizer=rule), "body": 0.1}, 1)
    (plan,) = jaxft.plan(stage, start)
    tx = plan.transform()
    moved, state = walk(tx, start, tx.init(start))
    alone = contrib.schedule_free_sgd(0.1, b1=0.8)
    head, head_state = walk(alone, start["head"], alone.init(start["head"]))
    evaluated = evaluation_params(state, moved)
    assert_close(evaluated["head"], contrib.schedule_free_eval_params(head_state, head))
    assert np.abs(evaluated["head"]["w"] - moved["head"]["w"]).max() > 1e-3
    for name in ("body", "conv"):
        jax.tree.map(np.testing.assert_array_equal, evaluated[name], moved[name])
    assert_close(gradient_params(state, evaluated), moved)
    unmoved = gradient_params(tx.init(start), start)
    jax.tree.map(np.testing.assert_array_equal, unmoved, start)


@pytest.mark.parametrize("name", ["optax.adamw", "optax.contrib.schedule_free_adamw"])
def test_types_of_weights_and_state_stay(name):
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    (plan,) = plans_of(Optax(name), LRS)
    tx = plan.transform()
    state = tx.init(start)
    updates, new = jax.eval_shape(tx.update, start, state, start)
    types = [jax.tree.map(lambda x: x.dtype, tree) for tree in (start, state, updates, new)]
    assert types[:2] == types[2:]


ACCEPTS = r"no argument 'b3'; it accepts b1, b2, mu_dtype, weight_decay, mask"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("optax:lion", {"learning_rate": 1e-3}, "argument 'learning_rate' belongs to the stage"),
        ("optax.contrib.muon", {"adam_learning_rate": 1.0}, "'adam_learning_rate' belongs to the"),
        ("optax.lion", {"b3": 0.9}, ACCEPTS),
        ("optax.lion", {"b1": "high"}, "whose update fails: unsupported operand"),
        ("optax.lion", {"b1": optax.sgd}, "argument 'b1' is .*; it must be a number"),
        ("optax.lion", {"b1": [0.9]}, r"argument 'b1' is \[0.9\]; it must be a number"),
        ("optax:scale_by_lino", {}, "does not have; similar names are optax.scale_by_lion"),
        ("optax.muon", {}, "similar names are optax.contrib.muon"),
        ("optax.contrib.prodigi", {}, "similar names are optax.contrib.prodigy"),
        ("optax.no_such_optimizer", {}, "has no 'no_such_optimizer'"),
        ("optax", {}, "'optax': it is written MODULE:FUNCTION"),
        (
            "optax.contrib.momo",
            {},
            "'optax.contrib.momo', whose update fails: .*'value'.* loss",
        ),
        ("optax.polyak_sgd", {}, "'optax.polyak_sgd', whose update fails: .*'value'.* the loss"),
        ("optax.lbfgs", {}, "'optax.lbfgs', whose update fails: .*'value_fn'.* the loss"),
        ("optax.contrib.reduce_on_plateau", {}, "whose update fails: .*'value'.* the loss"),
        pytest.param(
            "optax.contrib.dpsgd",
            {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "seed": 0},
            "needs the gradient of each example",
            marks=pytest.mark.filterwarnings("ignore:.*seed:DeprecationWarning"),
        ),
        (
            "optax.contrib.galore",
            {},
            "has empty arrays, which a checkpoint cannot hold",
        ),
        ("optax.contrib.sam", {}, "calling it fails: TypeError: .*'optimizer'"),
        ("optax.scale_by_rprop", {}, "takes learning_rate and returns a transform that climbs"),
        ("test_optax_rule:complete", {}, "has no argument learning_rate and returns an optimizer"),
        ("math:sqrt", {}, "calling it fails: TypeError"),
        ("builtins:dict", {"x": 1}, r"returned {'x': 1}; it must return an optax transform"),
    ],
)
def test_optax_rejects(function, arguments, message):
    with pytest.raises(RecipeError, match=message):
        Optax(function, arguments)


def complete():
    return optax.sgd(0.1)


def test_dotted_name_is_the_name_with_a_colon():
    direction = Optax("optax.scale_by_adan", {"b1": 0.95})
    assert not direction.takes_lr
    assert Optax("optax.contrib.muon").takes_lr
    start = params()
    trees = []
    for rule in (direction, Optax("optax:scale_by_adan", {"b1": 0.95})):
        (plan,) = plans_of(rule, LRS)
        tx = plan.transform()
        trees.append(walk(tx, start, tx.init(start))[0])
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("name", ["optax.lion", "optax:scale_by_lion"])
def test_optax_takes_no_weight_decay_of_the_stage(name):
    stage = Stage("all", {"head": Update(0.1, optimizer=Optax(name), weight_decay=0.1)}, 1)
    with pytest.raises(RecipeError, match="its optimizer is an optax transform: put the decay"):
        jaxft.plan(stage, params())


def test_auto_rgn_refuses_complete_optimizers():
    stage = Stage("all", {"head": 0.1}, 1, optimizer=Optax("optax.lion"), auto_rgn=True)
    with pytest.raises(RecipeError, match=r"'all' has auto_rgn, .* 'optax.lion' takes one for"):
        jaxft.plan(stage, params())
