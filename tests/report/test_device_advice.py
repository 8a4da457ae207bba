"""Remarks on settings that waste time on an accelerator."""

from types import SimpleNamespace

import pytest

from jaxft import models
from jaxft.batch_sizes import BatchSizes
from jaxft.report.device_advice import device_advice


class Devices:
    def __init__(self, platform, count):
        self.platform, self.count = platform, count

    def __len__(self):
        return self.count


def advice(platform, *, batch_size=64, chips=1, dtype="bfloat16"):
    model = models.create("cifar_resnet8", num_classes=2, dtype=dtype)
    sizes = BatchSizes(batch_size, batch_size, batch_size, batch_size, masked=True)
    return device_advice(model, [sizes, sizes], Devices(platform, chips))


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_device_advice_on_float32(platform):
    (remark,) = advice(platform, dtype="float32")
    assert "--dtype bfloat16" in remark
    assert ("matmul_precision" in remark) == (platform == "tpu")
    assert advice(platform) == []


def test_device_advice_is_silent_on_cpu_and_for_networks_of_the_user():
    assert advice("cpu", dtype="float32", batch_size=3) == []
    assert device_advice(SimpleNamespace(options={}), [], Devices("tpu", 1)) == []


@pytest.mark.parametrize(
    ("batch_size", "chips", "fitting"),
    [(1003, 8, 960), (100, 8, 64), (12, 1, 8), (3, 1, 8), (30, 8, 64)],
)
def test_device_advice_on_batches_that_pad(batch_size, chips, fitting):
    (remark,) = advice("tpu", batch_size=batch_size, chips=chips)
    assert remark.endswith(f"such as batch_size {fitting:,}.")


@pytest.mark.parametrize(("batch_size", "chips"), [(1024, 8), (64, 8), (8, 1), (1000, 1)])
def test_device_advice_is_silent_on_batches_that_fit(batch_size, chips):
    assert advice("tpu", batch_size=batch_size, chips=chips) == []
