"""Options that change the outputs of the same tensors are stored with the weights."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import WeightsError
from jaxft.checkpoint.weights_only import save_weights
from jaxft.models import create
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.nnx_adapter import NNXModel
from jaxft.weights import from_state_dict, load, read, save


def small(**options):
    config = ResNetConfig("imagenet", (1, 1), bottleneck=True, num_classes=2, **options)
    return NNXModel("small", ResNet, config)


PLAIN, STRIDED = small(), small(stride_in_1x1=True)
MESSAGE = "stride_in_1x1=True, but this small has stride_in_1x1=False"


@pytest.fixture(scope="module")
def strided():
    return STRIDED.init(jax.random.key(0))


@pytest.fixture(scope="module")
def file(strided, tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "model.safetensors"
    save(path, STRIDED, *strided)
    return path


@pytest.mark.slow
def test_save_adds_a_tensor_for_stride_in_1x1(file, tmp_path):
    assert load_file(file)["stride_in_1x1"].tolist() == [1]
    save(tmp_path / "w", PLAIN, *PLAIN.init(jax.random.key(0)))
    assert "stride_in_1x1" not in load_file(tmp_path / "w")


def test_load_of_stride_in_1x1_into_the_same_network(file, strided):
    jax.tree.map(np.testing.assert_array_equal, load(file, STRIDED), strided)
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(load_file(file), STRIDED), strided)


@pytest.mark.parametrize("head", ["keep", "fresh"])
@pytest.mark.parametrize("kind", ["metadata", "tensor", "json", "transformers"])
def test_check_options_refuses_stride_in_1x1_in_another_network(kind, head, file, tmp_path):
    tensors = load_file(file)
    if kind != "tensor":
        del tensors["stride_in_1x1"]
    described = {"model": "small", "stride_in_1x1": True} if kind == "metadata" else {}
    save_file(tensors, tmp_path / "w.safetensors", {"jaxft": json.dumps(described)})
    if kind == "json":
        (tmp_path / "w.json").write_text('{"stride_in_1x1": true}')
    if kind == "transformers":
        config = {"layer_type": "bottleneck", "downsample_in_bottleneck": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=MESSAGE):
        load(tmp_path / "w.safetensors", PLAIN, head=head)


def test_save_weights_stores_the_description(strided, tmp_path):
    described = {"model": "small", "stride_in_1x1": True, "classes": ["a", "b"]}
    save_weights(tmp_path / "w", *strided, described=described)
    assert read(tmp_path / "w").network.classes == ("a", "b")
    with pytest.raises(WeightsError, match=MESSAGE):
        load(tmp_path / "w", PLAIN)


def test_check_options_includes_the_head_if_it_is_kept(tmp_path):
    one = create("cifar_resnet8", num_classes=2, binary=True)
    save(tmp_path / "w", one, *one.init(jax.random.key(0)))
    other = create("cifar_resnet8", num_classes=1)
    with pytest.raises(WeightsError, match="binary=True, but this cifar_resnet8 has"):
        load(tmp_path / "w", other)
    load(tmp_path / "w", other, head="fresh")


def test_check_options_ignores_dropout_and_dtype(tmp_path):
    regularised = create(
        "cifar_resnet8", num_classes=2, dropout=0.5, drop_path=0.1, dtype="bfloat16"
    )
    save(tmp_path / "w", regularised, *regularised.init(jax.random.key(0)))
    load(tmp_path / "w", create("cifar_resnet8", num_classes=2, dtype="float32"))
    assert read(tmp_path / "w").network.options["dtype"] == "bfloat16"


def test_load_remarks_on_another_architecture_with_the_same_tensors(file, tmp_path):
    """timm's resnetblur50 has the tensors of its resnet50."""
    tensors = {n: x for n, x in load_file(file).items() if n != "stride_in_1x1"}
    save_file(tensors, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur50"}')
    with pytest.warns(UserWarning, match="describes its network as resnetblur50: all tensors fit"):
        load(tmp_path / "w.safetensors", PLAIN)


@pytest.mark.slow
def test_torch_refuses_stride_in_1x1_until_its_strides_match(tmp_path):
    torch = pytest.importorskip("torch")
    from narrow import Narrow
    from safetensors.torch import load_file
    from torch_network import ResNet as TorchResNet

    config = Narrow("imagenet", (1, 1, 1, 1), bottleneck=True, stride_in_1x1=True, num_classes=3)
    model = NNXModel("narrow", ResNet, config)
    params, stats = jax.jit(model.init)(jax.random.key(0))
    save(tmp_path / "w", model, params, stats)
    net = TorchResNet(bottleneck=True).eval()
    counters = {name: x for name, x in net.state_dict().items() if name.endswith("tracked")}
    state = load_file(tmp_path / "w") | counters
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "stride_in_1x1"'):
        net.load_state_dict(state)
    state.pop("stride_in_1x1")
    for layer in (net.layer2, net.layer3, net.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    net.load_state_dict(state)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("f4")
    with torch.no_grad():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits, _ = model.apply(params, stats, images, norms="running")
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
