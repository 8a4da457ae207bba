"""Files of LoRA adapters: saved and loaded again, and recordings of PEFT with the same files."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft import Stage, WeightsError
from jaxft.models import create
from jaxft.weights.key_maps import torch_tensors
from jaxft.weights.lora_file import load_lora, save_lora

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn import weight
from narrow import narrowed

GOLDEN = Path(__file__).parents[1] / "golden" / "peft.npz"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# The path of the stem, conv1, is the end of many other paths, and layer3 has several ranks.
RANKS = {"conv1": 1, "layer3.0.conv1": 3, "layer3": 2, "layer4.0.downsample": 2}
ALPHAS = {"ranks": None, "alpha": 6.0}
ALL_LAYERS = (Stage("all", {"*": 1e-3}, epochs=1),)
IMAGES = np.random.default_rng(0).standard_normal((2, 33, 33, 3))


def network():
    """A narrow ResNet-50 with the parameters of `torch_network.ResNet` in `record_peft.py`."""
    with narrowed(ALL_LAYERS):
        model = create("resnet50", num_classes=3, dtype="float64")
    tensors = torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))
    trees = jax.tree.map(lambda t: jnp.asarray(t.from_torch(weight(t.name, t.shape))), tensors)
    return model, *trees


def trained(params):
    """Adapters whose `lora_b` is not zero, and a head with other values."""
    adapters = jaxft.lora(params, RANKS, key=jax.random.key(0))
    for path, adapter in adapters.items():
        adapter["lora_b"] = jnp.asarray(weight(path, adapter["lora_b"].shape))
    return adapters, jax.tree.map(lambda x: x + 0.5, params["fc"])


def save_ours(folder):
    """Saves the adapters for `record_peft.py`."""
    with jax.enable_x64(True):
        _, params, _ = network()
        adapters, head = trained(params)
        for name, alpha in ALPHAS.items():
            save_lora(folder / name, adapters, alpha=alpha, trained={"fc": head})


def merged_logits(adapters, alpha, **trained):
    model, params, stats = network()
    params = {**jaxft.merge_lora(params, adapters, alpha=alpha), **trained}
    return model.apply(params, stats, jnp.asarray(IMAGES), norms="running")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALPHAS)
def test_peft_computes_the_merged_network_from_saved_adapters(name, golden, tmp_path):
    """The recorded logits are PEFT's, with the files that `save_ours` writes."""
    with jax.enable_x64(True):
        _, params, _ = network()
        adapters, head = trained(params)
        logits = merged_logits(adapters, ALPHAS[name], fc=head)
    np.testing.assert_allclose(logits, golden[f"{name}/logits"], rtol=1e-9)
    save_ours(tmp_path)
    assert json.loads((tmp_path / name / CONFIG).read_text()) == json.loads(
        str(golden[f"{name}/config"])
    )
    tensors = load_file(tmp_path / name / TENSORS)
    assert sorted(tensors) == sorted(golden["names"])
    norms = [np.linalg.norm(tensors[tensor]) for tensor in golden["names"]]
    np.testing.assert_allclose(norms, golden["norms"], rtol=1e-12)


@pytest.mark.slow
def test_adapters_that_peft_saves_are_loaded(golden, tmp_path):
    """The recorded file is PEFT's, and so are its logits."""
    tensors = {n.removeprefix("peft/tensor/"): x for n, x in golden.items() if "/tensor/" in n}
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(str(golden["peft/config"]))
    with jax.enable_x64(True):
        _, params, _ = network()
        adapters, alpha = load_lora(tmp_path, params)
        logits = merged_logits(adapters, alpha)
    assert alpha == 8.0
    assert {len(adapter["lora_b"]) for adapter in adapters.values()} == {2, 4}
    np.testing.assert_allclose(logits, golden["peft/logits"], rtol=1e-9)


@pytest.mark.slow
def test_recorded_peft_logits_are_those_of_peft(golden, tmp_path):
    pytest.importorskip("peft")
    from record_peft import record

    save_ours(tmp_path)
    found = record(tmp_path)
    for name in (name for name in golden if name.endswith("logits")):
        np.testing.assert_allclose(found[name], golden[name], rtol=1e-9)


SMALL = {
    "conv": {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)},
    "fc": {"kernel": jnp.zeros((6, 5))},
}


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_saved_adapters_are_loaded_bit_for_bit(alpha, tmp_path):
    adapters = jaxft.lora(SMALL, {"fc": 1, "*": 3}, key=jax.random.key(0))
    save_lora(tmp_path / "adapter", adapters, alpha=alpha)
    loaded, loaded_alpha = load_lora(tmp_path / "adapter", SMALL)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert loaded_alpha == alpha
    shapes = {name: x.shape for name, x in load_file(tmp_path / "adapter" / TENSORS).items()}
    assert shapes == {
        "base_model.model.conv.lora_A.weight": (3, 4, 3, 3),
        "base_model.model.conv.lora_B.weight": (6, 3, 1, 1),
        "base_model.model.fc.lora_A.weight": (1, 6),
        "base_model.model.fc.lora_B.weight": (5, 1),
    }


def test_adapters_are_loaded_for_a_tree_with_torchs_order_of_axes(tmp_path):
    """Equinox has the kernel [o i] at `fc.weight`."""
    adapters = jaxft.lora(SMALL, {"fc": 2}, key=jax.random.key(0))
    save_lora(tmp_path, adapters)
    params = {"fc": {"weight": jnp.ones((5, 6)), "bias": jnp.ones(5)}}
    loaded, alpha = load_lora(tmp_path, params)
    assert [*loaded] == ["fc.weight"]
    merged = jaxft.merge_lora(params, loaded, alpha=alpha)
    assert merged["fc"]["weight"].shape == (5, 6)


def test_save_lora_needs_adapters(tmp_path):
    with pytest.raises(WeightsError, match="there are no adapters to save"):
        save_lora(tmp_path, {})


BROKEN = {
    "other type": ({"peft_type": "IA3"}, {}, "has adapters of type IA3, not LORA"),
    "rslora": ({"use_rslora": True}, {}, "has use_rslora=True, and must have False"),
    "bias": ({"bias": "all"}, {}, "has bias='all', and must have 'none'"),
    "alphas": ({"alpha_pattern": {"fc": 7}}, {}, "has several values of alpha: {'fc': 7}"),
    "embedding": (
        {}, {"base_model.model.fc.lora_embedding_A": np.zeros((2, 3), np.float32)},
        "fc.lora_embedding_A, which is no dense or convolution adapter's",
    ),
    "half": (
        {}, {"base_model.model.out.lora_A.weight": np.zeros((2, 3), np.float32)},
        "lacks lora_A or lora_B of out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_load_lora_rejects(case, tmp_path):
    changes, more, message = BROKEN[case]
    save_lora(tmp_path, jaxft.lora(SMALL, {"*": 2}, key=jax.random.key(0)))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
    save_file({**load_file(tmp_path / TENSORS), **more}, tmp_path / TENSORS)
    with pytest.raises(WeightsError, match=message):
        load_lora(tmp_path, SMALL)


def test_load_lora_names_a_module_without_kernel(tmp_path):
    save_lora(tmp_path, jaxft.lora(SMALL, {"*": 2}, key=jax.random.key(0)))
    with pytest.raises(WeightsError, match=r"adapter of 'conv', where params have 0 kernels.*fc"):
        load_lora(tmp_path, {"fc": SMALL["fc"]})
    with pytest.raises(WeightsError, match="holds no readable adapters of PEFT"):
        load_lora(tmp_path / "missing", SMALL)


def test_saved_head_keeps_its_nested_path(tmp_path):
    """PEFT replaces `head.fc` alone; `head.norm` of a ConvNeXt is beside it."""
    adapters = jaxft.lora({"stem": {"kernel": jnp.ones((4, 3))}}, {"*": 1}, key=jax.random.key(0))
    save_lora(tmp_path, adapters, trained={"head.fc": {"kernel": jnp.ones((3, 2))}})
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["head.fc"]
    assert "base_model.model.head.fc.weight" in load_file(tmp_path / TENSORS)


def test_load_lora_refuses_one_dimensional_convolutions(tmp_path):
    adapters = jaxft.lora({"stem": {"kernel": jnp.ones((4, 3))}}, {"*": 1}, key=jax.random.key(0))
    save_lora(tmp_path, adapters)
    tensors = {name: x[..., None] for name, x in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(WeightsError, match="the adapter of 'stem' has 3 axes"):
        load_lora(tmp_path, {"stem": {"kernel": jnp.ones((4, 3))}})
