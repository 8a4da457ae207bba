"""`scripts/benchmark.py` with a small network: it measures equal work and detects unequal work."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft import models, weights

sys.path[:0] = [str(Path(__file__).parents[1] / "scripts"), str(Path(__file__).parent / "models")]

import benchmark  # noqa: E402
from record_golden import import_torchvision, originals_are_here  # noqa: E402

SMALL = (
    *("--model", "resnet18", "--image-size", "64", "--batch-size", "4"),
    *("--rounds", "1", "--steps", "1"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of images, and weights."""
    folder = tmp_path_factory.mktemp("benchmark")
    rng = np.random.default_rng(0)
    for half in ("train", "val"):
        for name in "ab":
            (folder / half / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / half / name / f"{i}.png")
    model = models.create("resnet18", num_classes=1000)
    weights.save(folder / "weights.safetensors", model, *model.init(jax.random.key(0)))
    if originals_are_here():
        import_torchvision()
    return str(folder), str(folder / "weights.safetensors")


@pytest.mark.slow
def test_benchmark_compares_and_times_steps(files, tmp_path, capsys, monkeypatch):
    """Leaves out the last stage, which compiles the longest."""
    real, out = benchmark.the_recipe, tmp_path / "found.json"

    def shorter(args):
        return dataclasses.replace(real(args), stages=real(args).stages[:2])

    monkeypatch.setattr(benchmark, "the_recipe", shorter)
    benchmark.main([*files, *SMALL, "--runs", "0", "--out", str(out)])
    found = json.loads(out.read_text())["steps"]
    assert [row["stage"] for row in found] == ["head", "late"]
    sides = {"ours", "ours, 4 a call", "ours, kept"}
    sides |= {"torch", "torch, channels_last"} if originals_are_here() else set()
    assert all(row["ms"].keys() == sides for row in found)
    flops = [row["flops"] for row in found]
    assert flops[0]["ours"] < flops[1]["ours"]
    assert flops[0]["ours, kept"] < 0.01 * flops[0]["ours"]
    table = capsys.readouterr().out
    assert table.count("| late | ours") == 3


@pytest.mark.slow
def test_benchmark_refuses_unequal_work(files, monkeypatch):
    real = benchmark.our_step

    def other(trial, program):
        step, compiled = real(trial, program)
        return (lambda: [x + program.prefix.train for x in step()]), compiled

    monkeypatch.setattr(benchmark, "our_step", other)
    monkeypatch.setattr(benchmark, "have_torch", lambda: False)
    with pytest.raises(SystemExit, match="stage 'head': unequal losses, ours, kept"):
        benchmark.main([*files, *SMALL, "--runs", "0"])


@pytest.mark.slow
def test_benchmark_run_measures_each_stage(files):
    args = benchmark.plain_pytorch.parser("").parse_args([*files, *SMALL[:6], "--epochs", *"211"])
    found = benchmark.our_run(args)
    assert len(found["seconds"]) == 3
    assert all(seconds > 0 for seconds in found["seconds"])
    assert 0 <= found["accuracy"] <= 1
