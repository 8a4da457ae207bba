"""Storage of features: rows come back to the bit, and devices exchange little more than a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("feature_storage_child.py")


@pytest.fixture(scope="module")
def lines():
    """Returns the lines that the child prints: three cases each on 1, 2, 4 and 8 devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, "-W", "error", CHILD],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert [line["devices"] for line in lines] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    return lines


@pytest.mark.slow
@pytest.mark.smoke
def test_device_storage_returns_rows_to_the_bit(lines):
    """In any order, also if all are on one device; rows outside the mask are zeros."""
    for line in lines:
        assert all(line["equal"]), line
        assert not any(line["padding"]), line
        assert line["back"]
        assert line["divided"]


@pytest.mark.slow
def test_device_storage_exchanges_little_more_than_a_batch(lines):
    """Messages have the mean of the rows that a device needs from another one, and a margin."""
    shares = {}
    for line in lines:
        # The indices, their mask and the rows. A loop repeats the exchange where it must.
        expected = {"all-gather": 2, "all-to-all": 1} if line["devices"] > 1 else {}
        assert line["collectives"] == expected
        shares[line["devices"]] = line["bytes"].get("all-to-all", 0) / line["batch"]
    # Of 512 rows, at least 512 / 2, 512 / 4 and 512 / 8 must reach a device.
    assert shares == {1: 0, 2: 348 / 512, 4: 220 / 512, 8: 160 / 512}
