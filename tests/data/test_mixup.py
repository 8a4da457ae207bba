"""Soft targets, mixup and CutMix: torchvision's formulas, and padding left out of them."""

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
    rng = np.random.default_rng(0)
    images = rng.normal(size=(rows, height, width, 3)).astype(np.float32)
    target = rng.integers(CLASSES, size=rows)
    return jnp.asarray(images), jax.nn.one_hot(target, CLASSES)


def box_by_the_formula(share, x, y, height, width):
    """As in torchvision, in double precision."""
    radius = 0.5 * math.sqrt(1.0 - share)
    across, down = int(radius * width), int(radius * height)
    left, right = max(x - across, 0), min(x + across, width)
    top, bottom = max(y - down, 0), min(y + down, height)
    return left, top, right, bottom


ALL = jnp.ones(6, bool)
BOXES = {"inside": (2, 1, 5, 6), "at the edge": (0, 4, 7, 9), "all": (0, 0, 7, 9), "none": (3,) * 4}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_blend_takes_the_rest_from_the_row_before(share):
    images, targets = batch()
    mixed = jax.jit(mixup.blend)(images, targets, ALL, share)
    for made, rows in zip(mixed, (images, targets), strict=True):
        expected = share * rows + (1 - share) * np.roll(rows, 1, axis=0)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_paste_takes_the_box_from_the_row_before(box):
    images, targets = batch()
    left, top, right, bottom = box
    expected, before = np.array(images), np.roll(images, 1, axis=0)
    expected[:, top:bottom, left:right] = before[:, top:bottom, left:right]
    share = 1 - (right - left) * (bottom - top) / (9 * 7)
    mixed = jax.jit(mixup.paste)(images, targets, ALL, jnp.array(box))
    np.testing.assert_array_equal(mixed.images, expected)
    expected = share * targets + (1 - share) * np.roll(targets, 1, axis=0)
    np.testing.assert_allclose(mixed.targets, expected, rtol=0, atol=1e-6)


def test_cut_boxes_equal_the_formula():
    rng = np.random.default_rng(0)
    for height, width in [(224, 224), (33, 90)]:
        shares = rng.beta(0.7, 0.7, size=2000).astype(np.float32)
        x, y = rng.integers(width, size=2000), rng.integers(height, size=2000)
        made = jax.vmap(functools.partial(mixup.cut_box, height=height, width=width))(shares, x, y)
        expected = [
            box_by_the_formula(*case, height, width)
            for case in zip(shares.tolist(), x.tolist(), y.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(made, expected)


def transform(name, images, targets, **params):
    """torchvision's transform of a batch with what it draws given; as NumPy arrays, [b h w c]."""
    torchvision_transforms()
    import torch
    from torchvision.transforms import v2

    made = getattr(v2, name)(alpha=1.0, num_classes=CLASSES)
    labels = torch.from_numpy(np.array(targets))
    params = {**params, "labels": labels, "batch_size": len(targets)}
    pixels = made.transform(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), params)
    return pixels.permute(0, 2, 3, 1).numpy(), made.transform(labels, params).numpy()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_blend_equals_torchvisions_mixup_live(share):
    expected = transform("MixUp", *batch(), lam=share)
    for made, theirs in zip(mixup.blend(*batch(), ALL, share), expected, strict=True):
        np.testing.assert_allclose(made, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_paste_equals_torchvisions_cutmix_live(box):
    left, top, right, bottom = box
    share = 1 - (right - left) * (bottom - top) / (9 * 7)
    images, targets = transform("CutMix", *batch(), box=box, lam_adjusted=share)
    made = mixup.paste(*batch(), ALL, jnp.array(box))
    np.testing.assert_array_equal(made.images, images)
    np.testing.assert_allclose(made.targets, targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mixer",
    [
        lambda *batch: mixup.blend(*batch, 0.3),
        lambda *batch: mixup.paste(*batch, jnp.array([2, 1, 5, 6])),
    ],
    ids=["blend", "paste"],
)
@pytest.mark.parametrize("real", [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0]])
def test_padding_is_not_mixed_in(mixer, real):
    """Real rows come out as they do from a batch of real rows alone; padding stays as it is."""
    images, targets = batch()
    mask = np.array(real, bool)
    mixed = mixer(images, targets, jnp.asarray(mask))
    alone = mixer(images[mask], targets[mask], jnp.asarray(mask[mask]))
    for made, expected, before in zip(mixed, alone, (images, targets), strict=True):
        np.testing.assert_allclose(made[mask], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(made[~mask], before[~mask])


# What is drawn: many batches of two rows, of different classes, so that the targets show the share.

KEYS = jax.random.split(jax.random.key(0), 3000)
PAIR = (*batch(rows=2)[:1], jnp.eye(2), jnp.ones(2, bool))


@functools.cache
def drawn(name) -> tuple[np.ndarray, np.ndarray]:
    """Images [n b h w c] and targets [n b k] of many draws."""
    mixer = {
        "mixup 0.2": functools.partial(mixup.mixup, alpha=0.2),
        "mixup 1.0": functools.partial(mixup.mixup, alpha=1.0),
        "cutmix 1.0": functools.partial(mixup.cutmix, alpha=1.0),
        "either": functools.partial(mixup.mixup_or_cutmix, mixup_alpha=0.2, cutmix_alpha=1.0),
    }[name]
    images, targets = jax.jit(jax.vmap(lambda key: mixer(key, *PAIR)))(KEYS)
    return np.asarray(images), np.asarray(targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_are_beta_distributed(alpha):
    images, targets = drawn(f"mixup {alpha}")
    share = targets[:, 0, 0]
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    first, second = np.asarray(PAIR[0])
    weight = share[:, None, None, None]
    np.testing.assert_allclose(images[:, 0], weight * first + (1 - weight) * second, atol=1e-5)


def test_boxes_of_cutmix_are_distributed_by_the_formula():
    images, targets = drawn("cutmix 1.0")
    pasted = (images[:, 0] == np.asarray(PAIR[0])[1]).all(axis=-1)
    np.testing.assert_allclose(1 - pasted.mean(axis=(1, 2)), targets[:, 0, 0], atol=1e-6)
    rng = np.random.default_rng(0)
    n = len(KEYS)
    draws = zip(rng.uniform(size=n), rng.integers(7, size=n), rng.integers(9, size=n), strict=True)
    boxes = np.array([box_by_the_formula(share, x, y, 9, 7) for share, x, y in draws])
    left, top, right, bottom = boxes.T
    widths, heights = (pasted.any(axis=k).sum(axis=1) for k in (1, 2))
    areas = (right - left) * (bottom - top)
    assert stats.ks_2samp(widths * heights, areas).pvalue > 0.01
    assert stats.ks_2samp(widths, np.where(areas, right - left, 0)).pvalue > 0.01
    frequency = [((top <= y) & (bottom > y) & (left <= 3) & (right > 3)).mean() for y in range(9)]
    np.testing.assert_allclose(pasted[:, :, 3].mean(axis=0), frequency, atol=0.04)


@pytest.mark.slow
def test_either_is_mixup_half_of_the_time():
    images, _ = drawn("either")
    first, second = np.asarray(PAIR[0])
    # CutMix leaves values as they are, mixup blends them all (unless its share rounds to 1).
    blended = ((images[:, 0] != first) & (images[:, 0] != second)).any(axis=(1, 2, 3))
    assert 0.45 < blended.mean() < 0.52


def test_mixing_repeats_with_its_key():
    mixer = jax.jit(functools.partial(mixup.mixup, alpha=1.0))
    once, again, other = (mixer(KEYS[k], *PAIR).images for k in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_soft_targets():
    made = mixup.soft_targets(jnp.array([2, 0]), 4, smoothing=0.1)
    np.testing.assert_allclose(made, [[0.025, 0.025, 0.925, 0.025], [0.925, *[0.025] * 3]], 1e-6)
    np.testing.assert_array_equal(mixup.soft_targets(jnp.array([1]), 3), [[0, 1, 0]])


def test_soft_targets_are_torchs_label_smoothing_live():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(6, CLASSES)).astype(np.float32)
    targets = batch()[1]
    mixed = mixup.blend(batch()[0], targets, ALL, 0.3).targets
    for soft, theirs in [
        (
            mixup.soft_targets(targets.argmax(1), CLASSES, 0.1),
            torch.tensor(targets.argmax(1).tolist()),
        ),
        ((1 - 0.1) * mixed + 0.1 / CLASSES, torch.tensor(np.array(mixed))),
    ]:
        ours = -(np.asarray(soft) * np.asarray(jax.nn.log_softmax(logits))).sum(1).mean()
        loss = torch.nn.functional.cross_entropy
        expected = loss(torch.from_numpy(logits), theirs, label_smoothing=0.1)
        assert ours == pytest.approx(float(expected), abs=1e-6)
