"""Advice to a run that waits for its images."""

import pytest

from jaxft.train.metrics import EpochMetrics

BOTH = (
    "Reading images took 63% of epoch 2: more workers (--workers) or a larger --cache-mib would "
    "help."
)
MORE_WORKERS = "Reading images took 63% of epoch 2: more workers (--workers) would help."
MORE_MEMORY = "Reading images took 63% of epoch 2: a larger --cache-mib would help."
OFTEN = EpochMetrics(seconds=10.0, idle=6.3)


@pytest.mark.parametrize(
    ("metrics", "epoch", "workers", "cached", "expected"),
    [
        (OFTEN, 2, 2, False, BOTH),
        (OFTEN, 2, 2, True, MORE_WORKERS),
        (OFTEN, 2, 4, False, MORE_MEMORY),
        (OFTEN, 2, 4, True, None),
        (OFTEN, 1, 2, False, None),
        (EpochMetrics(seconds=10.0, idle=2.9), 2, 2, False, None),
        (EpochMetrics(seconds=2.0, idle=1.9), 2, 2, False, None),
        (EpochMetrics(seconds=0.0, idle=0.0), 2, 2, False, None),
    ],
    ids=[
        "both help", "all cached", "all cores", "nothing helps", "first epoch", "seldom", "short",
        "one step",
    ],
)  # fmt: skip
def test_input_advice(metrics, epoch, workers, cached, expected):
    assert metrics.input_advice(epoch, workers=workers, cores=4, cached=cached) == expected
