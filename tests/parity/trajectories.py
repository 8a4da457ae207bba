"""The recipes of configs/ with narrow networks and ten steps per stage, in float64.

`torch_recipes.py` has the same recipes in PyTorch.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from drawn import weight
from narrow import narrowed, shallow

from jaxft import recipe_file as recipes
from jaxft.optim.schedules import CosineAnnealingLR, MultiStepLR, StepLR, Warmup
from jaxft.parity.jax_steps import jax_steps, network, programs
from jaxft.parity.step import NumpyBatch
from jaxft.weights.key_maps import torch_tensors

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parents[1] / "golden" / "recipes.npz"
SIDE = 33  # pixels
BATCH_SIZE, LAST_BATCH_SIZE = 8, 5
EPOCHS, SINGLE_STAGE_EPOCHS = 5, 10  # of two batches each

# Each recipe as it is; `seed` also with each norm mode, and with either carry.
# case: (config, norms, carry); None keeps the recipe's value
CASES = {
    f"seed, {norms}, {carry}": ("seed", norms, carry)
    for norms, carry in (
        *(("batch", "reset"), ("frozen_eval", "keep")),
        *(("frozen_batch", "reset"), ("eval", "keep")),
    )
}
CASES |= {
    f"{config}, its own, its own": (config, None, None)
    for config in (
        *("pytorch_tutorial_finetune", "pytorch_tutorial_extractor", "d2l_hotdog"),
        *("lightning_milestones", "fastai_fine_tune", "keras_guide", "ulmfit", "lp_ft"),
        *("surgical", "bit", "l2_sp", "layer_decay"),
        *("torchvision_reference", "torchvision_reference_v2"),
        *("vit_mae", "convnext_finetune", "dinov2_lp_ft", "bitfit", "vit_gradual_unfreezing"),
    )
}
# Shorter schedules, because the stages are shorter.
SCHEDULES = {
    "bit": Warmup(4, then=MultiStepLR((1, 4, 7), by="step"), start_factor=0.0),
    "l2_sp": MultiStepLR((8,), by="step"),
    "torchvision_reference": StepLR(3),
    "torchvision_reference_v2": Warmup(2, then=CosineAnnealingLR(), start_factor=0.01),
    "layer_decay": Warmup(2, then=CosineAnnealingLR(), start_factor=0.01),
    "vit_mae": Warmup(4, then=CosineAnnealingLR(by="step"), start_factor=0.0),
}

# Factors for learning rates that would make a batch of eight images diverge.
LR_FACTORS = {
    "l2_sp": 1 / 8,
    "torchvision_reference": 1 / 32,
    "torchvision_reference_v2": 1 / 128,
}


def small_recipe(config, norms=None, carry=None):
    """A config's recipe with small batches, and with these norm modes and carry if given."""
    recipe = recipes.read(CONFIGS / f"{config}.py")
    stages = [stage for stage in recipe.stages if not stage.linear_probe]
    epochs = EPOCHS if len(stages) > 1 else SINGLE_STAGE_EPOCHS
    schedule = SCHEDULES.get(config)

    def small_stage(stage):
        train = {
            pattern: replace(update, lr=update.lr * LR_FACTORS.get(config, 1))
            for pattern, update in shallow(stage.updates).items()
        }
        changes = {"schedule": schedule} if schedule else {}
        changes |= {"norms": norms} if norms else {}
        changes |= {"carry": carry} if carry else {}
        changes |= {"epochs": epochs, "steps": None, "batch_size": None, "mixup": None, "ema": None}
        return replace(stage, train=train, **changes)

    return replace(
        recipe,
        weights=None,
        head="fresh",
        stride_in_1x1=False,
        batch_size=BATCH_SIZE,
        drop_last=False,
        image_size=SIDE,
        resize_size=SIDE,
        dropout=0.0,
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        random_erasing=0.0,
        stages=tuple(map(small_stage, stages)),
    )


def epoch(recipe):
    """The two batches of an epoch, in float64."""
    rng = np.random.default_rng(0)
    classes = 2 if recipe.binary else 3
    # Low contrast: the random statistics do not fit the images, and with large activations float32
    # soon diverges from float64.
    return [
        NumpyBatch(rng.standard_normal((count, SIDE, SIDE, 3)) / 2, rng.integers(0, classes, count))
        for count in (BATCH_SIZE, LAST_BATCH_SIZE)
    ]


def narrow_network(recipe):
    """The recipe's network with few channels."""
    with narrowed(recipe.stages):
        return network(recipe, 2 if recipe.binary else 3)


def start(config, name, shape):
    """An initial tensor of the network, in torch's layout."""
    zero = config == "bit" and name.startswith("fc.")  # that recipe's head starts from zeros
    return np.zeros(shape) if zero else weight(name, shape)


def summarize(steps, lengths):
    """Summarises a training: loss and learning rates of each step, tensors after each stage.

    Each tensor is represented by its norm and by its product with a random tensor.
    """
    steps = iter(steps)
    for index, length in enumerate(lengths):
        losses, lrs = [], []
        for step in islice(steps, length):
            losses.append(step.loss["loss"])
            lrs.append([step.lr[name] for name in sorted(step.lr)])
        yield f"{index}/loss", np.array(losses)
        yield f"{index}/lr", np.array(lrs)
        for part in ("params", "stats", "moments"):
            yield f"{index}/{part}", summaries(getattr(step, part))


def summaries(arrays):
    """Norm and random projection of each array, `[array, 2]`, sorted by name."""
    rows = []
    for name in sorted(arrays):
        array = arrays[name].astype(np.float64).ravel()
        direction = np.random.default_rng(array.size).choice([-1.0, 1.0], array.size)
        rows.append([np.linalg.norm(array), direction @ array])
    return np.array(rows).reshape(-1, 2)


def train(case, dtype="float64", steps=None):
    """Summarises jaxft's training of a case; with `steps`, only of the stages needed for them."""
    config, norms, carry = CASES[case]
    recipe = small_recipe(config, norms, carry)
    model = narrow_network(recipe)
    with jax.enable_x64(dtype == "float64"):
        tensors = torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))
        initial = jax.tree.map(
            lambda t: jnp.asarray(t.from_torch(start(config, t.name, t.shape)), dtype), tensors
        )
        batches = [NumpyBatch(x.images.astype(dtype), x.targets) for x in epoch(recipe)]
        stages = programs(recipe, model, initial, batches)
        lengths = [stage.steps for stage in stages]
        needed = [n for i, n in enumerate(lengths) if steps is None or sum(lengths[:i]) < steps]
        return dict(summarize(jax_steps(stages, initial, batches, record_outputs=False), needed))
