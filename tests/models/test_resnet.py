"""Networks against PyTorch: recorded outputs always, PyTorch itself if it is installed."""

import ctypes
import gc
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_golden
from record_golden import CASES, COMPARED, GOLDEN, NUM_CLASSES, TENSORS

from jaxft.models import create
from jaxft.models.networks import resnet_variants
from jaxft.weights.key_maps import torch_tensors

# Relative to the largest value of each array. Both sides compute the training step in float64.
TOLERANCE = {"eval": 1e-5, "train": 1e-9}
STATISTICS_TOLERANCE = 1e-9
SMOKE = ("resnet10t", "cifar_resnet20")


@cache
def network(case: str):
    """Returns the network of a case, and its arrays as torch's tensors `(params, stats)`."""
    name, options = CASES[case]
    model = create(name, num_classes=NUM_CLASSES, **options)
    return model, torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))


def seeded_trees(case: str):
    """The weights of `record_golden` as `(params, stats)`."""
    _, tensors = network(case)
    arrays = record_golden.weights({t.name: t.shape for t in jax.tree.leaves(tensors)})
    return jax.tree.map(lambda t: jax.device_put(t.from_torch(arrays[t.name])), tensors)


def images(side: int, batch: int = 2) -> jax.Array:
    return jnp.asarray(record_golden.images(side, batch).transpose(0, 2, 3, 1))


def evaluate(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes the results of `record_golden.record` with jaxft's network, without `jax.jit`.

    This is faster than compiling 30 programs, because the networks share most operations.
    """
    model, _ = network(case)
    params, stats = seeded_trees(case)
    outputs = {}
    for side in COMPARED[case]:
        outputs[f"eval_{side}"], _ = model.apply(params, stats, images(side), norms="running")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, stats))
        batch = images(record_golden.train_side(case), batch=4).astype(jnp.float64)
        outputs["train"], stats = model.apply(*wide, batch, norms="batch")
    return outputs, running(stats)


def running(stats) -> dict[str, np.ndarray]:
    """The running statistics by torch's names."""
    tensors = jax.tree.leaves(torch_tensors({}, stats))
    arrays = map(np.asarray, jax.tree.leaves(stats))
    return dict(zip((t.name for t in tensors), arrays, strict=True))


def assert_agree(actual: Mapping, expected: Mapping):
    for name in expected:
        atol = np.abs(expected[name]).max() * TOLERANCE.get(
            name.split("_")[0], STATISTICS_TOLERANCE
        )
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=atol, err_msg=name)


def test_every_registered_resnet_has_a_recorded_case():
    assert {network for network, _ in CASES.values()} == {*resnet_variants.CONFIGS}


@pytest.mark.parametrize("case", CASES)
def test_resnet_tensors_have_torchs_names_and_shapes(case):
    tensors = jax.tree.leaves(network(case)[1])
    shapes = {t.name: t.shape for t in tensors}
    assert len(shapes) == len(tensors)
    with np.load(TENSORS) as recorded:
        assert record_golden.listing(shapes) == str(recorded[case], "ascii")


@pytest.mark.slow
@pytest.mark.skipif(not record_golden.originals_are_here(), reason="needs the torch extra")
def test_recorded_tensors_are_torchs():
    with np.load(TENSORS) as recorded:
        assert recorded.keys() == CASES.keys()
        for case in CASES:
            live = record_golden.listing(record_golden.shapes(case))
            assert str(recorded[case], "ascii") == live, case


def test_networks_without_recorded_outputs_differ_in_depths_and_widths_alone():
    def kind(case):
        config = network(case)[0].config
        return replace(config, depths=(), groups=1, base_width=64)

    assert {kind(case) for case in CASES} == {kind(case) for case in COMPARED}
    compared = [network(case)[0].config for case in COMPARED]
    assert max(max(config.depths) for config in compared) > 10
    assert any(config.groups > 1 for config in compared)
    assert any(config.base_width > 64 for config in compared)


@pytest.fixture
def release_memory():
    """Returns freed memory to the system after a test; glibc would keep gigabytes."""
    yield
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.smoke] * (case in SMOKE)) for case in COMPARED],
)
@pytest.mark.usefixtures("release_memory")
def test_resnet_outputs_and_statistics_equal_torchs(case):
    """Compares logits in eval mode, and logits and statistics of a training step."""
    outputs, statistics = evaluate(case)
    with np.load(GOLDEN / f"{case}.npz") as golden:
        recorded = dict(golden)
    digest = record_golden.digest(outputs["train"], statistics)
    np.testing.assert_allclose(digest["sizes"], recorded.pop("sizes"), rtol=STATISTICS_TOLERANCE)
    directions = recorded.pop("directions")
    np.testing.assert_allclose(digest["directions"], directions, rtol=0, atol=STATISTICS_TOLERANCE)
    assert outputs.keys() == recorded.keys()
    assert_agree(outputs, recorded)
    if record_golden.originals_are_here():
        live, live_statistics = record_golden.record(case)
        assert (live.keys(), live_statistics.keys()) == (outputs.keys(), statistics.keys())
        assert_agree(outputs, live)
        assert_agree(statistics, live_statistics)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["resnet18", "resnet26t", "cifar_resnet20"])
def test_resnet_compiled_float32_training_equals_torchs(case):
    model, _ = network(case)
    batch = images(record_golden.train_side(case), batch=4)
    logits, stats = jax.jit(partial(model.apply, norms="batch"))(*seeded_trees(case), batch)
    with np.load(GOLDEN / f"{case}.npz") as golden:
        scale = np.abs(golden["train"]).max()
        np.testing.assert_allclose(logits, golden["train"], rtol=0, atol=1e-4 * scale)
        digest = record_golden.digest(logits, running(stats))
        np.testing.assert_allclose(digest["sizes"], golden["sizes"], rtol=1e-5)
        np.testing.assert_allclose(digest["directions"], golden["directions"], rtol=0, atol=1e-5)


# torchvision documents these counts; table 6 of He et al. 2015 rounds the CIFAR ones.
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
def test_resnet_number_of_parameters(name, size):
    model = create(name, num_classes=10 if name.startswith("cifar") else 1000)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


def test_resnet_initialisation_equals_torchvisions():
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images_dtype", "logits_dtype"),
    [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float64, jnp.float64)],
    ids=["bfloat16", "float16", "float64"],
)
def test_resnet_computes_in_the_dtype_of_the_images(images_dtype, logits_dtype):
    model, _ = network("cifar_resnet8")
    params, stats = seeded_trees("cifar_resnet8")
    exact, _ = jax.jit(partial(model.apply, norms="batch"))(params, stats, images(32))
    with jax.enable_x64(images_dtype == jnp.float64):
        run = jax.jit(partial(model.apply, norms="batch"), static_argnames="last")
        logits, new = run(params, stats, images(32).astype(images_dtype))
        features, _ = run(params, stats, images(32).astype(images_dtype), last="layer3")
    assert (logits.dtype, features.dtype) == (logits_dtype, images_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, exact, atol=0.1)
