"""A user's project type-checks against jaxft, and its mistakes are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxft

CONFIG = """
[tool.mypy]
strict = true

[[tool.mypy.overrides]]
module = "optax"  # without types
ignore_missing_imports = true
"""

PROJECT = '''
"""Uses the trainer, own networks, own loops and every kind of public name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxft
from jaxft import (
    SGD, Adam, Console, EarlyStop, Focal, InterruptedRunError, LinearProbe, Recipe, Result, Stage,
    Update, data, finetune, gradients, logistic_regression, models, schedules, strategies, weights,
)

lrs = {"fc": 1e-3, "layer4": 1e-4}
recipe = Recipe(
    model="resnet18",
    weights="hf:timm/resnet18.tv_in1k",
    data="folder:data/hymenoptera",
    optimizer=SGD(momentum=0.9),
    loss=Focal(gamma=1.5),
    metrics=("my_module:brier",),
    stages=(
        Stage("probe", train={"fc": LinearProbe()}),
        Stage("head", train={"fc": 1e-3}, epochs=5, schedule=schedules.CosineAnnealingLR()),
        Stage("late", lrs, epochs=5, restore="last", norms={"layer4": "batch"}),
        Stage(
            "all",
            {"fc": Update(1e-4, optimizer=Adam()), re.compile(".*bias"): 1e-4, "*": 1e-5},
            epochs=10,
            until=EarlyStop("accuracy", patience=3),
        ),
    ),
)
blocks = models.create("resnet18", num_classes=2).block_patterns
unfreeze: tuple[Stage, ...] = strategies.gradual_unfreeze(blocks, 1e-3, epochs=2, carry="keep")


def train(images: np.ndarray, targets: np.ndarray, workdir: Path) -> float:
    source = data.arrays(images, targets, classes=["ant", "bee"])
    try:
        result: Result = finetune(recipe, workdir, data=source, console=Console(quiet=True))
    except InterruptedRunError as error:
        print(error.signal)
        raise
    print(weights.read(str(result.weights)))
    return result.score.accuracy


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def own_network(workdir: str) -> Path:
    model = models.Linen(CNN(), shape=(8, 8, 3), head="head")
    start = model.init(jax.random.key(0))
    return finetune(recipe, workdir, model=model, start=start).weights


def apply(model: models.Model, images: jax.Array) -> jax.Array:
    params, stats = model.init(jax.random.key(0))
    mask = np.ones(len(images), bool)
    logits, _ = model.apply(params, stats, images, norms="running", mask=mask)
    return logits


Params = dict[str, Any]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum((x @ params["body"] @ params["head"]) ** 2)


def own_loop(params: Params, x: jax.Array) -> Params:
    rules = {"head": "head"}
    labels = jaxft.label(params, rules)
    tx = jaxft.multi_transform({"head": optax.adam(1e-3)}, labels)
    trainable, frozen = jaxft.partition(params, labels)
    opt_state = tx.init(trainable)
    grads = jax.grad(lambda half: loss(jaxft.combine(half, frozen), x))(trainable)
    grads, norm = gradients.clip(grads, 1.0)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    params = jaxft.combine(optax.apply_updates(trainable, updates), frozen)
    print(jaxft.summary(params, labels), jaxft.paths(params), jaxft.FROZEN, jaxft.__version__, norm)
    return params


def own_stages(params: Params, x: jax.Array, stages: Sequence[Stage]) -> Params:
    opt_state = None
    for plan in jaxft.plan(stages, params):
        tx = plan.transform(Adam(), steps_per_epoch=10)
        fresh = tx.init(params)
        opt_state = jaxft.carry(opt_state, fresh, park=plan.park) if opt_state else fresh
        trainable, frozen = jaxft.partition(params, plan.labels)
        for _ in range(plan.stage.length(10)):
            grads = jax.grad(lambda half: loss(jaxft.combine(half, frozen), x))(trainable)
            updates, opt_state = tx.update(grads, opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        params = jaxft.combine(trainable, frozen)
    return params


def probe(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    (fit,) = logistic_regression(features, targets, 3, c=(0.1,))
    return fit.kernel
'''

MISTAKES = """
import jax

import jaxft
from jaxft import SGD, Recipe, Stage, Stge, finetune, models, strategies  # attr-defined

Stage("head", {"fc": 1e-3}, epochs="3")  # arg-type
Stage("head", {"fc": 1e-3}, epochs=3, restore="first")  # arg-type
Stage("head", {"fc": 1e-3}, epoch=3)  # call-arg
Stage("head", {"fc": "1e-3"}, epochs=3)  # dict-item
SGD(momentum="high")  # arg-type
strategies.full(1e-3, epochs=3, restore="first")  # arg-type
recipe = Recipe(model="resnet18", data="digits", stages=(), batch_size="32")  # arg-type
finetune(recipe, 3)  # arg-type
finetune(recipe, "run", console=print)  # arg-type
finetune(recipe, "run", on_epoch_end="plot")  # arg-type
finetune(recipe, "run").accuracy  # attr-defined
jaxft.label({}, {"fc": 1})  # arg-type
jaxft.tune(recipe, "run")  # attr-defined


def apply(model: models.Model, images: jax.Array) -> jax.Array:
    return model.apply({}, {}, images, norms="eval")[0]  # arg-type
"""


@pytest.mark.slow  # where the cache of mypy is empty
def test_mypy_accepts_a_users_project_and_finds_its_mistakes(tmp_path, request):
    files = {"pyproject.toml": CONFIG, "project.py": PROJECT, "mistakes.py": MISTAKES}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cache = request.config.cache.mkdir("jaxft_mypy")
    root = Path(jaxft.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={cache}", "project.py", "mistakes.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\S+):(\d+): error: .*\[(.+)\]$", done.stdout, re.M)
    expected = [
        ("mistakes.py", str(number), line.rpartition("# ")[2])
        for number, line in enumerate(MISTAKES.splitlines(), 1)
        if "# " in line
    ]
    assert found == expected, done.stdout + done.stderr
