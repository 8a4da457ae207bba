"""Complete optax optimizers are refused where jaxft applies the learning rate itself."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import jaxft
from jaxft import RecipeError, Stage, Update, schedules
from jaxft.optim.complete_optimizer import is_complete

PARAMS = {"body": {"w": jnp.ones((3, 2))}, "head": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}}
MASK = jax.tree.map(lambda p: jnp.ndim(p) > 1, PARAMS)

COMPLETE = {
    "sgd": optax.sgd(0.1),
    "warmup from 0": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)),
    "inject_hyperparams": optax.inject_hyperparams(optax.lion)(learning_rate=0.1),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 16).gradient_transformation(),
    "sam": contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "schedule_free": contrib.schedule_free_adamw(1e-3),
    "prodigy": contrib.prodigy(),
    "muon": contrib.muon(1e-3),
}
DIRECTIONS = {
    "identity": optax.identity(),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_adopt": contrib.scale_by_adopt(),
    "centralize": optax.centralize(),
    "chain": optax.chain(optax.clip(1.0), optax.trace(0.9), optax.add_decayed_weights(0.1)),
    "inject_hyperparams": optax.inject_hyperparams(optax.scale_by_adam)(b1=0.5),
}
UNKNOWN = {
    "mask of other parameters": optax.adamw(0.1, mask=MASK),
    "value of the loss": optax.polyak_sgd(),
    "no update": optax.set_to_zero(),
}
CASES = [(COMPLETE, True), (DIRECTIONS, False), (UNKNOWN, None)]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        pytest.param(transform, expected, id=f"{name}-{expected}")
        for transforms, expected in CASES
        for name, transform in transforms.items()
    ],
)
def test_is_complete(transform, expected):
    assert is_complete(transform) is expected


def test_is_complete_under_jit():
    def init(params):
        assert is_complete(optax.sgd(0.3))
        return params

    jax.eval_shape(init, PARAMS)


@pytest.mark.parametrize(
    "plan",
    [
        lambda tx: jaxft.plan(Stage("late", {"head": 0.1}, 1, optimizer=tx), PARAMS),
        lambda tx: jaxft.plan(Stage("late", {"head": Update(0.1, optimizer=tx)}, 1), PARAMS),
        lambda tx: jaxft.plan(Stage("late", {"head": 0.1}, 1), PARAMS)[0].transform(tx),
    ],
    ids=["stage", "update", "default"],
)
def test_plan_refuses_complete_optimizers(plan):
    message = r"stage 'late': the optimizer of 'head' includes a learning rate .*scale_by_adam\(\)"
    with pytest.raises(RecipeError, match=message):
        plan(optax.sgd(0.1))


def test_init_refuses_complete_optimizers_that_need_the_parameters():
    """A mask of the parameters fits no other tree."""
    (plan,) = jaxft.plan(
        Stage("late", {"head": 0.1}, 1, optimizer=optax.adamw(0.1, mask=MASK)), PARAMS
    )
    with pytest.raises(RecipeError, match="the optimizer of a stage includes a learning rate"):
        jax.eval_shape(plan.transform().init, PARAMS)
    direction = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=MASK))
    (plan,) = jaxft.plan(Stage("late", {"head": 0.1}, 1, optimizer=direction), PARAMS)
    tx = plan.transform()
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert jnp.all(updates["head"]["w"] < 0)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (optax.cosine_decay_schedule(0.1, 10), r"Stage\(..., schedule=...\)"),
        (schedules.CosineAnnealingLR(), r"Stage\(..., schedule=...\)"),
        (optax.adam(0.1), r"Write an optimizer as Update\(1e-3, optimizer=...\)"),
    ],
    ids=["optax schedule", "schedule", "optimizer"],
)
def test_learning_rate_that_is_no_number_names_the_right_argument(lr, message):
    with pytest.raises(RecipeError, match=f"the learning rate of 'head' is .*{message}"):
        Stage("late", {"head": lr}, 1)
