"""Re-estimated running statistics, against `torch.optim.swa_utils.update_bn` and NumPy."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from narrow import Narrow

from jaxft import data, models
from jaxft.batch_sizes import batch_sizes
from jaxft.data import Preprocessing
from jaxft.devices import Devices
from jaxft.labels import paths
from jaxft.models.networks.resnet import ResNet
from jaxft.models.nnx_adapter import NNXModel
from jaxft.models.norm_modes import norm_layers
from jaxft.train.norm_statistics import statistics_step
from jaxft.weights import from_state_dict

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
IMAGES = data.arrays(PIXELS, np.arange(13) % 3, ["a", "b", "c"])
VIEW = Preprocessing(image_size=32, resize_size=32)
NORMALIZED = np.asarray(VIEW.normalize(PIXELS), np.float64)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x).mean((1, 2)))


USERS = {
    "Linen": models.Linen(LinenNet(), shape=(32, 32, 3), head="head"),
    "NNX": models.NNX(NNXNet, shape=(32, 32, 3), head="head"),
}


def reestimated(model, params, stats, layers, batch_size=5):
    """Returns the statistics after batches of 5, 5 and 3 images."""
    devices = Devices()
    sizes = batch_sizes(model, devices, len(IMAGES), batch_size)
    step = statistics_step(model, VIEW, devices, layers, examples=sizes.examples)
    batches = data.eval_batches(
        IMAGES, VIEW, batch_size=batch_size, workers=0, rows=sizes.rows, last_rows=sizes.last_rows
    )
    for number, batch in enumerate(batches, 1):
        stats = step(params, stats, devices.batch(batch), np.int32(number))
    return stats


@pytest.mark.parametrize("name", USERS)
def test_statistics_of_users_networks_are_means_over_batches(name):
    """Flax's running variance is biased."""
    params, stats = USERS[name].init(jax.random.key(0))
    found = reestimated(USERS[name], params, stats, {"norm"})["norm"]
    batches = np.split(NORMALIZED, (5, 10))
    for statistic in ("mean", "var"):
        expected = np.mean([getattr(x, statistic)((0, 1, 2)) for x in batches], 0)
        np.testing.assert_allclose(found[statistic], expected, rtol=1e-5, err_msg=statistic)


def test_last_batch_of_a_single_image_is_left_out_without_a_mask():
    params, stats = USERS["Linen"].init(jax.random.key(0))
    found = reestimated(USERS["Linen"], params, stats, {"norm"}, batch_size=6)["norm"]
    expected = np.mean([x.mean((0, 1, 2)) for x in np.split(NORMALIZED[:12], 2)], 0)
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5)


def narrow_resnet():
    config = Narrow("imagenet", (1, 1, 1, 1), num_classes=3)
    return NNXModel("resnet18", ResNet, config)


@pytest.mark.slow
@pytest.mark.smoke
def test_statistics_equal_torchs_update_bn():
    torch = pytest.importorskip("torch")
    from torch_network import ResNet as TorchResNet

    torch.manual_seed(0)
    module, model = TorchResNet(), narrow_resnet()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    params, stats = from_state_dict(module.state_dict(), model)
    found = reestimated(model, params, stats, norm_layers(stats))
    images = torch.from_numpy(NORMALIZED.transpose(0, 3, 1, 2))
    torch.optim.swa_utils.update_bn(images.split(5), module.double())
    _, expected = from_state_dict(module.float().state_dict(), model)
    for path, ours, theirs in zip(
        paths(found), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_layers_that_are_not_reestimated_keep_their_statistics():
    model = narrow_resnet()
    params, stats = model.init(jax.random.key(0))
    found = reestimated(model, params, stats, {"layer4.0.bn2"})
    for path, old, new in zip(
        paths(stats), jax.tree.leaves(stats), jax.tree.leaves(found), strict=True
    ):
        assert np.array_equal(old, new) == (not path.startswith("layer4.0.bn2")), path
