"""Names, shapes and preprocessing of timm's CNNs: recorded always, timm's own if it is here."""

import json

import jax
import pytest
import record_timm
from record_listings import LISTINGS, NAMES, record, summary

from jaxft.models import create
from jaxft.weights.key_maps import torch_tensors
from jaxft.weights.preprocessing_config import find_preprocessing

RECORDED = json.loads(LISTINGS.read_text())


QUICK = ("seresnet18", "ecaresnet26t", "regnety_002", "efficientnet_b0", "mobilenetv3_small_050")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NAMES]
)
def test_cnn_tensors_and_preprocessing_are_timms(name, tmp_path):
    model = create(name, num_classes=record_timm.NUM_CLASSES)
    tensors = jax.tree.leaves(torch_tensors(*jax.eval_shape(model.init, jax.random.key(0))))
    recorded = dict(RECORDED[name])
    (tmp_path / "config.json").write_text(json.dumps(recorded.pop("config")))
    assert summary({t.name: t.shape for t in tensors}) == recorded
    assert model.preprocessing == find_preprocessing(tmp_path / "model.safetensors")
    assert model.torch_library == "timm"


@pytest.mark.slow
@pytest.mark.skipif(not record_timm.timm_is_here(), reason="needs the torch extra")
def test_recorded_listings_are_timms():
    assert {*RECORDED} == {*NAMES}
    for name in NAMES:
        assert json.loads(json.dumps(record(name))) == RECORDED[name], name
