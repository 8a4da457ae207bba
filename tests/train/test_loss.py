"""The loss against torch, and independent draws of erasing, mixing and dropout."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import SGD, Focal, Recipe, Stage, data, models, partition, plan
from jaxft.data import Batch, Preprocessing
from jaxft.devices import Devices
from jaxft.models.norm_modes import norm_modes
from jaxft.train.eval_step import eval_step
from jaxft.train.loss import Loss
from jaxft.train.metrics import Metrics
from jaxft.train.stage_program import build_program
from jaxft.train.train_step import StepConfig, TrainState, train_step

LOGITS = np.array([[2, -1, 0.5], [0.1, 0.2, 0.3], [-3, 4, 1], [1.5, 1.5, -2]], np.float32)
TARGET = np.array([0, 2, 1, 2], np.int32)
RECORDED = {  # torch 2.13.0, CrossEntropyLoss(weight, label_smoothing=...) in float64
    (None, 0.0): 1.3752106925039849,
    (None, 0.1): 1.4402106926654141,
    (None, 0.9): 1.9602106939568482,
    ((1.0, 2.0, 0.5), 0.0): 0.7363151119700042,
    ((1.0, 2.0, 0.5), 0.1): 0.8660415151344037,
    ((1.0, 2.0, 0.5), 0.9): 1.9038527404496,
    ((0.0, 3.0, 0.25), 0.0): 0.4145387985722061,
    ((0.0, 3.0, 0.25), 0.1): 0.5426348142328321,
    ((0.0, 3.0, 0.25), 0.9): 1.5674029395178404,
}
MODEL = models.create("cifar_resnet8", num_classes=5)
PREPROCESSING = Preprocessing(image_size=8, resize_size=None)
KEY = jax.random.key(3)
EVERYTHING = Loss(
    label_smoothing=0.1, class_weights=(1, 2, 3, 4, 5), random_erasing=0.7, mixup=0.3, cutmix=1.0
)


def batch(rows=8, real=8):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (rows, 8, 8, 3), np.uint8)
    target, mask = rng.integers(0, 5, rows).astype(np.int32), np.arange(rows) < real
    return Batch(image, target, mask)


def mean_loss(objective, logits, targets, mask):
    losses, weights = objective.losses(logits, targets), objective.weights(targets)
    return jnp.sum(losses, where=mask) / jnp.sum(weights, where=mask)


@pytest.mark.parametrize(("weights", "smoothing"), RECORDED, ids=str)
def test_cross_entropy_is_torchs(weights, smoothing):
    objective = Loss(class_weights=weights, label_smoothing=smoothing)
    mask = np.array([True] * 4 + [False] * 2)
    padded = np.concatenate([LOGITS, [[9, 9, -9]] * 2]), np.concatenate([TARGET, [1, 2]])

    @jax.jit
    def loss(logits, target, mask):
        _, targets = objective.erase_and_mix(
            jnp.zeros((len(target), 8, 8, 3)), target, mask, 3, KEY
        )
        return mean_loss(objective, logits, targets, mask)

    expected = RECORDED[weights, smoothing]
    np.testing.assert_allclose(loss(LOGITS, TARGET, mask[:4]), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(*padded, mask), expected, rtol=1e-6)


@pytest.mark.parametrize(("weights", "smoothing"), RECORDED, ids=str)
def test_cross_entropy_gradient_is_torchs(weights, smoothing):
    torch = pytest.importorskip("torch")
    objective = Loss(class_weights=weights, label_smoothing=smoothing)
    rng = np.random.default_rng(1)
    logits, target = rng.normal(size=(7, 3)).astype(np.float32), rng.integers(0, 3, 7)
    onehot, mask = jax.nn.one_hot(target, 3), np.ones(7, bool)
    value, gradient = jax.value_and_grad(partial(mean_loss, objective))(
        jnp.asarray(logits), onehot, mask
    )
    theirs = torch.tensor(logits, requires_grad=True)
    weight = None if weights is None else torch.tensor(weights)
    criterion = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    expected = criterion(theirs, torch.tensor(target))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)], ids=str)
def test_cross_entropy_sum_is_torchs(weights):
    torch = pytest.importorskip("torch")
    objective = Loss(class_weights=weights, label_smoothing=0.1, reduction="sum")
    onehot, mask = jax.nn.one_hot(TARGET, 3), np.ones(4, bool)

    def summed(logits):
        total = jnp.sum(objective.weights(onehot))
        return objective.reduced(mean_loss(objective, logits, onehot, mask), total)

    value, gradient = jax.value_and_grad(summed)(jnp.asarray(LOGITS))
    theirs = torch.tensor(LOGITS, requires_grad=True)
    weight = None if weights is None else torch.tensor(weights)
    criterion = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, reduction="sum")
    expected = criterion(theirs, torch.tensor(TARGET).long())
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-7)


@cache
def compiled(objective):
    return jax.jit(objective.erase_and_mix, static_argnums=3)


def varied(objective, batch, key=KEY):
    images = PREPROCESSING.normalize(batch.image)
    images, targets = compiled(objective)(images, batch.target, batch.mask, 5, key)
    return np.asarray(images), np.asarray(targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [Loss(mixup=0.3), Loss(cutmix=1.0), Loss(mixup=0.3, cutmix=1.0), EVERYTHING],
    ids=["mixup", "cutmix", "either", "everything"],
)
def test_mixup_and_cutmix_ignore_padding(objective):
    full = batch(real=5)
    noisy = full._replace(image=full.image.copy(), target=(full.target + ~full.mask) % 5)
    noisy.image[5:] = 255
    for key in jax.random.split(KEY, 6):
        one, other = varied(objective, full, key), varied(objective, noisy, key)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a[:5], b[:5])
        np.testing.assert_array_equal(one[1][5:], jax.nn.one_hot(full.target[5:], 5))


@pytest.mark.slow
def test_erasing_and_mixup_draw_independently():
    """The draws of one are the same with and without the other."""
    both, erased = Loss(random_erasing=1.0, mixup=0.5), Loss(random_erasing=1.0)
    plain, _ = varied(Loss(), batch())
    mixed, targets = varied(Loss(mixup=0.5), batch())
    boxes = varied(erased, batch())[0] == 0
    assert boxes.any()
    assert (mixed != plain).any()
    together, same = varied(both, batch())
    np.testing.assert_array_equal(same, targets)
    share, rows = targets.max(1).min(), np.where(boxes, 0, plain)
    assert share < 1
    blends = [s * rows + (1 - s) * np.roll(rows, 1, axis=0) for s in (share, 1 - share)]
    assert min(np.abs(together - blend).max() for blend in blends) < 1e-5
    assert not np.array_equal(varied(both, batch(), jax.random.key(4))[0], together)


def prepare(objective, model=MODEL, **options):
    params, stats = model.init(jax.random.key(0))
    (stage,) = plan([Stage("all", {"*": 0.1}, 1)], params)
    norms = norm_modes(params, stats, stage.labels)
    transform = stage.transform(SGD())
    trainable, frozen = partition(params, stage.labels)
    state = jax.tree.map(jnp.copy, TrainState(trainable, stats, transform.init(params)))
    step = train_step(
        StepConfig(
            model=model,
            transform=transform,
            preprocessing=PREPROCESSING,
            norms=norms,
            loss=objective,
            **options,
        )
    )
    return step, state, frozen


@pytest.mark.slow
def test_label_smoothing_changes_loss_but_not_counts():
    sums = []
    for objective in (Loss(label_smoothing=0.3), Loss()):
        step, state, frozen = prepare(objective)
        sums.append(step(state, frozen, batch(real=5), KEY)[1].metrics)
    assert [int(s.examples) for s in sums] == [5, 5]
    assert int(sums[0].correct) == int(sums[1].correct)  # smoothing changes no image
    assert float(sums[0].loss) != float(sums[1].loss)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_sum_reduction_scales_the_step_by_rows(accumulate):
    """Also when accumulated with a last part of padding; the recorded loss stays the mean."""
    moved, losses = [], []
    for reduction in ("mean", "sum"):
        step, state, frozen = prepare(Loss(reduction=reduction), accumulate=accumulate)
        start = jax.device_get(state.trainable)
        state, record = step(state, frozen, batch(real=5), KEY)
        moved.append(jax.tree.map(lambda a, b: a - b, state.trainable, start))
        losses.append(float(record.metrics.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for mean, summed in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(summed, 5 * mean, rtol=1e-3, atol=1e-6)


def test_objective_of_recipe():
    start = jax.eval_shape(MODEL.init, KEY)
    stages = (Stage("all", {"*": 0.1}, 1),)
    fields = {"reduction": "sum", "label_smoothing": 0.1, "random_erasing": 0.2, "mixup": 0.3}
    recipe = Recipe(model=MODEL.name, data="random", stages=stages, **fields)
    source = data.arrays(*batch()[:2], classes="01234")
    prepared = build_program(0, *plan(stages, start[0]), recipe, MODEL, source, Devices(), start)
    assert prepared.loss == Loss(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["cross_entropy", "bce", Focal()], ids=str)
def test_objective_without_mixing_ignores_padding(function):
    objective = dataclasses.replace(
        EVERYTHING, function=function, mixup=0.0, cutmix=0.0, random_erasing=0.0
    )
    after = []
    for rows in (5, 8):
        step, state, frozen = prepare(objective)
        padded = Batch(*(part[:rows] for part in batch(real=5)))
        state, sums = step(state, frozen, padded, KEY)
        after.append((state, sums))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_default_objective_compiles_to_plain_step():
    """Options that are off add nothing to the program."""
    texts = []
    for objective in (Loss(), Loss(label_smoothing=0.0, class_weights=None)):
        step, state, frozen = prepare(objective)
        texts.append(step.lower(state, frozen, batch(), KEY).as_text())
    assert texts[0] == texts[1]
    assert "threefry" not in texts[0]
    assert "rng_bit" not in texts[0]


def test_tta_flip_averages_logits_of_both_views():
    """Flipped images score the same, and symmetric ones as without it."""
    start = MODEL.init(jax.random.key(0))
    plain = eval_step(MODEL, PREPROCESSING)
    flip = eval_step(MODEL, PREPROCESSING, tta="flip")
    images = batch()
    mirrored = images._replace(image=images.image[:, :, ::-1])
    a, b = flip(*start, images), flip(*start, mirrored)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
    apart = [float(plain(*start, each).loss) for each in (images, mirrored)]
    assert abs(apart[0] - apart[1]) > 1e-4
    assert float(a.loss) <= np.mean(apart)
    symmetric = images._replace(image=np.maximum(images.image, mirrored.image))
    np.testing.assert_allclose(
        flip(*start, symmetric).loss, plain(*start, symmetric).loss, rtol=1e-6
    )


SOFT = ((0.7, 0.0, 0.3), (0.3, 0.7, 0.0), (0.0, 0.3, 0.7))


@pytest.mark.parametrize(
    ("mixup", "smoothing", "reduction", "expected"),
    [
        # torch 2.13's CrossEntropyLoss(weight, label_smoothing, reduction), in float64
        (0.0, 0.0, "mean", 0.728001059069557),
        (0.0, 0.1, "mean", 0.78092730471134),
        (0.2, 0.0, "mean", 1.0611292897126103),
        (0.2, 0.1, "mean", 1.1016971042148775),
        (0.0, 0.1, "sum", 2.73324556648969),
        (0.2, 0.1, "sum", 3.305091312644633),
    ],
)
def test_class_weights_with_soft_targets_are_torchs(mixup, smoothing, reduction, expected):
    objective = Loss(
        class_weights=(0.5, 2.0, 1.0), label_smoothing=smoothing, mixup=mixup, reduction=reduction
    )
    targets = jnp.array(SOFT if mixup else np.eye(3))
    logits = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [-1.0, 0.5, 2.0]])
    total = objective.weights(targets).sum()
    mean = objective.losses(logits, targets).sum() / total
    np.testing.assert_allclose(objective.reduced(mean, total), expected, rtol=1e-6)


def test_smoothed_bce_is_timms():
    objective = Loss(function="bce", label_smoothing=0.1)
    mask = np.ones(4, bool)
    _, targets = objective.erase_and_mix(jnp.zeros((4, 8, 8, 3)), TARGET, mask, 3, KEY)
    found = mean_loss(objective, LOGITS, targets, mask)
    # timm 1.0.31, BinaryCrossEntropy(smoothing=0.1) in float64
    np.testing.assert_allclose(found, 0.8900759157230694, rtol=1e-6)


@pytest.mark.parametrize("function", ["bce", Focal(1.0, 0.3), "test_loss:squares"], ids=str)
def test_class_weights_multiply_losses_of_images(function):
    """Their mean divides by the sum of the weights, or with mixup by the number of images."""
    weights, onehot = np.array([0.5, 2.0, 1.0], np.float32), np.eye(3, dtype=np.float32)[TARGET]
    each = Loss(function=function).losses(LOGITS, onehot)
    objective = Loss(function=function, class_weights=tuple(weights.tolist()))
    expected = np.sum(weights[TARGET] * each) / weights[TARGET].sum()
    np.testing.assert_allclose(
        mean_loss(objective, LOGITS, onehot, np.ones(4, bool)), expected, rtol=1e-6
    )
    soft, mixing = np.array(SOFT, np.float32), dataclasses.replace(objective, mixup=0.2)
    each = Loss(function=function).losses(LOGITS[:3], soft)
    found = mean_loss(mixing, LOGITS[:3], soft, np.ones(3, bool))
    np.testing.assert_allclose(found, np.sum(soft @ weights * each) / 3, rtol=1e-6)


def squares(logits, targets):
    """A loss of a user that hides NaN."""
    return jnp.sum((jnp.nan_to_num(logits) - targets) ** 2, -1)


def test_own_loss_receives_smoothed_and_mixed_probabilities():
    images, real = batch(real=5), np.arange(8) < 5
    plain = Loss(mixup=0.3)
    smoothed = dataclasses.replace(plain, function="test_loss:squares", label_smoothing=0.2)
    _, targets = varied(plain, images)
    _, same = varied(smoothed, images)
    np.testing.assert_array_equal(same, targets)
    logits = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    expected = np.sum((logits - (0.8 * targets + 0.2 / 5)) ** 2, -1)
    np.testing.assert_allclose(smoothed.losses(logits, targets)[real], expected[real], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["bce", Focal(), "test_loss:squares"], ids=str)
def test_nan_of_logits_is_nan_of_any_loss(function):
    step, state, frozen = prepare(Loss(function=function))
    assert step(state, frozen, batch(), KEY)[1].finite
    step, state, frozen = prepare(Loss(function=function))
    state.trainable["fc"]["bias"] = state.trainable["fc"]["bias"].at[0].set(jnp.nan)
    _, record = step(state, frozen, batch(), KEY)
    assert not record.finite
    assert jnp.isnan(record.metrics.loss)
    logits, mask = jnp.asarray(LOGITS).at[1, 0].set(jnp.nan), np.ones(4, bool)
    assert jnp.isnan(Metrics.of_batch(logits, TARGET, mask, function).loss)
    mask[1] = False
    assert jnp.isfinite(Metrics.of_batch(logits, TARGET, mask, function).loss)
