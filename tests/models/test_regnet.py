"""RegNets: widths and torchvision's weights; test_timm.py compares outputs with timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_golden

from jaxft import weights
from jaxft.models import create
from jaxft.models.layers import Rngs
from jaxft.models.networks.regnet import Block
from jaxft.models.networks.regnet_variants import KEY_MAP

STAGES = {
    "regnetx_002": ((24, 1), (56, 1), (152, 4), (368, 7)),
    "regnety_032": ((72, 2), (216, 5), (576, 13), (1512, 1)),
    "regnetx_004_tv": ((32, 1), (64, 2), (160, 7), (400, 12)),
}


@pytest.mark.parametrize(("name", "stages"), STAGES.items(), ids=STAGES)
def test_regnet_stages_are_those_of_the_paper(name, stages):
    assert create(name).config.stages == stages


RENAMED = {
    "stem.0.weight": "stem.conv.weight",
    "trunk_output.block1.block1-0.proj.1.bias": "s1.b1.downsample.bn.bias",
    "trunk_output.block3.block3-11.f.a.0.weight": "s3.b12.conv1.conv.weight",
    "trunk_output.block4.block4-0.f.se.fc2.bias": "s4.b1.se.fc2.bias",
    "fc.weight": "head.fc.weight",
    "s1.b1.conv1.conv.weight": "s1.b1.conv1.conv.weight",
}


@pytest.mark.parametrize(("theirs", "ours"), RENAMED.items())
def test_regnet_key_map_renames_torchvisions_tensors(theirs, ours):
    assert KEY_MAP.rename(theirs) == ours


@pytest.mark.slow
@pytest.mark.skipif(not record_golden.originals_are_here(), reason="needs the torch extra")
@pytest.mark.parametrize(
    ("theirs", "ours"), [("regnet_x_400mf", "regnetx_004_tv"), ("regnet_y_400mf", "regnety_004")]
)
def test_regnet_loads_torchvisions_weights(theirs, ours):
    import torch

    module = record_golden.import_torchvision().models.get_model(theirs).eval()
    params, stats = weights.from_state_dict(module.state_dict(), model := create(ours))
    images = record_golden.images(64)
    expected = module(torch.from_numpy(images)).detach().numpy()
    batch = jnp.asarray(images.transpose(0, 2, 3, 1))
    logits, _ = jax.jit(lambda *args: model.apply(*args, norms="running"))(params, stats, batch)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_regnet_initialisation_equals_timms():
    block = Block(368, 368, 1, 0.0, create("regnety_002").config, Rngs(jax.random.key(0)))
    std = float(block.conv2.conv.kernel[...].std())
    assert std == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.05)
    assert not block.conv3.bn.scale[...].any()
    assert not block.se.fc1.bias[...].any()
