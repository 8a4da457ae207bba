"""`NNXModel`: paths, single blocks, norm modes and statistics that must not change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import create
from jaxft.models.nnx_adapter import init_shapes

MODEL = create("cifar_resnet8", num_classes=5)
NORMS = (
    "bn1",
    *(f"layer{i}.0.bn{j}" for i in (1, 2, 3) for j in (1, 2)),
)


@pytest.fixture(scope="module")
def trees():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def run(trees, images, **options):
    return MODEL.apply(*trees, images, **options)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def paths(tree) -> set[str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert all(isinstance(key.key, str) for path, _ in flat for key in path)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat}


def changed(before, after) -> set[str]:
    """Paths of the norm layers with a leaf that is another object."""
    differs = jax.tree.map(lambda a, b: a is not b, before, after)
    flat, _ = jax.tree_util.tree_flatten_with_path(differs)
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator=".") for path, flag in flat if flag
    }


@pytest.mark.slow
def test_nnx_model_paths_are_torchs_with_string_keys(trees):
    params, stats = trees
    assert paths(params) >= {"conv1.kernel", "layer3.0.bn2.scale", "fc.kernel", "fc.bias"}
    assert paths(stats) == {f"{norm}.{leaf}" for norm in NORMS for leaf in ("mean", "var")}
    params, stats = jax.eval_shape(create("resnet50").init, jax.random.key(0))
    assert "layer1.0.downsample.0.kernel" in paths(params)
    assert "layer1.0.downsample.1.mean" in paths(stats)


def test_nnx_model_init_traces_and_depends_on_the_key_alone(trees):
    abstract = jax.eval_shape(MODEL.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), trees)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == shapes
    assert_identical(MODEL.init(jax.random.key(0)), trees)
    other, _ = MODEL.init(jax.random.key(1))
    assert not np.array_equal(other["conv1"]["kernel"], trees[0]["conv1"]["kernel"])


def test_init_shapes_are_those_of_init():
    assert init_shapes(MODEL) == jax.eval_shape(MODEL.init, jax.random.key(0))


def test_nnx_model_equality_and_hash():
    assert create("resnet18") == create("resnet18")
    assert hash(create("resnet18")) == hash(create("resnet18"))
    assert create("resnet18") != create("resnet18", num_classes=2)


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["running", "batch"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("cut", range(1, 5), ids=lambda i: f"before {MODEL.blocks[i]}")
def test_nnx_model_blocks_applied_separately_equal_the_whole(trees, images, norms, jit, cut):
    def apply(**blocks):
        function = partial(MODEL.apply, norms=norms, **blocks)
        return jax.jit(function) if jit else function

    params, stats = trees
    whole = apply()(params, stats, images)
    activations, new_stats = apply(last=MODEL.blocks[cut - 1])(params, stats, images)
    assert_identical(apply(first=MODEL.blocks[cut])(params, new_stats, activations), whole)


def test_nnx_model_updates_statistics_of_the_applied_blocks_only(trees, images):
    _, stats = run(trees, images, norms="batch", last="layer1")
    assert changed(trees[1], stats) == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}


def test_nnx_model_running_mode_returns_the_same_statistics(trees, images):
    for norms in ("running", dict.fromkeys(NORMS, "running")):
        assert run(trees, images, norms=norms)[1] is trees[1]


def test_nnx_model_norm_mode_per_layer(trees, images):
    batch = run(trees, images, norms="batch")
    assert_identical(run(trees, images, norms=dict.fromkeys(NORMS, "batch")), batch)
    norms = dict.fromkeys(NORMS, "running") | {"layer2.0.bn2": "batch"}
    logits, stats = run(trees, images, norms=norms)
    assert changed(trees[1], stats) == {"layer2.0.bn2"}
    assert not np.array_equal(logits, batch[0])


@pytest.mark.slow
def test_nnx_model_mask_leaves_out_padding(trees, images):
    expected, expected_stats = run(trees, images[:3], norms="batch")
    padded = images.at[3].set(1e3)
    mask = jnp.array([True, True, True, False])
    logits, stats = run(trees, padded, norms="batch", mask=mask)
    np.testing.assert_allclose(logits[:3], expected, atol=1e-5)
    assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(assert_close, stats, expected_stats)


@pytest.mark.slow
def test_nnx_model_gradients_and_statistics_under_jit(trees, images):
    params, stats = trees

    @jax.jit
    def step(params, stats):
        def loss(params):
            logits, new = MODEL.apply(params, stats, images, norms="batch")
            return jnp.square(logits).mean(), new

        return jax.grad(loss, has_aux=True)(params)

    gradients, new = step(params, stats)
    assert jax.tree.structure((gradients, new)) == jax.tree.structure((params, stats))
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradients))


ERRORS = {
    "unknown first": ({"norms": "batch", "first": "layer9"}, "'layer9'.*stem, layer1"),
    "unknown last": ({"norms": "batch", "last": "fc"}, "'fc'.*layer3, head"),
    "reversed blocks": (
        {"norms": "batch", "first": "layer2", "last": "stem"},
        "'layer2' to 'stem'",
    ),
    "unknown mode": ({"norms": "eval"}, "not 'eval'"),
    "missing norm": ({"norms": {"bn1": "batch"}}, "missing or unknown: layer1.0.bn1, "),
    "unknown norm": ({"norms": dict.fromkeys((*NORMS, "bn9"), "batch")}, "unknown: bn9$"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_nnx_model_apply_errors(trees, images, options, message):
    with pytest.raises(ValueError, match=message):
        run(trees, images, **options)
