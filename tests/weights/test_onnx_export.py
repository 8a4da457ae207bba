"""ONNX models in ONNX Runtime: the same logits as in jax, for any batch size."""

import sys
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import linen as nn
from flax import nnx

from jaxft.data import Preprocessing
from jaxft.errors import ModelError
from jaxft.models import NNX, Linen, create
from jaxft.models.networks.convnext import ConvNeXt, ConvNeXtConfig
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.nnx_adapter import NNXModel
from jaxft.weights.onnx_export import TOLERANCE, serialize
from jaxft.weights.onnx_graph import BATCH, convert

SIZES = (1, 7)
PREPROCESSING = Preprocessing(image_size=32)


def run(content, images):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": np.asarray(images)})[0]


class CNN(nn.Module):
    """Layers that users of Linen combine."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.gelu(nn.BatchNorm(use_running_average=not train)(x), approximate=False)
        x = nn.Conv(8, (3, 3), feature_group_count=8, kernel_dilation=2)(x)
        x = nn.GroupNorm(4)(nn.silu(nn.LayerNorm()(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        scale = nn.sigmoid(nn.Dense(8)(x.mean((1, 2), keepdims=True)))
        x = (x * scale).reshape(x.shape[0], -1)
        x = nn.Dropout(0.5, deterministic=not train)(nn.softmax(nn.Dense(16)(x)))
        return nn.Dense(3, name="head")(x)


class Attention(nnx.Module):
    """An NNX network with attention over the rows of pixels."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 96, rngs=rngs, decode=False)
        self.head = nnx.Linear(96, 5, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], 32, 96)
        return self.head(nnx.relu(self.attention(x)).mean(1))


GROUPED = ResNetConfig("imagenet", (1, 1), bottleneck=True, groups=4, base_width=4, num_classes=5)
CONVNEXT = ConvNeXtConfig((1, 1), (8, 16), conv_mlp=True, num_classes=5)
VARIANT = replace(GROUPED, groups=1, stem=(8, 8), average_shortcut=True, concat_pool=True)
NETWORKS = {
    "plain": create("cifar_resnet8", num_classes=5),
    "grouped": NNXModel("grouped", ResNet, GROUPED),
    "variant": NNXModel("variant", ResNet, VARIANT),
    "convnext": NNXModel("convnext", ConvNeXt, CONVNEXT),
    "convnextv2": NNXModel("convnextv2", ConvNeXt, replace(CONVNEXT, global_response_norm=True)),
    "linen": Linen(CNN(), shape=(32, 32, 3), head="head"),
    "nnx": NNX(Attention, shape=(32, 32, 3), head="head"),
}
SMALL = {"num_classes": 5, "width": 48, "num_heads": 3, "depth": 1, "image_size": 32}
VISION_TRANSFORMERS = {
    "vit": create("vit_tiny_patch16_224", **SMALL),
    "vit_quickgelu": create("vit_base_patch16_clip_quickgelu_224", **SMALL),
    "vit_map": create("vit_base_patch32_siglip_256", **SMALL),
}
FULL_SIZE = {
    name: create(name, num_classes=1000)
    for name in ("resnet18", "resnet50", "ecaresnet26t", "regnety_002", "mobilenetv3_small_050")
}


def draw(model):
    """Draws weights without compilation; the running statistics are not those of a new network."""
    rng = np.random.default_rng(0)

    def param(x):
        fan_in = max(1, x.size // x.shape[-1]) if x.ndim > 1 else 1
        return rng.standard_normal(x.shape, np.float32) / np.sqrt(fan_in)

    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    positive = jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), stats)
    return jax.tree.map(param, params), positive


@pytest.mark.parametrize(
    ("model", "size"),
    [
        *(
            pytest.param(model, 32, id=name, marks=[pytest.mark.slow] * ("convnext" in name))
            for name, model in NETWORKS.items()
        ),
        *(
            pytest.param(model, 224, id=name, marks=pytest.mark.slow)
            for name, model in FULL_SIZE.items()
        ),
        *(
            pytest.param(model, 32, id=name, marks=pytest.mark.slow)
            for name, model in VISION_TRANSFORMERS.items()
        ),
    ],
)
def test_serialized_network_gives_the_same_logits(model, size):
    params, stats = draw(model)
    preprocessing = Preprocessing(image_size=size)
    content, description = serialize(model, params, stats, preprocessing)
    assert description["max_difference"] < TOLERANCE
    evaluate = jax.jit(
        lambda x: model.apply(params, stats, preprocessing.normalize(x), norms="running")[0]
    )
    for count in SIZES:
        shape = (count, size, size, 3)
        images = np.random.default_rng(count).integers(0, 256, shape, np.uint8)
        expected = evaluate(images)
        np.testing.assert_allclose(
            run(content, images), expected, atol=TOLERANCE * np.abs(expected).max()
        )


def test_serialized_graph_has_the_pinned_versions_and_names():
    model = NETWORKS["plain"]
    content, description = serialize(model, *draw(model), PREPROCESSING)
    graph = onnx.load_from_string(content)
    assert (graph.opset_import[0].version, graph.ir_version) == (18, 8)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == (
        "images", "tensor(uint8)", ["batch", 32, 32, 3],
    )  # fmt: skip
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 5])
    assert description["images"] == "uint8 [batch 32 32 3]"
    assert description["normalizes"] is True


def test_onnx_runtime_fuses_convolutions_with_norm_and_activation_layers(tmp_path):
    model, options = NETWORKS["grouped"], onnxruntime.SessionOptions()
    content, _ = serialize(model, *draw(model), PREPROCESSING)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Conv"] + counts["FusedConv"] == 9
    assert counts["Transpose"] <= 3
    assert counts["Mul"] <= 2
    assert not {"Sub", "Max", "Where"} & set(counts)


def test_serialized_network_takes_normalised_images():
    model = NETWORKS["plain"]
    params, stats = draw(model)
    content, description = serialize(model, params, stats, PREPROCESSING, pixels="float32")
    assert description["images"].startswith("float32")
    assert description["normalizes"] is False
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    expected = jax.jit(lambda x: model.apply(params, stats, x, norms="running")[0])(images)
    np.testing.assert_allclose(run(content, images), expected, atol=1e-5)


# Functions of images [b 6 5 3] and integers of the same shape.
OPERATIONS = {
    "unary": lambda x, _: jnp.exp(-x) + jnp.log1p(jnp.abs(x)) + jnp.sqrt(x * x + 1) + jnp.expm1(x),
    "rounding": lambda x, _: jnp.floor(x) + jnp.ceil(2 * x) + jnp.sign(x) * jnp.sin(x) * jnp.cos(x),
    "powers": lambda x, _: x**3 + x**-2 + jnp.abs(x) ** 1.5 + jnp.square(x) + jax.lax.rsqrt(x**2),
    "special": lambda x, _: jax.lax.erf(x) + jax.lax.erfc(x) + jnp.tanh(x) + jax.nn.sigmoid(x),
    "activations": lambda x, _: jax.nn.elu(x) + jax.nn.softplus(x) + jax.nn.hard_swish(x),
    "max_min": lambda x, _: jnp.maximum(x, 0.5) - jnp.minimum(x[:, ::-1], 0) + jnp.clip(x, -1, 1),
    "relu": lambda x, _: jax.nn.relu(x) + jnp.where(x <= 0, 0, x) + jnp.where(x <= 0.5, 0, x),
    "comparisons": lambda x, _: jnp.where((x > 0) & ~(x == 1) | (x < -1), x, 1 - x) * (x != 0.5),
    "integers": lambda x, n: (n.astype(jnp.int32) - 7) // 2 * 1.5 + x,
    "casts": lambda x, n: (x > 0).astype(jnp.int32) + n.astype(jnp.float32),
    "reductions": lambda x, _: x.max(1).sum(-1) + x.min((1, 2)).prod(-1)[:, None] + x.var((1, 3)),
    "argmax": lambda x, _: jnp.argmax(x, 2) + jnp.argmin(x, -1).sum(2)[:, :, None],
    "slices": lambda x, _: x[:, 1:5:2, -2:] + x[:, :2, :1] + x[..., 0][:, :2, :2, None],
    "take": lambda x, _: jnp.take_along_axis(x, x.argmax(2, keepdims=True), 2),
    "indices": lambda x, _: x[:, 2] + x[:, -1, ::2][:, :1] + jnp.roll(x, 1, 2)[:, 0],
    "split": lambda x, _: jnp.concatenate(jnp.split(x, 3, axis=1)[::-1], 2),
    "pad": lambda x, _: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "pad_edge": lambda x, _: jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)), mode="edge"),
    "reflect": lambda x, _: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
    "transpose": lambda x, _: x.transpose(0, 3, 2, 1) + x.swapaxes(1, 2).mean(3)[:, None],
    "views": lambda x, _: (x.transpose(0, 3, 1, 2) + 1).sum(2).transpose(0, 2, 1) * x[:, 0],
    "broadcast": lambda x, _: jnp.concatenate([jnp.zeros((x.shape[0], 1, 5, 3)) + 0.5, x], 1),
    "flatten": lambda x, _: jnp.tile(x.reshape(x.shape[0] * 6, 15), (1, 2)).reshape(-1, 6, 30),
    "einsum": lambda x, _: jnp.einsum("bhwc,bhvc->bcwv", x, x),
    "resize": lambda x, _: jax.image.resize(x, (x.shape[0], 9, 9, 3), "bilinear"),
    "sum_pool": lambda x, _: nn.avg_pool(x, (3, 2), (2, 1), "SAME"),
    "max_pool": lambda x, _: nn.max_pool(x, (3, 2), (2, 1), ((1, 1), (0, 1))),
    "batch": lambda x, _: x[:1] + x[::-1] - x.sum(0) * jnp.ones((len(x), 1, 1, 3)),
    "calls": lambda x, _: jax.checkpoint(lambda y: y * 2)(jax.jit(lambda y: y + 1)(x)),
}  # fmt: skip


@pytest.mark.parametrize("function", OPERATIONS.values(), ids=OPERATIONS)
def test_converted_operations(function):
    @jax.jit
    def normalised(images):
        return function(images.astype(jnp.float32) / 64 - 2.1, images)

    content = convert(normalised, jax.ShapeDtypeStruct((BATCH, 6, 5, 3), jnp.uint8), "function")
    for count in (1, 3):
        images = np.random.default_rng(count).integers(0, 256, (count, 6, 5, 3), np.uint8)
        expected, result = normalised(images), run(content, images)
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


class Small(nn.Module):
    """Calls a function before its head."""

    function: object

    @nn.compact
    def __call__(self, x, *, train):
        with jax.named_scope("odd_layer"):
            x = self.function(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x, 1), r"Small/.*odd_layer cannot be exported .* operation sort\.$"),
        (lambda x: x[:, jnp.array([2, 0])], "it uses gather other than take_along_axis"),
        (lambda x: x - x.mean(0), "differ from jax's .* across the images of a batch"),
        (lambda x: x[:-1].sum(0) + x, "differ from jax's .* across the images of a batch"),
        (
            lambda x: jax.lax.scan(lambda c, _: (c + 1, None), x, length=3)[0],
            r"odd_layer cannot .* operation scan\.$",
        ),
    ],
    ids=["sort", "gather", "batch_mean", "batch_slice", "scan"],
)
def test_unsupported_operation_is_named(function, message):
    model = Linen(Small(function), shape=(8, 8, 3), head="head")
    trees = model.init(jax.random.key(0))
    with pytest.raises(ModelError, match=message):
        serialize(model, *trees, Preprocessing(image_size=8))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=r"needs the extra onnx: pip install 'jaxft\[onnx\]'"):
        serialize(NETWORKS["plain"], {}, {}, PREPROCESSING)
