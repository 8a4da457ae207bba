"""The networks against torch's: recorded outputs always, torch itself where it is installed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_golden
from record_golden import CASES, GOLDEN, NUM_CLASSES

from jaxft.models import create
from jaxft.weights.names import torch_tensors

# Relative to the largest value of each array.
TOLERANCE = {"eval": 1e-5, "train": 1e-4, "running": 1e-5}


def seeded(model):
    """The recorder's weights as our trees."""
    tensors = torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))
    arrays = record_golden.weights({t.name: t.shape for t in jax.tree.leaves(tensors)})
    return jax.tree.map(lambda t: jnp.asarray(t.from_torch(arrays[t.name])), tensors)


def images(side: int, batch: int = 2) -> jax.Array:
    return jnp.asarray(record_golden.images(side, batch).transpose(0, 2, 3, 1))


@cache
def ours(case: str) -> dict[str, np.ndarray]:
    """What `record_golden.record` gives, from our network."""
    network, stride_in_1x1, sides, train = CASES[case]
    model = create(network, num_classes=NUM_CLASSES, stride_in_1x1=stride_in_1x1)
    params, stats = seeded(model)
    run = jax.jit(partial(model.apply, norms="running"))
    outputs = {f"eval_{side}": run(params, stats, images(side))[0] for side in sides}
    if train:
        run = jax.jit(partial(model.apply, norms="batch"))
        logits, stats = run(params, stats, images(sides[0], batch=4))
        tensors = jax.tree.leaves(torch_tensors({}, stats))
        running = {
            t.name: np.asarray(x) for t, x in zip(tensors, jax.tree.leaves(stats), strict=True)
        }
        outputs |= record_golden.digest(logits, running)
    return outputs


def assert_agree(actual: dict, desired: dict, tolerances: dict[str, float]):
    assert actual.keys() == desired.keys()
    for name in actual:
        scale = np.abs(desired[name]).max()
        atol = scale * tolerances[name.split("_")[0]]
        np.testing.assert_allclose(actual[name], desired[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_torchs_recorded(case):
    with np.load(GOLDEN / f"{case}.npz") as golden:
        assert_agree(ours(case), dict(golden), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_torchs_live(case):
    pytest.importorskip("torch")
    live = record_golden.record(case)
    assert_agree(ours(case), live, TOLERANCE)
    with np.load(GOLDEN / f"{case}.npz") as golden:
        assert_agree(live, dict(golden), TOLERANCE)


# torchvision's documented counts; He et al. 2015, table 6, rounds the others.
SIZES = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=SIZES)
def test_number_of_parameters(name, size):
    model = create(name, num_classes=10 if name.startswith("cifar") else 1000)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


def test_initialisation_is_torchvisions():
    params, stats = create("cifar_resnet56", num_classes=500).init(jax.random.key(0))
    conv = params["layer3"]["4"]["conv1"]["kernel"]
    assert float(conv.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert abs(float(conv.mean())) < 1e-3
    for leaf in params["fc"].values():
        assert float(leaf.min()) == pytest.approx(-1 / 8, rel=0.03)
        assert float(leaf.max()) == pytest.approx(1 / 8, rel=0.03)
    norm, running = params["layer3"]["4"]["bn2"], stats["layer3"]["4"]["bn2"]
    for leaf, value in ((norm, (0, 1)), (running, (0, 1))):
        for array, constant in zip((leaf[k] for k in sorted(leaf)), value, strict=True):
            np.testing.assert_array_equal(array, constant)


@pytest.mark.parametrize(
    ("images_dtype", "logits_dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float64, jnp.float64)],
    ids=["bfloat16", "float16", "float64"],
)
def test_images_choose_the_compute_dtype(images_dtype, logits_dtype):
    model = create("cifar_resnet8", num_classes=10)
    params, stats = seeded(model)
    exact, _ = jax.jit(partial(model.apply, norms="batch"))(params, stats, images(32))
    with jax.enable_x64(images_dtype == jnp.float64):
        run = jax.jit(partial(model.apply, norms="batch"), static_argnames="last")
        logits, new = run(params, stats, images(32).astype(images_dtype))
        features, _ = run(params, stats, images(32).astype(images_dtype), last="layer3")
    assert (logits.dtype, features.dtype) == (logits_dtype, images_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, exact, atol=0.1)
