"""Augmentation on the device: pixels equal the host's to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxft.data import BatchConfig, Preprocessing, View, arrays, device_augment, train_batches
from jaxft.data.augment import VIEWS
from jaxft.data.autoaugment import RandAugment
from jaxft.data.batches import Crops
from jaxft.data.color import ColorJitter
from jaxft.data.device_augment import augment_batch
from jaxft.devices import Devices
from jaxft.steps_per_execution import sent

RNG = np.random.default_rng(0)


def images(high, size, step=1):
    return RNG.integers(0, high, (64, size, size, 3), np.uint8) * np.uint8(step)


CONSTANT = RNG.integers(0, 255, (64, 1, 1, 3), np.uint8)
IMAGES = {
    "noise": images(256, 24),
    "black and white": images(2, 24, 255),
    "constant": CONSTANT + images(1, 24),
    "almost constant": CONSTANT + images(2, 16),  # means of the gray image near n + 1/2
    "odd size": images(256, 15),
}
MOVING = [name for name, view in VIEWS.items() if view.runs_on_device]
FACTORS = [*RNG.uniform(0.6, 1.4, 100), *RNG.uniform(0, 3, 50), *10 ** RNG.uniform(-9, 2, 50), 0, 1]
LEVELS = np.arange(256, dtype=np.uint8)


def batches(pixels, augment, *, on_device, epochs=10):
    size = pixels.shape[1]
    config = BatchConfig(
        preprocessing=Preprocessing(image_size=size, resize_size=size), augment=augment,
        batch_size=64, rows=66, seed=0, stage=0, augment_on_device=on_device,
    )  # fmt: skip
    values = "uint8" if pixels.dtype == np.uint8 else "normalized"
    source = arrays(pixels, np.arange(64) % 2, ["a", "b"], values=values)
    return train_batches(source, config, epochs=epochs)


def assert_device_equals_host(pixels, augment):
    devices = Devices()
    pairs = zip(*(batches(pixels, augment, on_device=x) for x in (False, True)), strict=True)
    changed = 0
    for host, device in pairs:
        changed += (host.image != device.image.images).any()
        (batch,) = sent(devices, [device], 1)
        found = augment_batch(batch, augment)
        np.testing.assert_array_equal(found.image, host.image)
    assert changed


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("augment", MOVING)
def test_device_augment_equals_host(augment, kind):
    if (augment, kind) in (("flip", "constant"), ("crop_flip", "constant")):
        return  # flips do not change them
    assert_device_equals_host(IMAGES[kind], augment)


def test_device_augment_moves_float_images():
    assert_device_equals_host(RNG.normal(size=(64, 10, 10, 3)).astype(np.float32), "shift_flip")


@pytest.mark.parametrize(
    "jitter",
    [
        ColorJitter(brightness=0.9),
        ColorJitter(contrast=0.9, saturation=0.9),
        ColorJitter(brightness=3, contrast=3, saturation=3),
    ],
    ids=str,
)
def test_device_augment_equals_host_with_other_factors(jitter):
    assert_device_equals_host(IMAGES["noise"], View(crop="shift", color_jitter=jitter))


def test_device_augment_of_stacked_batches():
    both = [list(batches(IMAGES["noise"], "jitter", on_device=x, epochs=3)) for x in (False, True)]
    stacked, count = sent(Devices(), both[1], 4)
    found = augment_batch(stacked, "jitter")
    assert count == 3
    for host, image in zip(both[0], found.image[:3], strict=True):
        np.testing.assert_array_equal(image, host.image)


def blended(factors):
    """Blends all pairs of levels on the device, [f 256 256]."""
    base, level = (x.astype(np.float32) for x in np.meshgrid(LEVELS, LEVELS))
    blend = jax.jit(jax.vmap(lambda factor: device_augment._blend(base, level, factor)))
    return np.asarray(blend(jnp.asarray(factors, jnp.float32))).astype(np.uint8)


def test_device_blend_equals_pillow_for_all_levels():
    pair = [Image.fromarray(levels) for levels in np.meshgrid(LEVELS, LEVELS)]
    expected = [Image.blend(*pair, factor) for factor in FACTORS]
    np.testing.assert_array_equal(blended(FACTORS), np.stack(expected))


@pytest.mark.parametrize("fuses", [False, True])
def test_device_blend_rounds_as_pillow_is_compiled(fuses, monkeypatch):
    monkeypatch.setattr(device_augment, "_pillow_fuses", lambda: fuses)
    base, level = np.meshgrid(LEVELS.astype(np.float64), LEVELS.astype(np.float64))
    factors = np.float32(FACTORS[:100])
    products = [factor * (level - base) for factor in factors.astype(np.float64)]
    if not fuses:
        products = np.float32(products)
    sums = np.float32(base + np.asarray(products))
    np.testing.assert_array_equal(blended(factors), np.clip(sums, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (VIEWS["none"], False),
        (VIEWS["crop_flip"], True),
        (VIEWS["shift"], True),
        (VIEWS["randaugment"], False),
        (View(hflip=0.5, vflip=0.5), False),
        (View(policy=RandAugment()), False),
        (View(color_jitter=ColorJitter(saturation=0.1)), True),
        (View(hflip=0.5, color_jitter=ColorJitter(hue=0.1)), False),
    ],
    ids=str,
)
def test_runs_on_device(view, expected):
    assert view.runs_on_device == expected
    (batch,) = batches(IMAGES["odd size"], view, on_device=True, epochs=1)
    assert isinstance(batch.image, Crops) == expected
