"""Tensors: torch's layouts, and the names of other libraries."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.errors import WeightsError
from jaxft.models import KeyMap, Rename, create
from jaxft.weights import from_state_dict, load, read
from jaxft.weights.key_maps import TorchTensor, renamed, resized, torch_tensors
from jaxft.weights.tensors import as_lazy

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden


@pytest.mark.parametrize("shape", [(7, 5, 3, 2), (3, 2)])
def test_to_torch_and_from_torch_are_inverse(shape):
    kernel = np.arange(np.prod(shape)).reshape(shape)
    tensor = torch_tensors({"conv": {"kernel": kernel}}, {})[0]["conv"]["kernel"]
    transposed = tensor.to_torch(kernel)
    assert transposed.shape == tensor.shape
    assert transposed.flags.c_contiguous
    np.testing.assert_array_equal(tensor.from_torch(transposed), kernel)


@pytest.mark.parametrize(("leaf", "rank"), [("gamma", 1), ("pos_embed", 3), ("cls_token", 3)])
def test_torch_tensors_keep_names_and_layouts_of_other_leaves(leaf, rank):
    shape = (2, 3, 4)[:rank]
    tensor = torch_tensors({"neck": {leaf: np.ones(shape)}}, {})[0]["neck"][leaf]
    assert (tensor.name, tensor.shape) == (f"neck.{leaf}", shape)


def recorded_transformers(name):
    """Returns the recorded shapes by name, and the logits."""
    with np.load(record_golden.GOLDEN / f"transformers_{name}.npz") as golden:
        shapes = [tuple(map(int, shape.split())) for shape in golden["shapes"].tolist()]
        return dict(zip(golden["names"].tolist(), shapes, strict=True)), golden["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "convnextv2_atto"])
def test_transformers_weights_give_the_recorded_logits(name, tmp_path):
    shapes, logits = recorded_transformers(name)
    counters = {"resnet.embedder.embedder.normalization.num_batches_tracked": np.array(7)}
    save_file(record_golden.weights(shapes) | counters, tmp_path / "w")
    model = create(name, num_classes=record_golden.NUM_CLASSES)
    params, stats = load(tmp_path / "w", model)
    images = jnp.asarray(record_golden.images(65).transpose(0, 2, 3, 1))
    actual, _ = model.apply(params, stats, images, norms="running")
    np.testing.assert_allclose(actual, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_transformers_body_without_head(tmp_path):
    """`ResNetModel` has no classifier, and its names have no `resnet.` prefix."""
    shapes, _ = recorded_transformers("resnet18")
    body = {
        name.removeprefix("resnet."): array
        for name, array in record_golden.weights(shapes).items()
        if name.startswith("resnet.")
    }
    save_file(body, tmp_path / "w")
    model = create("resnet18", num_classes=3)
    params, _ = load(tmp_path / "w", model, head="fresh")
    conv = body["encoder.stages.3.layers.1.layer.1.convolution.weight"]
    np.testing.assert_array_equal(
        params["layer4"]["1"]["conv2"]["kernel"], conv.transpose(2, 3, 1, 0)
    )
    assert read(tmp_path / "w").num_classes(model) is None


# Golden file: (network, options of `create`, last block).
SMALL = {"width": 96, "depth": 2, "num_heads": 3, "image_size": 56, "patch_size": 14}
VISION_TRANSFORMERS = {
    "vit": ("vit_base_patch16_224", {"eps": 1e-12}, "head"),  # timm's is 1e-6
    "dinov2": ("vit_base_patch14_dinov2", {}, "norm"),
    "dinov2_with_registers": ("vit_base_patch14_reg4_dinov2", {}, "norm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("golden", VISION_TRANSFORMERS)
def test_transformers_vision_transformers_give_the_recorded_outputs(golden, tmp_path):
    name, options, last = VISION_TRANSFORMERS[golden]
    shapes, outputs = recorded_transformers(golden)
    save_file(record_golden.weights(shapes), tmp_path / "w")
    model = create(name, num_classes=record_golden.NUM_CLASSES, **SMALL, **options)
    params, stats = load(tmp_path / "w", model, head="keep" if last == "head" else "fresh")
    images = jnp.asarray(record_golden.images(56).transpose(0, 2, 3, 1))
    actual, _ = model.apply(params, stats, images, norms="running", last=last)
    np.testing.assert_allclose(actual, outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())


def test_key_map_keeps_torchvision_and_timm_names():
    for name in ("resnet50", "resnet50d", "cifar_resnet20", "convnext_tiny_hnf", "convnextv2_atto"):
        model = create(name)
        tensors = jax.tree.leaves(torch_tensors(*jax.eval_shape(model.init, jax.random.key(0))))
        assert all(model.key_map.rename(t.name) == t.name for t in tensors)


FACEBOOK = {
    r"stem\.": "downsample_layers.0.",
    r"stages\.(\d)\.downsample": r"downsample_layers.\1",
    r"stages\.(\d)\.blocks": r"stages.\1",
    "conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"mlp\.grn\.weight": "grn.gamma",
    r"mlp\.grn\.bias": "grn.beta",
    r"head\.(norm|fc)": r"\1",
    "^fc": "head",
}
"""The original names of ConvNeXt's tensors, as replacements in timm's."""


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_original_convnext_weights_load_bit_for_bit(name):
    model = create(name, num_classes=3)
    targets = jax.tree.leaves(torch_tensors(*jax.eval_shape(model.init, jax.random.key(0))))
    arrays = record_golden.weights({t.name: t.shape for t in targets})
    original = {}
    for target, array in arrays.items():
        for pattern, replacement in FACEBOOK.items():
            target = re.sub(pattern, replacement, target)
        shape = array.shape
        if "pwconv" in target:
            shape = shape[:2]
        elif "grn" in target:
            shape = (1, 1, 1, *shape)
        original[target] = array.reshape(shape)
    assert len(original) == len(targets)
    assert original.keys().isdisjoint(arrays)
    state = {f"net.{n}": x for n, x in original.items()} | {"temperature": np.ones(())}
    with pytest.warns(UserWarning, match=f"Used the {len(targets)} tensors below 'net.'"):
        params, _ = from_state_dict(state, model)
    expected, _ = from_state_dict(arrays, model)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.slow
def test_torchvision_convnext_gives_the_same_logits():
    torch = pytest.importorskip("torch")
    models = record_golden.import_torchvision().models
    module = models.convnext_tiny(num_classes=3).eval()
    shapes = {n: tuple(x.shape) for n, x in module.state_dict().items()}
    state = {n: torch.from_numpy(x) for n, x in record_golden.weights(shapes).items()}
    module.load_state_dict(state)
    images = record_golden.images(64)
    expected = module(torch.from_numpy(images)).detach().numpy()
    model = create("convnext_tiny", num_classes=3)
    params, stats = from_state_dict(state, model)
    actual, _ = model.apply(params, stats, images.transpose(0, 2, 3, 1), norms="running")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def lazy(*names):
    return as_lazy({name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)})


JOINED = KeyMap(
    (Rename(r"attn\.(?P<part>q|k|v)\.(\w+)", "qkv.{1}", parts=("q", "k", "v")),),
    ignored=(r"mask_\w+",),
)


def test_renamed_joins_parts_in_their_order_and_drops_ignored_tensors():
    tensors = renamed(
        lazy("attn.v.weight", "attn.q.weight", "attn.k.weight", "mask_token"), JOINED, "w"
    )
    assert tensors.keys() == {"qkv.weight"}
    assert tensors["qkv.weight"].shape == (6, 3)
    assert tensors["qkv.weight"].read()[:, 0].tolist() == [1, 1, 2, 2, 0, 0]


def test_renamed_keeps_the_names_of_incomplete_parts():
    assert renamed(lazy("attn.q.weight", "x"), JOINED, "w").keys() == {"attn.q.weight", "x"}


def test_renamed_refuses_two_tensors_for_one():
    key_map = KeyMap((Rename(r"[ab]\.weight", "c.weight"),))
    with pytest.raises(WeightsError, match=r"w has two tensors for one: a\.weight and b\.weight"):
        renamed(lazy("a.weight", "b.weight"), key_map, "w")


def test_resized_tensor_is_read_in_the_networks_shape():
    key_map = KeyMap(resized={"pos": lambda array, shape: np.resize(array, shape)})
    expected = {"pos": TorchTensor("pos", (4, 3), (0, 1))}
    tensors, (remark,) = resized(lazy("pos"), expected, key_map)
    assert tensors["pos"].read().shape == tensors["pos"].shape == (4, 3)
    assert remark == "Resized pos from [2, 3] to [4, 3]."


def test_key_map_keeps_unknown_names_for_the_report(tmp_path):
    shapes, _ = recorded_transformers("resnet18")
    arrays = record_golden.weights(shapes)
    arrays["resnet.encoder.stages.0.layers.0.squeeze.weight"] = np.ones(3, np.float32)
    save_file(arrays, tmp_path / "w")
    model = create("resnet18", num_classes=10)
    with pytest.raises(WeightsError, match=r"not in the network \(1\):\n.*layers\.0\.squeeze"):
        load(tmp_path / "w", model)
