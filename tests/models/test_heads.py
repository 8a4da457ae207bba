"""Heads of several layers, and binary heads, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import Recipe, RecipeError, Stage, WeightsError
from jaxft.cli.recipe_options import read_recipe
from jaxft.models import create
from jaxft.recipe_file import read, save
from jaxft.train.loss import Loss
from jaxft.weights import load
from jaxft.weights import save as save_weights
from jaxft.weights.head import new_head
from jaxft.weights.key_maps import torch_tensors

NAME = "cifar_resnet8"  # 64 features
LAYERS = (48, "relu", 32)
LIGHTNING = create(NAME, num_classes=2, head_layers=LAYERS, binary=True)
KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))


def shapes(model):
    """Shapes of the head's tensors, by torch's names."""
    tensors = jax.tree.leaves(torch_tensors(*jax.eval_shape(model.init, KEY)))
    return {t.name: t.shape for t in tensors if t.name.startswith(model.head)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"head_layers": LAYERS, "binary": True},
            {
                "fc.0.weight": (48, 64), "fc.0.bias": (48,), "fc.2.weight": (32, 48),
                "fc.2.bias": (32,), "fc.3.weight": (1, 32), "fc.3.bias": (1,),
            },
        ),
        (
            {"head_layers": (8, "relu")},
            {
                "fc.0.weight": (8, 64), "fc.0.bias": (8,),
                "fc.2.weight": (2, 8), "fc.2.bias": (2,),
            },
        ),
        ({"binary": True}, {"fc.weight": (1, 64), "fc.bias": (1,)}),
    ],
)  # fmt: skip
def test_head_layers_names_and_shapes_equal_torchs(options, expected):
    assert shapes(create(NAME, num_classes=2, **options)) == expected


@pytest.mark.slow
def test_binary_concat_pool_head():
    model = create(NAME, num_classes=2, concat_pool=True, binary=True)
    assert shapes(model)["fc.6.weight"] == (1, 512)
    logits, _ = model.apply(*model.init(KEY), IMAGES, norms="running")
    np.testing.assert_array_equal(logits[:, 0], 0)


@pytest.mark.slow
def test_head_layers_output():
    """Computes the head by hand; a network with an identity head returns the features."""
    params, stats = LIGHTNING.init(KEY)
    identity = {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}
    backbone = create(NAME, num_classes=64)
    features, _ = backbone.apply(params | {"fc": identity}, stats, IMAGES, norms="running")
    x = np.asarray(features, np.float64)
    for layer in ("0", "2", "3"):
        x = x @ np.asarray(params["fc"][layer]["kernel"]) + np.asarray(params["fc"][layer]["bias"])
        x = np.maximum(x, 0) if layer == "0" else x
    logits, _ = LIGHTNING.apply(params, stats, IMAGES, norms="running")
    assert logits.shape == (3, 2)
    np.testing.assert_array_equal(logits[:, 0], 0)
    np.testing.assert_allclose(logits[:, 1:], x, rtol=1e-5)


def test_head_layers_initialisation_equals_torchs_linear():
    head = new_head(LIGHTNING, "fresh", KEY)
    for layer, inputs in (("0", 64), ("2", 48), ("3", 32)):
        for leaf in jax.tree.leaves(head[layer]):
            assert 0.5 < float(jnp.abs(leaf).max()) * inputs**0.5 <= 1 or leaf.size == 1


@pytest.mark.parametrize("start", ["zeros", "xavier"])
def test_head_initialisation_option_applies_to_the_last_layer(start):
    head, fresh = new_head(LIGHTNING, start, KEY), new_head(LIGHTNING, "fresh", KEY)
    for layer in ("0", "2"):
        jax.tree.map(np.testing.assert_array_equal, head[layer], fresh[layer])
    bound = {"zeros": 0, "xavier": (6 / 33) ** 0.5}[start]  # for 32 inputs and 1 output
    largest = float(jnp.abs(head["3"]["kernel"]).max())
    assert 0.8 * bound <= largest <= bound


def test_head_layers_in_a_weights_file(tmp_path):
    trees = LIGHTNING.init(KEY)
    save_weights(tmp_path / "w", LIGHTNING, *trees)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "w", LIGHTNING), trees)
    with pytest.raises(WeightsError, match=r"with head_layers=\[48, 'relu', 32\], binary=True"):
        load(tmp_path / "w", create(NAME, num_classes=2))
    other = create(NAME, num_classes=5)
    assert load(tmp_path / "w", other, head="fresh")[0]["fc"]["kernel"].shape == (64, 5)


Z = np.array([-40.0, -3.0, -0.5, 0.0, 0.5, 3.0, 40.0], np.float32)
Y = np.array([0, 1, 1, 1, 0, 0, 1], np.int32)
# torch 2.13.0, BCEWithLogitsLoss(reduction="none") and its gradient, in float64
LOSSES = [
    0.0, 3.048587351573742, 0.9740769841801067, 0.6931471805599453,
    0.9740769841801067, 3.048587351573742, 4.248354255291589e-18,
]  # fmt: skip
GRADIENTS = [
    4.248354255291589e-18, -0.9525741268224333, -0.6224593312018546, -0.5,
    0.6224593312018546, 0.9525741268224334, 0.0,
]  # fmt: skip


def losses(z, targets, **fields):
    logits = jnp.stack([jnp.zeros_like(z), z], axis=-1)
    return Loss(**fields).losses(logits, targets)


@pytest.mark.parametrize("targets", [Y, jax.nn.one_hot(Y, 2)], ids=["classes", "one-hot"])
def test_binary_loss_equals_bce_with_logits(targets):
    targets = jnp.asarray(targets)
    np.testing.assert_allclose(losses(Z, targets), LOSSES, rtol=1e-6, atol=1e-7)
    gradient = jax.grad(lambda z: jnp.sum(losses(z, targets)))(jnp.asarray(Z))
    np.testing.assert_allclose(gradient, GRADIENTS, rtol=1e-5, atol=1e-7)


def test_binary_loss_with_soft_targets_equals_bce_with_logits():
    torch = pytest.importorskip("torch")
    soft = 0.9 * Y + 0.05
    torch_z = torch.tensor(Z, requires_grad=True)
    expected = torch.nn.BCEWithLogitsLoss(reduction="none")(torch_z, torch.tensor(soft).float())
    expected.sum().backward()
    onehot = jax.nn.one_hot(Y, 2)
    actual = losses(Z, onehot, label_smoothing=0.1)
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(losses(z, onehot, label_smoothing=0.1)))(jnp.asarray(Z))
    np.testing.assert_allclose(gradient, torch_z.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_recorded_bce_with_logits_equals_torchs():
    torch = pytest.importorskip("torch")
    z = torch.tensor(Z, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.BCEWithLogitsLoss(reduction="none")(z, torch.tensor(Y).double())
    loss.sum().backward()
    np.testing.assert_allclose(LOSSES, loss.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(GRADIENTS, z.grad.numpy(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binary": True}, "cifar_resnet8: binary needs two classes, not 3"),
        ({"head_layers": (0,)}, "head_layers has 0; each must be a width of at least 1 or 'relu'"),
        ({"head_layers": ("gelu",)}, "head_layers has 'gelu'; each must be"),
        (
            {"head_layers": (8,), "concat_pool": True},
            "concat_pool and head_layers define two different heads",
        ),
    ],
)
def test_head_option_errors(options, message):
    with pytest.raises(RecipeError, match=message):
        create(NAME, num_classes=3, **options)


def test_head_layers_in_a_recipe(tmp_path):
    recipe = Recipe(model=NAME, data="digits", stages=(Stage("all", {"*": 0.1}, 1),))
    options = ["--head-layers", "48", "relu", "32", "--binary", "True", "--reduction", "sum"]
    save(recipe, tmp_path / "plain.yaml")
    named = read_recipe(tmp_path / "plain.yaml", options)
    assert (named.head_layers, named.binary, named.reduction) == (LAYERS, True, "sum")
    options = {"head_layers": LAYERS, "binary": True, "dtype": named.dtype}
    assert named.network(2) == create(NAME, num_classes=2, **options)
    save(named, tmp_path / "recipe.yaml")
    assert read(tmp_path / "recipe.yaml") == named
    with pytest.raises(RecipeError, match="head_layers, binary shape jaxft's own networks"):
        named.check_own_network()
