"""Advice to a run that waits for its images."""

import pytest

from jaxft.train.metrics import EpochMetrics

BOTH = (
    "Reading images took 63% of epoch 2: more workers (--workers) or a larger --cache-mib would "
    "help."
)
PROCESSES = (
    "Reading images took 63% of epoch 2: processes in place of threads (--worker-processes) would "
    "help."
)
MORE_PROCESSES = (
    "Reading images took 63% of epoch 2: more processes (--worker-processes) or a larger "
    "--cache-mib would help."
)
MORE_WORKERS = "Reading images took 63% of epoch 2: more workers (--workers) would help."
MORE_MEMORY = "Reading images took 63% of epoch 2: a larger --cache-mib would help."
OFTEN = EpochMetrics(seconds=10.0, idle=6.3)


@pytest.mark.parametrize(
    ("metrics", "epoch", "workers", "cached", "expected"),
    [
        (OFTEN, 2, (2, 0), False, BOTH),
        (OFTEN, 2, (2, 0), True, MORE_WORKERS),
        (OFTEN, 2, (16, 0), False, MORE_MEMORY),
        (OFTEN, 2, (16, 0), True, None),
        (OFTEN, 2, (8, 0), True, PROCESSES),
        (OFTEN, 2, (2, 8), False, MORE_PROCESSES),
        (OFTEN, 2, (2, 16), True, None),
        (OFTEN, 1, (2, 0), False, None),
        (EpochMetrics(seconds=10.0, idle=2.9), 2, (2, 0), False, None),
        (EpochMetrics(seconds=2.0, idle=1.9), 2, (2, 0), False, None),
        (EpochMetrics(seconds=0.0, idle=0.0), 2, (2, 0), False, None),
    ],
    ids=[
        "both help", "all cached", "all cores", "nothing helps", "many threads", "few processes",
        "as many processes as cores", "first epoch", "seldom", "short", "one step",
    ],
)  # fmt: skip
def test_input_advice(metrics, epoch, workers, cached, expected):
    threads, processes = workers
    advice = metrics.input_advice(
        epoch, threads=threads, processes=processes, cores=16, cached=cached
    )
    assert advice == expected
