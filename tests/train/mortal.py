"""A short run that a test may end at any point, and what its end is compared by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import Adam, Recipe, Stage, finetune
from jaxft.recipe_file import save
from jaxft.report.console import Console

QUIET = Console(quiet=True)
# Stages end at steps 8, 18 (within an epoch) and 26; checkpoints also at each third step.
RECIPE = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    train_split="train[:-100]",
    val_split="train[-100:]",
    shots=6,
    optimizer=Adam(),
    batch_size=8,
    augment="shift",
    image_size=8,
    resize_size=8,
    dropout=0.1,
    checkpoint_steps=3,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=2),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=10, carry="keep", ema=0.9),
        Stage("all", {"*": 1e-3}, epochs=2, hand_on="last"),
    ),
)
CHILD = Path(__file__).with_name("mortal_child.py")
MEASURED = ("seconds", "images_per_second", "input_wait_seconds", "peak_memory_mib")


def begin_until(point, workdir, *, signals="SIGKILL"):
    """The process of a run that the signals meet at a point; see `mortal_child.py`."""
    file = workdir.with_suffix(".yaml")
    save(RECIPE, file)
    return subprocess.Popen(
        [sys.executable, CHILD, signals, point, file, "--workdir", workdir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def run_until(point, workdir, *, signals="SIGKILL"):
    """Its exit code and what it said on stderr."""
    with begin_until(point, workdir, signals=signals) as process:
        _, said = process.communicate(timeout=300)
    return process.returncode, said


def go_on(workdir, recipe=RECIPE):
    return finetune(recipe, workdir, console=QUIET)


class KilledError(Exception):
    """Stands for a SIGKILL, but that a write under way is finished."""


def die(monkeypatch, owner, name, at):
    """Has a call of `owner.name` fail, if `at` is true of its arguments."""
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        if at(*args):
            raise KilledError
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def steps(workdir):
    """Those of the whole checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def rows(workdir):
    """Those of `metrics.jsonl`, without what the machine decides."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in found]


def assert_same_end(workdir, other):
    """Bit-identical weights and equal records."""
    file = "model.safetensors"
    assert (workdir / file).read_bytes() == (other / file).read_bytes()
    assert rows(workdir) == rows(other)


def odd_names(workdir):
    """What lies among the checkpoints and is none."""
    return [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]


def assert_close(workdir, other):
    """The same losses and weights, to float32 rounding."""
    names = ("stage", "epoch", "step")
    for ours, theirs in zip(rows(workdir), rows(other), strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    found, expected = (load_file(at / "model.safetensors") for at in (workdir, other))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6, err_msg=name)
