"""`scripts/benchmark_data.py` on a few small images."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_data.py"


@pytest.mark.slow
def test_benchmark_data_measures_all_loaders(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(7):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{k}.jpg")
    stages = [
        {"stage": name, "images_per_second": rates, "frozen_prefix": {"cached_for_training": kept}}
        for name, rates, kept in (("head", [7e6, 8e6], True), ("late", [5e4, 7e4], False))
    ]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"topology": "v5e-8", "stages": stages}))
    options = ["--batch-size", "3", "--epochs", "3", "--rounds", "1", "--plan", plan]
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, *options],
        capture_output=True, text=True, timeout=300, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([a-z][^|]*) \| [\d,]+ \| [\d,]+ \|", done.stdout, re.MULTILINE)
    expected = ["threads", "processes", "threads, decoded", "processes, decoded"]
    for name in ("processes, jitter", "processes, decoded, jitter"):
        expected += [name, f"{name} on device"]
    expected += ["features of head", "features of late"]
    expected += ["torch, float32", "torch, uint8"] if find_spec("torchvision") else []
    expected += ["grain, threads", "grain, processes"] if find_spec("grain") else []
    expected += ["tf.data"] if find_spec("tensorflow") else []
    assert rows == expected
    for library, name in (("grain", "Grain"), ("tensorflow", "TensorFlow")):
        assert (f"{name} is not installed" in done.stdout) == (find_spec(library) is None)
    assert "| v5e-8 | head | 7,000,000-8,000,000 | features are cached |" in done.stdout
    assert re.search(r"^\| v5e-8 \| late \| 50,000-70,000 \| [\d,]+-[\d,]+ \|", done.stdout, re.M)
