"""Whole stages of a CIFAR ResNet-8 in float64, step by step, with torch's names.

The recorders of tests/record_stage_steps.py run the same cases in torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from drawn import weight
from faults import replaced
from test_ddp import MODEL, Wide, batch

from jaxft import SGD, Recipe, data, plan
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch
from jaxft.devices import Devices
from jaxft.labels import combine
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.stage_program import build_program
from jaxft.weights.key_maps import torch_tensors

STEPS, ROWS, LAST = 4, 8, 5  # of a stage, of a batch, of a stage's last batch
OPTIMIZER = SGD(momentum=0.9)


def samples(tensors):
    """Returns eight evenly spaced elements of each tensor [tensors 8], sorted by name."""
    flat = [np.asarray(tensors[name]).ravel() for name in sorted(tensors)]
    return np.stack([x[np.linspace(0, x.size - 1, 8).astype(int)] for x in flat])


def assert_as_recorded(arrays, golden):
    """Asserts equality to 1e-9: machines round differently."""
    assert arrays.keys() == golden.keys()
    for name, array in golden.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-9, atol=1e-10, err_msg=name)


def rows(step):
    """Returns the images and classes of a global step."""
    image, target, _ = batch(step)
    real = LAST if step % STEPS == STEPS - 1 else ROWS
    return image[:real], target[:real]


def padded(step):
    image, target = rows(step)
    spare = ROWS - len(target)
    image = np.concatenate([image, np.full((spare, *image.shape[1:]), 77, np.uint8)])
    return Batch(image, np.pad(target, (0, spare)), np.arange(ROWS) < ROWS - spare)


def normalizing_in_float64():
    """Replaces the normalization of images, which is in float32, by that of torch's recorders."""
    return replaced("normalize", lambda _, preprocessing, images: Wide.normalize(images))


def train(stages):
    """Maps `stage/name` to final tensors and to records of the steps; see `samples`."""
    with normalizing_in_float64(), jax.enable_x64(True):
        return dict(_train(stages))


def _train(stages):
    like = torch_tensors(*jax.eval_shape(MODEL.init, jax.random.key(0)))
    start = jax.tree.map(lambda t: jnp.asarray(t.from_torch(weight(t.name, t.shape))), like)
    source = data.arrays(*rows(0), classes="0123456789")
    recipe = Recipe(
        model=MODEL.name, data="random", stages=stages, optimizer=OPTIMIZER, batch_size=ROWS,
        image_size=16,
    )  # fmt: skip
    at = Snapshot(*start, None)
    for index, stage in enumerate(plan(stages, start[0])):
        stage = build_program(index, stage, recipe, MODEL, source, Devices(), start)
        at = at._replace(opt_state=stage.transform().init(at.params))
        compiled = compile_stage(stage, at)
        state, frozen = stage.state(at)
        state, records = compiled.copy(state), []
        origin = start[0] if stage.plan.stage.anchor else None
        for number in range(index * STEPS, (index + 1) * STEPS):
            step = np.int32(number)
            state, record = compiled.step(state, frozen, padded(number), step, origin)
            records.append(record)
        at = Snapshot(combine(state.trainable, frozen), state.stats, state.opt_state)
        yield f"{index}/end", _samples(like, at.params, at.stats)
        if state.average:
            averages, stats = state.average
            yield f"{index}/average", _samples(like, combine(averages, frozen), stats)
        for group in records[0].gradient_norms:
            norms = [record.gradient_norms[group] for record in records]
            yield f"{index}/norms/{group}", np.stack(norms)
        losses = [record.metrics.loss / record.metrics.examples for record in records]
        yield f"{index}/losses", np.stack(losses)


def _samples(like, params, stats):
    arrays = jax.tree.map(lambda t, x: t.to_torch(x), like, (params, stats))
    named = zip(*map(jax.tree.leaves, (like, arrays)), strict=True)
    return samples({tensor.name: array for tensor, array in named})
