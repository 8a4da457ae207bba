"""Runs on one device, on eight, and in two processes of four are equal and resume each other."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen
from safetensors.numpy import load_file

from jaxft import EMA, LinearProbe, Recipe, RecipeError, Stage, WiSE, finetune, models
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.labels import paths
from jaxft.recipe_file import save
from jaxft.report.console import Console

pytestmark = pytest.mark.slow

CHILD = Path(__file__).with_name("devices_child.py")
QUIET = Console(quiet=True)
# 14 steps, in stages that end at 4, 13 and 14. Neither batches nor the images to validate divide by
# 8, and each stage has what draws random numbers by row, sees a batch's statistics, or adds up over
# all parameters.
RECIPE = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    train_split="train[:30]",
    val_split="train[30:50]",
    batch_size=12,
    augment="shift",
    image_size=8,
    resize_size=8,
    dropout=0.1,
    sync_steps=1,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=2, batch_size=20, auto_rgn=True),
        Stage(
            "late",
            {"fc": 1e-3, "layer3": 1e-3},
            epochs=3,
            norms="batch",
            carry="keep",
            mixup=0.2,
            random_erasing=0.5,
            clip_norm=1.0,
            accumulate=2,
            ema=EMA(0.5, every=2),
            finish=WiSE((0.5,)),
        ),
        Stage("probe", {"fc": LinearProbe((0.1,))}, restore="last"),
    ),
)
# Its norm layers see the batch, and its one step is soon compiled.
BRIEF = dataclasses.replace(RECIPE, stages=(Stage("brief", {"fc": 1e-2}, epochs=1, norms="batch"),))
# Its features can be cached, those of two views of each image and of the images to validate.
CACHED = dataclasses.replace(
    RECIPE,
    num_views=2,
    tta="flip",
    stages=(Stage("late", {"fc": 1e-2, "layer3": 1e-2}, epochs=3, finish=WiSE((0.5,))),),
)
FSDP = ("--sharding", "fsdp")
ON_DEVICES = ("--device-cache-mib", "1", "--cache-mib", "0")
IN_THREES = ("--steps-per-execution", "3")


def rows(workdir):
    return [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
    """Maps names to all losses, norms, accuracies and weights of a run."""
    found = load_file(workdir / "model.safetensors")
    for row in rows(workdir):
        at = f"{row['stage']} {row['epoch']}"
        for name in ("loss", "accuracy", "top5"):
            found |= {f"{at} {half} {name}": row[f"{half}_{name}"] for half in ("train", "val")}
        for kind in ("gradient_norms", "update_norms"):
            found |= {f"{at} {kind} {group}": norm for group, norm in row[kind].items()}
    return found


def assert_same(workdir, one):
    found, expected = numbers(workdir), numbers(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


class KilledError(Exception):
    """Stands for a SIGKILL."""


def start(lines, devices, *joining):
    """Starts `devices_child.py` with this number of virtual devices."""
    known = os.environ.get("XLA_FLAGS", "")
    flags = f"{known} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", CHILD, json.dumps(lines), *map(str, joining)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )


def start_pair(lines):
    """Starts two processes of four devices, each with its command lines."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return [start(own, 4, address, 2, process) for process, own in enumerate(lines)]


def end(process):
    """Returns exit code, stdout without lines of gloo, and stderr."""
    try:
        out, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    # Its parts may be on several lines: C++ does not write them at once.
    gloo = r"\[Gloo\] Rank[^:]*: \d+\n"
    return process.returncode, re.sub(gloo, "", out), errors


def line(workdir, *options, recipe="recipe"):
    """Returns the command line of a run in a folder beside its recipe."""
    return [str(workdir.with_name(f"{recipe}.yaml")), "--workdir", str(workdir), *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of all runs and their recipes."""
    folder = tmp_path_factory.mktemp("runs")
    save(RECIPE, folder / "recipe.yaml")
    save(BRIEF, folder / "brief.yaml")
    save(CACHED, folder / "cached.yaml")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """Folder of the run on one device; another run, `moved`, dies at the end of its first stage."""
    finetune(RECIPE, folder / "one", console=QUIET)
    finetune(BRIEF, folder / "brief", console=QUIET)
    finetune(CACHED, folder / "cached", console=QUIET)
    real = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        real(self, step, *args, **kwargs)
        if step == 4:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(KilledError):
            finetune(RECIPE, folder / "moved", console=QUIET)
    return folder / "one"


@pytest.fixture(scope="module")
def eight(folder, one):
    """The end of a process of eight devices; `moved` stopped at step 8, within an epoch."""
    lines = [
        (line(folder / "eight", *IN_THREES), 0),
        (line(folder / "eight-cached", *ON_DEVICES, *IN_THREES, recipe="cached"), 0),
        (line(folder / "eight-replica", "--statistics", "replica", recipe="brief"), 0),
        (line(folder / "moved"), 4),
    ]
    return end(start(lines, 8))


@pytest.fixture(scope="module")
def two(folder, eight):
    """The ends of two processes of four; `moved` stopped at step 11 by a signal to the second."""
    lines = [
        line(folder / "two-brief", recipe="brief"),
        line(folder / "two-cached", *ON_DEVICES, recipe="cached"),
        line(folder / "two", *FSDP, *IN_THREES),
        line(folder / "two", "--seed", "1"),
        line(folder / "two-nan", "--stages.0.train.fc", "1e38", recipe="brief"),
    ]
    moved = line(folder / "moved", *FSDP)
    own = [[*((line, 0) for line in lines), (moved, steps)] for steps in (0, 3)]
    return [end(process) for process in start_pair(own)]


def test_signal_to_one_process_stops_all(eight, two):
    assert eight[0] == 75, eight[2]
    # On a busy machine Orbax has something to say before it.
    assert eight[2].splitlines()[-1] == (
        "SIGTERM came in stage 'late', and step 8 is saved. The same command resumes from there."
    )
    stopped = "SIGTERM came in stage 'late', and step 11 is saved."
    for code, _, errors in two:
        assert code == 75, errors
        assert errors.count(stopped) == 1, errors
        assert errors.count("holds a run of another recipe:\n  seed: 0 -> 1\n") == 1
        assert errors.count("NonFiniteError: stage 'brief', epoch") == 1
        assert "Traceback" not in errors


def test_only_first_process_prints_and_logs(folder, two):
    (_, first, _), (_, second, _) = two
    assert first.count("Validation accuracy") == 3  # of the three that came to their ends
    assert first.count("on 8 cpu devices, 2 processes") == 5  # the refused one has no prologue
    assert second == ""
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        ("eight", "one"),
        ("two", "one"),
        ("two-brief", "brief"),
        ("eight-cached", "cached"),
        ("two-cached", "cached"),
    ],
    ids=["eight-replicated", "two-fsdp", "two-replicated", "eight-cached", "two-cached"],
)
def test_devices_train_as_one(workdir, expected, folder, two):
    assert_same(folder / workdir, folder / expected)


def test_features_are_divided_among_devices(eight, two):
    """Two views of 30 images, two flips of 20: 160 rows of 2 KiB, in batches of 16 rows."""
    for out in (eight[1], two[0][1]):
        assert "cached in device memory, 0.312 MiB, 0.0391 MiB a\ndevice." in out


def test_run_resumes_on_other_devices(one, two):
    moved = one.with_name("moved")
    with closing(Checkpoints(moved / "checkpoints")) as checkpoints:
        assert checkpoints.latest_step() == 11
    finetune(RECIPE, moved, console=QUIET)
    assert_same(moved, one)
    where = [(row["stage"], row["epoch"], row["step"]) for row in rows(moved)]
    assert where == [(row["stage"], row["epoch"], row["step"]) for row in rows(one)]


def test_replica_statistics_differ_from_global(folder, one, eight):
    """By more than rounding, and less than another training."""
    expected, found = (rows(folder / run)[0]["train_loss"] for run in ("brief", "eight-replica"))
    assert 1e-3 < abs(found - expected) < 0.5


def test_fsdp_divides_state_among_devices(eight, two):
    """Compares the bytes of a step's arguments on each of the eight devices."""
    found = re.findall(
        r"^arguments of (\w+), (\w+): (\d+) bytes$", eight[1] + two[0][1], re.MULTILINE
    )
    # The first of each: `moved`, the last run, takes single steps, whose batches are fewer.
    held = {(stage, sharding): int(count) for stage, sharding, count in reversed(found)}
    params, _ = jax.eval_shape(RECIPE.network(5).init, jax.random.key(0))
    sizes = {
        path: 4 * x.size for path, x in zip(paths(params), jax.tree.leaves(params), strict=True)
    }
    large = {path: size for path, size in sizes.items() if size >= 4 * 2**12}
    assert sum(large.values()) > 0.9 * sum(sizes.values())
    # Each once; where it trains also with its momentum and its average.
    divided = sum((1 + 2 * path.startswith("layer3")) * size for path, size in large.items())
    assert held["late", "replicated"] - held["late", "fsdp"] == divided * 7 // 8


def test_error_in_one_process_ends_both(tmp_path):
    (tmp_path / "file").touch()
    save(BRIEF, tmp_path / "brief.yaml")
    lines = [
        [([str(tmp_path / "brief.yaml"), "--workdir", str(tmp_path / workdir)], 0)]
        for workdir in ("run", "file")
    ]
    (first, *_), (second, _, errors) = map(end, start_pair(lines))
    assert first != 0
    assert second != 0
    assert errors.startswith(f"RecipeError: {tmp_path / 'file'} is a file; --workdir must name")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Own(linen.Module):
    @linen.compact
    def __call__(self, images, train):
        images = linen.BatchNorm(use_running_average=not train)(images)
        return linen.Dense(5, name="head")(images.mean((1, 2)))


@pytest.mark.parametrize("statistics", ["replica", "slice"])
def test_separate_statistics_need_jaxft_norm_layers(statistics, tmp_path):
    model = models.Linen(Own(), shape=(8, 8, 3), head="head")
    recipe = dataclasses.replace(
        BRIEF,
        weights=None,
        dropout=0.0,
        statistics=statistics,
        stages=(Stage("brief", {"head": 1e-2}, epochs=1),),
    )
    with pytest.raises(RecipeError, match=f"statistics='{statistics}' needs norm layers"):
        finetune(recipe, tmp_path / "run", model=model, console=QUIET)
    assert not (tmp_path / "run").exists()
