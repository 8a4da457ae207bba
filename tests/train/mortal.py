"""A short run that a test may kill at any point, and comparisons of two runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import before, failing, replaced
from safetensors.numpy import load_file

from jaxft import Adam, Recipe, Stage, finetune
from jaxft.recipe_file import save
from jaxft.report.console import Console
from jaxft.train.metrics import MEASURED

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
        Stage("all", {"*": 1e-3}, epochs=2, restore="last"),
    ),
)
ONE_STAGE = dataclasses.replace(RECIPE, stages=RECIPE.stages[:1])  # 8 steps, 2 epochs
CHILD = Path(__file__).with_name("mortal_child.py")


def begin_until(point, at, workdir, recipe=RECIPE, *, signals="SIGKILL"):
    """Starts a run that gets the signals at a point of `faults.POINTS`; see `mortal_child.py`."""
    file = workdir.with_suffix(".yaml")
    save(recipe, file)
    return subprocess.Popen(
        [sys.executable, CHILD, signals, point, str(at), file, "--workdir", workdir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Reads the compilation cache, but writes no entry: a kill would leave a part of it.
        env={
            **os.environ,
            "COLUMNS": "200",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000",
        },
    )


def run_until(point, at, workdir, recipe=RECIPE, *, signals="SIGKILL"):
    """Returns exit code and stderr of a run that gets the signals at a point."""
    with begin_until(point, at, workdir, recipe, signals=signals) as process:
        _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def train(workdir, recipe=RECIPE):
    return finetune(recipe, workdir, console=QUIET)


def train_to_end(workdir, recipe=RECIPE):
    """Trains a run that is not to be resumed within a stage."""
    with saving_stage_ends_only():
        return train(workdir, recipe)


def saving_stage_ends_only():
    """Drops the checkpoints within stages, which cost more than the training of a short run."""

    def save_stage_end(save, *args, keep=False):
        if keep:
            save(*args, keep=True)

    return replaced("save", save_stage_end)


@contextmanager
def sharing_programs():
    """Compiles equal stages of several runs once: tracing takes longer than a short run's steps."""
    programs = {}

    def compiled_once(compile, *args, **options):
        key = repr((compile, args, options))
        if key not in programs:
            # The key may hold addresses of the arguments, so they stay in memory.
            programs[key] = compile(*args, **options), args, options
        return programs[key][0]

    with replaced("compile", compiled_once), replaced("evaluator", compiled_once):
        yield


class KilledError(Exception):
    """Stands for a SIGKILL, but a write that has begun is finished."""


@contextmanager
def killed(point, at=None):
    """Ends the run in the block before a call of a point; fails if the run does not reach it."""
    with failing(point, KilledError, at), pytest.raises(KilledError):
        yield


def terminated(point, at):
    """Sends this process a SIGTERM before a call of a point."""
    return before(point, lambda *_, **__: signal.raise_signal(signal.SIGTERM), at)


def steps(workdir):
    """Returns the steps of the complete checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def rows(workdir):
    """Returns the rows of `metrics.jsonl` without times and memory."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in found]


def assert_same_end(workdir, other):
    """Asserts bit-identical weights and equal rows."""
    file = "model.safetensors"
    assert (workdir / file).read_bytes() == (other / file).read_bytes()
    assert rows(workdir) == rows(other)


def odd_names(workdir):
    """Returns the names in the folder of checkpoints that are no steps."""
    return [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]


def assert_close(workdir, other):
    """Asserts equal losses and weights, to float32 rounding."""
    names = ("stage", "epoch", "step")
    for ours, theirs in zip(rows(workdir), rows(other), strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    found, expected = (load_file(at / "model.safetensors") for at in (workdir, other))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6, err_msg=name)
