"""Soft targets, mixup and CutMix equal torchvision's, and skip padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import torchvision_transforms
from scipy import stats

from jaxft.data import mixup

CLASSES = 5


def batch(rows=6, height=9, width=7):
    """Returns random images [b h w 3] and one-hot targets [b k]."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(rows, height, width, 3)).astype(np.float32)
    target = rng.integers(CLASSES, size=rows)
    return jnp.asarray(images), jax.nn.one_hot(target, CLASSES)


def reference_cut_box(lam, x, y, height, width):
    """Returns torchvision's box, in double precision."""
    radius = 0.5 * math.sqrt(1.0 - lam)
    half_width, half_height = int(radius * width), int(radius * height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    return left, top, right, bottom


NO_PADDING = jnp.ones(6, bool)
BOXES = {"inside": (2, 1, 5, 6), "at the edge": (0, 4, 7, 9), "all": (0, 0, 7, 9), "none": (3,) * 4}


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.7, 1.0])
def test_mixup_blends_with_previous_row(lam):
    images, targets = batch()
    mixed = jax.jit(mixup.blend)(images, targets, NO_PADDING, lam)
    for actual, rows in zip(mixed, (images, targets), strict=True):
        expected = lam * rows + (1 - lam) * np.roll(rows, 1, axis=0)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_cutmix_pastes_box_of_previous_row(box):
    images, targets = batch()
    left, top, right, bottom = box
    expected, previous = np.array(images), np.roll(images, 1, axis=0)
    expected[:, top:bottom, left:right] = previous[:, top:bottom, left:right]
    lam = 1 - (right - left) * (bottom - top) / (9 * 7)
    mixed = jax.jit(mixup.paste)(images, targets, NO_PADDING, jnp.array(box))
    np.testing.assert_array_equal(mixed.images, expected)
    expected = lam * targets + (1 - lam) * np.roll(targets, 1, axis=0)
    np.testing.assert_allclose(mixed.targets, expected, rtol=0, atol=1e-6)


def test_cutmix_boxes_equal_reference():
    rng = np.random.default_rng(0)
    for height, width in [(224, 224), (33, 90)]:
        lams = rng.beta(0.7, 0.7, size=2000).astype(np.float32)
        x, y = rng.integers(width, size=2000), rng.integers(height, size=2000)
        cut_box = functools.partial(mixup.cut_box, height=height, width=width)
        actual = jax.vmap(cut_box)(lams, x, y)
        expected = [
            reference_cut_box(*case, height, width)
            for case in zip(lams.tolist(), x.tolist(), y.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(actual, expected)


def torchvision_transform(name, images, targets, **params):
    """Applies torchvision's transform with given random parameters; returns NumPy arrays."""
    torchvision_transforms()
    import torch
    from torchvision.transforms import v2

    transform = getattr(v2, name)(alpha=1.0, num_classes=CLASSES)
    labels = torch.from_numpy(np.array(targets))
    params = {**params, "labels": labels, "batch_size": len(targets)}
    pixels = transform.transform(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), params)
    return pixels.permute(0, 2, 3, 1).numpy(), transform.transform(labels, params).numpy()


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9])
def test_mixup_equals_torchvision_live(lam):
    mixed = mixup.blend(*batch(), NO_PADDING, lam)
    for actual, expected in zip(
        mixed, torchvision_transform("MixUp", *batch(), lam=lam), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_cutmix_equals_torchvision_live(box):
    left, top, right, bottom = box
    lam = 1 - (right - left) * (bottom - top) / (9 * 7)
    images, targets = torchvision_transform("CutMix", *batch(), box=box, lam_adjusted=lam)
    mixed = mixup.paste(*batch(), NO_PADDING, jnp.array(box))
    np.testing.assert_array_equal(mixed.images, images)
    np.testing.assert_allclose(mixed.targets, targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mixer",
    [
        lambda *batch: mixup.blend(*batch, 0.3),
        lambda *batch: mixup.paste(*batch, jnp.array([2, 1, 5, 6])),
    ],
    ids=["blend", "paste"],
)
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
def test_mixup_and_cutmix_skip_padding(mixer, mask):
    """Real rows equal the rows of a batch without padding; padding is unchanged."""
    images, targets = batch()
    mask = np.array(mask, bool)
    mixed = mixer(images, targets, jnp.asarray(mask))
    unpadded = mixer(images[mask], targets[mask], jnp.asarray(mask[mask]))
    for actual, expected, rows in zip(mixed, unpadded, (images, targets), strict=True):
        np.testing.assert_allclose(actual[mask], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(actual[~mask], rows[~mask])


# Distributions. Batches have two rows of different classes, so that the targets show lam.

KEYS = jax.random.split(jax.random.key(0), 3000)
PAIR = (*batch(rows=2)[:1], jnp.eye(2), jnp.ones(2, bool))


@functools.cache
def random_batches(name) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [n b h w c] and targets [n b k] for all keys."""
    mixer = {
        "mixup 0.2": functools.partial(mixup.mixup, alpha=0.2),
        "mixup 1.0": functools.partial(mixup.mixup, alpha=1.0),
        "cutmix 1.0": functools.partial(mixup.cutmix, alpha=1.0),
        "either": functools.partial(mixup.mixup_or_cutmix, mixup_alpha=0.2, cutmix_alpha=1.0),
    }[name]
    images, targets = jax.jit(jax.vmap(lambda key: mixer(key, *PAIR)))(KEYS)
    return np.asarray(images), np.asarray(targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_coefficient_is_beta_distributed(alpha):
    images, targets = random_batches(f"mixup {alpha}")
    lam = targets[:, 0, 0]
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    first, second = np.asarray(PAIR[0])
    lam = lam[:, None, None, None]
    np.testing.assert_allclose(images[:, 0], lam * first + (1 - lam) * second, atol=1e-5)


def test_cutmix_boxes_are_distributed_as_reference():
    images, targets = random_batches("cutmix 1.0")
    pasted = (images[:, 0] == np.asarray(PAIR[0])[1]).all(axis=-1)
    np.testing.assert_allclose(1 - pasted.mean(axis=(1, 2)), targets[:, 0, 0], atol=1e-6)
    rng = np.random.default_rng(0)
    n = len(KEYS)
    draws = zip(rng.uniform(size=n), rng.integers(7, size=n), rng.integers(9, size=n), strict=True)
    boxes = np.array([reference_cut_box(lam, x, y, 9, 7) for lam, x, y in draws])
    left, top, right, bottom = boxes.T
    widths, heights = (pasted.any(axis=k).sum(axis=1) for k in (1, 2))
    areas = (right - left) * (bottom - top)
    assert stats.ks_2samp(widths * heights, areas).pvalue > 0.01
    assert stats.ks_2samp(widths, np.where(areas, right - left, 0)).pvalue > 0.01
    frequency = [((top <= y) & (bottom > y) & (left <= 3) & (right > 3)).mean() for y in range(9)]
    np.testing.assert_allclose(pasted[:, :, 3].mean(axis=0), frequency, atol=0.04)


@pytest.mark.slow
def test_mixup_or_cutmix_is_mixup_half_of_the_time():
    images, _ = random_batches("either")
    first, second = np.asarray(PAIR[0])
    # CutMix copies pixels; mixup changes all of them, unless lam rounds to 1.
    blended = ((images[:, 0] != first) & (images[:, 0] != second)).any(axis=(1, 2, 3))
    assert 0.45 < blended.mean() < 0.52


def test_mixup_depends_on_the_key_alone():
    mixer = jax.jit(functools.partial(mixup.mixup, alpha=1.0))
    first, repeated, other = (mixer(KEYS[k], *PAIR).images for k in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert (first != other).any()


def test_soft_targets():
    smoothed = mixup.soft_targets(jnp.array([2, 0]), 4, smoothing=0.1)
    np.testing.assert_allclose(
        smoothed, [[0.025, 0.025, 0.925, 0.025], [0.925, *[0.025] * 3]], 1e-6
    )
    np.testing.assert_array_equal(mixup.soft_targets(jnp.array([1]), 3), [[0, 1, 0]])


def test_soft_targets_equal_torch_label_smoothing_live():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(6, CLASSES)).astype(np.float32)
    targets = batch()[1]
    mixed = mixup.blend(batch()[0], targets, NO_PADDING, 0.3).targets
    for soft, torch_targets in [
        (
            mixup.soft_targets(targets.argmax(1), CLASSES, 0.1),
            torch.tensor(targets.argmax(1).tolist()),
        ),
        ((1 - 0.1) * mixed + 0.1 / CLASSES, torch.tensor(np.array(mixed))),
    ]:
        actual = -(np.asarray(soft) * np.asarray(jax.nn.log_softmax(logits))).sum(1).mean()
        cross_entropy = torch.nn.functional.cross_entropy
        expected = cross_entropy(torch.from_numpy(logits), torch_targets, label_smoothing=0.1)
        assert actual == pytest.approx(float(expected), abs=1e-6)
