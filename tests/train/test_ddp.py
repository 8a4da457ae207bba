"""Replicas within a batch against torch's `DistributedDataParallel`, recorded in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import weight

from jaxft import SGD, Stage, models, plan
from jaxft.data import Batch
from jaxft.train.train_step import StepConfig, TrainState, train_step
from jaxft.weights.key_maps import torch_tensors

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "ddp.npz"
MODEL = models.create("cifar_resnet8", num_classes=10)
STEPS, RATE = 5, 0.05


def batch(step):
    """Eight images and their classes; the halves differ in brightness, so in their statistics."""
    rng = np.random.default_rng([2, step])
    image = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    image[4:] //= 2
    return Batch(image, rng.integers(0, 10, 8).astype(np.int32), np.ones(8, bool))


def normalized(image):
    return image / 127.5 - 1.0


def sample(array):
    """Returns at most 64 evenly spaced elements."""
    return array.ravel()[np.linspace(0, array.size - 1, min(64, array.size)).astype(int)]


class Wide:
    """Preprocessing in float64."""

    @staticmethod
    def normalize(images):
        return normalized(images.astype(jnp.float64))


def train(replicas):
    """Maps torch's names to samples of parameters and statistics; also returns the losses."""
    tensors = torch_tensors(*jax.eval_shape(MODEL.init, jax.random.key(0)))
    start = jax.tree.map(lambda t: jnp.asarray(t.from_torch(weight(t.name, t.shape))), tensors)
    params, stats = start
    transform = plan([Stage("all", {"*": RATE}, 1)], params)[0].transform(SGD(momentum=0.9))
    step = train_step(
        StepConfig(
            model=MODEL, transform=transform, preprocessing=Wide(), norms="batch", replicas=replicas
        )
    )
    frozen = jax.tree.map(lambda _: None, params)
    state, losses = TrainState(params, stats, transform.init(params)), []
    for k in range(STEPS):
        state, sums = step(state, frozen, batch(k), jax.random.key(0))
        losses.append(sums.metrics.loss / sums.metrics.examples)
    trained = jax.tree.map(lambda t, x: t.to_torch(x), tensors, (state.trainable, state.stats))
    names = [t.name for t in jax.tree.leaves(tensors)]
    arrays = dict(zip(names, map(sample, jax.tree.leaves(trained)), strict=True))
    return {**arrays, "losses": np.stack(losses)}


def test_replica_statistics_train_as_torch_ddp(golden):
    with jax.enable_x64(True):
        trained = train(replicas=2)
    assert trained.keys() == golden.keys()
    for name, array in golden.items():
        np.testing.assert_allclose(trained[name], array, rtol=1e-9, atol=1e-10, err_msg=name)


def test_global_statistics_differ_from_torch_ddp(golden):
    with jax.enable_x64(True):
        trained = train(replicas=1)
    assert abs(trained["losses"][0] - golden["losses"][0]) > 1e-3
    assert np.abs(trained["bn1.running_mean"] - golden["bn1.running_mean"]).max() > 1e-2


def test_recording_of_ddp_is_torchs(golden, tmp_path):
    pytest.importorskip("torch")
    from record_ddp import record

    for name, array in record(tmp_path).items():  # to 1e-9, for other machines round otherwise
        np.testing.assert_allclose(array, golden[name], rtol=1e-9, atol=1e-10, err_msg=name)
