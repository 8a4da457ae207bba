"""Pooling, dropout, ReLU and random keys, which recorded networks test only in part."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.errors import RecipeError
from jaxft.models import create
from jaxft.models.context import Context
from jaxft.models.layers import AveragePool, Dropout, MaxPool, Relu, Rngs, relu
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.nnx_adapter import NNXModel

X = np.random.default_rng(0).normal(size=(2, 7, 8, 12)).astype(np.float32)


@pytest.mark.parametrize("height", [2, 3])
@pytest.mark.parametrize("width", [4, 5])
def test_average_pool_averages_existing_pixels_at_odd_edges(height, width):
    x = X[:, :height, :width]
    pooled = AveragePool()(jnp.asarray(x), Context("running"))
    for i in range(-(-height // 2)):
        for j in range(-(-width // 2)):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(pooled[:, i, j], window.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("size", [(6, 7), (1, 4)])
def test_max_pool_and_its_gradient_select_the_first_of_equal_values(size):
    x = np.random.default_rng(0).integers(-2, 1, (2, *size, 3)).astype(np.float32)
    y, vjp = jax.vjp(lambda x: MaxPool()(x, Context("running")), jnp.asarray(x))
    pooled, gradient = np.zeros_like(y), np.zeros_like(x)
    for b, i, j, c in np.ndindex(*y.shape):
        rows, columns = (slice(max(2 * k - 1, 0), 2 * k + 2) for k in (i, j))
        window = x[b, rows, columns, c]
        first = np.unravel_index(window.argmax(), window.shape)
        pooled[b, i, j, c] = window[first]
        gradient[b, rows, columns, c][first] += 1 + i
    np.testing.assert_array_equal(y, pooled)
    weights = jnp.broadcast_to(1 + jnp.arange(y.shape[1])[:, None, None], y.shape)
    np.testing.assert_array_equal(vjp(weights.astype(y.dtype))[0], gradient)


def test_max_pool_keeps_nan():
    x = jnp.asarray(X[:1, :4, :4, :1]).at[0, 1, 1, 0].set(jnp.nan)
    y = MaxPool()(x, Context("running"))[0, :, :, 0]
    np.testing.assert_array_equal(jnp.isnan(y), True)


@pytest.mark.parametrize("rows", [False, True], ids=["each value", "whole examples"])
def test_dropout_keeps_the_mean(rows):
    x = jnp.ones((4000, 1, 3))
    y = Dropout(0.25, rows=rows)(x, Context("running", key=jax.random.key(0)))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert float(y.mean()) == pytest.approx(1, abs=0.03)
    assert bool((y == y[:, :, :1]).all()) == rows


MODEL = create("cifar_resnet8", num_classes=5, dropout=0.5, drop_path=0.5)


@pytest.fixture(scope="module")
def trees():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 8, 8, 3))


@pytest.mark.slow
def test_dropout_is_disabled_without_a_key(trees, images):
    plain = create("cifar_resnet8", num_classes=5)
    logits, _ = MODEL.apply(*trees, images, norms="running")
    np.testing.assert_array_equal(logits, plain.apply(*trees, images, norms="running")[0])


@pytest.mark.slow
def test_dropout_depends_on_the_key(trees, images):
    def logits(seed):
        return MODEL.apply(*trees, images, norms="running", key=jax.random.key(seed))[0]

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.array_equal(logits(0), logits(1))


def test_dropout_in_separate_blocks_equals_the_whole_network(trees, images):
    run = partial(MODEL.apply, *trees, norms="running", key=jax.random.key(3))
    activations, _ = run(images, last="layer2")
    np.testing.assert_array_equal(run(activations, first="layer3")[0], run(images)[0])


def test_drop_path_drops_nothing_in_the_first_block_and_some_rows_in_the_last(trees, images):
    model = create("cifar_resnet8", num_classes=5, drop_path=0.5)
    key = jax.random.key(0)
    run = partial(model.apply, *trees, norms="running")
    features, _ = run(images, last="layer1")
    np.testing.assert_array_equal(run(images, last="layer1", key=key)[0], features)
    # A dropped row of the last block is its shortcut.
    before, _ = run(images, last="layer2")
    after, _ = run(before, first="layer3", last="layer3", key=key)
    shortcut = jnp.pad(before[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (16, 16))).mean((1, 2))
    dropped = [np.array_equal(row, other) for row, other in zip(after, shortcut, strict=True)]
    assert 0 < sum(dropped) < len(dropped)


def dropouts(module, path=()):
    """The rate of each Dropout, by its path."""
    for name, part in nnx.iter_children(module):
        if isinstance(part, Dropout):
            yield ".".join(map(str, (*path, name))), part.rate
        elif isinstance(part, nnx.Module):
            yield from dropouts(part, (*path, name))


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", [False, True])
def test_dropout_and_drop_path_rates_of_each_layer(bottleneck):
    config = ResNetConfig("imagenet", (2, 3), bottleneck, num_classes=5, dropout=0.5, drop_path=0.4)
    plain = dict(dropouts(ResNet(config, rngs=nnx.Rngs(0))))
    blocks = [f"layer{i + 1}.{j}.drop_path" for i, depth in enumerate((2, 3)) for j in range(depth)]
    assert plain == pytest.approx(
        {**dict(zip(blocks, (0, 0.1, 0.2, 0.3, 0.4), strict=True)), "dropout": 0.5}
    )
    concat = ResNet(replace(config, concat_pool=True), rngs=nnx.Rngs(0))
    rates = {path: rate for path, rate in dropouts(concat) if "drop_path" not in path}
    assert rates == {"dropout": 0.0, "fc.1": 0.25, "fc.5": 0.5}
    assert float(concat.fc[2].kernel[...].std()) == pytest.approx(
        (2 / (2 * 128 * (4 if bottleneck else 1))) ** 0.5, rel=0.02
    )


@pytest.mark.slow
def test_drop_path_of_a_bottleneck_drops_its_branch():
    config = ResNetConfig("imagenet", (1, 1), bottleneck=True, drop_path=0.99, num_classes=5)
    model = NNXModel("bottleneck", ResNet, config)
    params, stats = model.init(jax.random.key(0))
    params["layer2"]["0"]["downsample"]["0"]["kernel"] *= 0
    x = jnp.ones((4, 8, 8, 256))
    y, _ = model.apply(
        params, stats, x, norms="running", first="layer2", last="layer2", key=jax.random.key(1)
    )
    np.testing.assert_array_equal(y, 0)


def test_context_make_rng_differs_between_layers():
    context = Context("running", key=jax.random.key(0))
    first, second = (context.child("layer1").child(name).make_rng() for name in "01")
    assert not jnp.array_equal(jax.random.key_data(first), jax.random.key_data(second))


@pytest.mark.slow
def test_bfloat16_computes_all_blocks_before_the_head(trees, images):
    half = create("cifar_resnet8", num_classes=5, dtype="bfloat16")
    features, _ = half.apply(*trees, images, norms="running", last="layer3")
    logits, stats = half.apply(*trees, images, norms="batch")
    assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    exact, _ = MODEL.apply(*trees, images, norms="batch")
    np.testing.assert_allclose(logits, exact, atol=0.05)


def test_dtype_error():
    with pytest.raises(RecipeError, match="resnet18: dtype is 'int8'"):
        create("resnet18", dtype="int8")


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_and_drop_path_out_of_range(option, rate):
    with pytest.raises(RecipeError, match=f"resnet18: {option} is {rate}"):
        create("resnet18", **{option: rate})


@pytest.mark.parametrize("reduction", [jnp.mean, jnp.sum])
def test_relu_keeps_nan_where_it_is_fused_with_a_reduction(reduction):
    """XLA on CPU turns NaN into 0 in `jax.nn.relu`."""
    x = jnp.ones((4, 8, 8, 16)).at[1, 2, 3, 4].set(jnp.nan)
    reduced = jax.jit(lambda x: reduction(Relu()(2 * x, Context("running")), (1, 2)))(x)
    assert np.argwhere(np.isnan(reduced)).tolist() == [[1, 4]]


def test_relu_and_its_gradient_equal_torchs():
    """The gradient is 0 at 0."""
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(relu(x), [0, 0, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: relu(x).sum())(x), [0, 0, 0, 1])


def test_rngs_returns_the_keys_of_nnx_rngs():
    key = jax.random.key(7)
    rngs, nnx_rngs = Rngs(key), nnx.Rngs(key)
    for _ in range(3):
        assert jnp.array_equal(*(jax.random.key_data(r.params()) for r in (rngs, nnx_rngs)))
