"""The recipes of configs/, shrunk to a dozen convolutions and ten steps a stage, in float64.

`PYTORCH` in tests/record_recipes.py has the same, written in PyTorch.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from drawn import weight
from narrow import narrowed

from jaxft import recipe_file as recipes
from jaxft.optim.schedules import CosineAnnealingLR, MultiStepLR, StepLR, Warmup
from jaxft.parity.jax_steps import jax_steps, network, programs
from jaxft.parity.step import Rows
from jaxft.weights.key_maps import torch_tensors

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parents[1] / "golden" / "recipes.npz"
SIDE, ROWS, LAST = 33, 8, 5  # pixels, images of a batch, of an epoch's last batch
EPOCHS, ALONE = 5, 10  # of two batches: where there are several stages, and of the only one

# config: (norms: None is its own, carry: None is its own) of each variant
VARIANTS = {
    "seed": [(norms, carry) for norms in "ABDE" for carry in ("reset", "keep")],
    "pytorch_tutorial_finetune": [(None, None), ("E", None)],
    "pytorch_tutorial_extractor": [("A", None), ("B", None), ("D", None)],
    "d2l_hotdog": [(None, None), ("E", None)],
    "lightning_milestones": [(None, None), (None, "reset"), ("B", None)],
    "fastai_fine_tune": [(None, None), (None, "keep")],
    "keras_guide": [(None, None), ("E", "keep"), ("B", None)],
    "ulmfit": [(None, None), (None, "reset"), ("E", None)],
    "lp_ft": [(None, None), ("B", None)],
    "surgical": [(None, None), ("A", None), ("B", None)],
    "bit": [(None, None), ("E", None)],
    "l2_sp": [(None, None), ("E", None)],
    "layer_decay": [(None, None), ("E", None)],
    "torchvision_reference": [(None, None)],
    "torchvision_reference_v2": [(None, None)],
}
CASES = {
    f"{name}, {norms or 'its own'}, {carry or 'its own'}": (name, norms, carry)
    for name, variants in VARIANTS.items()
    for norms, carry in variants
}
# Shorter, for the number of steps is.
SCHEDULES = {
    "bit": Warmup(4, then=MultiStepLR((1, 4, 7), by="step"), start_factor=0.0),
    "l2_sp": MultiStepLR((8,), by="step"),
    "torchvision_reference": StepLR(3),
    "torchvision_reference_v2": Warmup(2, then=CosineAnnealingLR(), start_factor=0.01),
    "layer_decay": Warmup(2, then=CosineAnnealingLR(), start_factor=0.01),
}

# Rates in proportion to the batch, where those of a large one would leave eight images no course.
PROPORTIONS = {
    "l2_sp": 1 / 8,
    "torchvision_reference": 1 / 32,
    "torchvision_reference_v2": 1 / 128,
}


def shrunk(config, norms=None, carry=None):
    """A config's recipe over small batches, with norm modes and carrying of another's."""
    recipe = recipes.read(CONFIGS / f"{config}.py")
    stages = [stage for stage in recipe.stages if not stage.solver]
    epochs = EPOCHS if len(stages) > 1 else ALONE
    schedule = SCHEDULES.get(config)

    def short(stage):
        train = {
            pattern: replace(update, lr=update.lr * PROPORTIONS.get(config, 1))
            for pattern, update in stage.updates.items()
        }
        own = {"schedule": schedule} if schedule else {}
        own |= {"norms": norms} if norms else {}
        own |= {"carry": carry} if carry else {}
        own |= {"epochs": epochs, "steps": None, "batch_size": None, "mixup": None, "ema": None}
        return replace(stage, train=train, **own)

    return replace(
        recipe,
        weights=None,
        head="fresh",
        stride_in_1x1=False,
        batch_size=ROWS,
        dropout=0.0,
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        stages=tuple(map(short, stages)),
    )


def epoch(recipe):
    """Two batches, float64."""
    rng = np.random.default_rng(0)
    classes = 2 if recipe.binary else 3
    # Of low contrast: the drawn statistics fit no images, and would make large activations of
    # others, with which float32 soon goes ways of its own.
    return [
        Rows(rng.standard_normal((count, SIDE, SIDE, 3)) / 2, rng.integers(0, classes, count))
        for count in (ROWS, LAST)
    ]


def narrow_network(recipe):
    """The recipe's network, narrow."""
    with narrowed(recipe.stages):
        return network(recipe, 2 if recipe.binary else 3)


def start(config, name, shape):
    """A tensor of the network at the start, in torch's layout."""
    zero = config == "bit" and name.startswith("fc.")  # that recipe's head starts there
    return np.zeros(shape) if zero else weight(name, shape)


def told(steps, lengths):
    """A training in few numbers: each step's loss and rates, and each stage's end.

    Each tensor counts by its norm and by its product with a random one of its size.
    """
    steps = iter(steps)
    for index, length in enumerate(lengths):
        losses, rates = [], []
        for step in islice(steps, length):
            losses.append(step.loss["loss"])
            rates.append([step.rates[name] for name in sorted(step.rates)])
        yield f"{index}/loss", np.array(losses)
        yield f"{index}/rates", np.array(rates)
        for part in ("params", "stats", "moments"):
            yield f"{index}/{part}", summaries(getattr(step, part))


def summaries(arrays):
    """[tensor, 2], in the order of their names."""
    rows = []
    for name in sorted(arrays):
        array = arrays[name].astype(np.float64).ravel()
        direction = np.random.default_rng(array.size).choice([-1.0, 1.0], array.size)
        rows.append([np.linalg.norm(array), direction @ array])
    return np.array(rows).reshape(-1, 2)


def train(case, dtype="float64", steps=None):
    """What our half tells of a case; of its first stages, if so many steps are enough."""
    config, norms, carry = CASES[case]
    recipe = shrunk(config, norms, carry)
    model = narrow_network(recipe)
    with jax.enable_x64(dtype == "float64"):
        named = torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))
        begin = jax.tree.map(
            lambda t: jnp.asarray(t.from_torch(start(config, t.name, t.shape)), dtype), named
        )
        rows = [Rows(x.images.astype(dtype), x.targets) for x in epoch(recipe)]
        stages = programs(recipe, model, begin, rows)
        lengths = [stage.steps for stage in stages]
        enough = [n for i, n in enumerate(lengths) if steps is None or sum(lengths[:i]) < steps]
        return dict(told(jax_steps(stages, begin, rows, watch=False), enough))
