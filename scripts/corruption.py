"""Damages files of an interrupted run and counts how the resumed run ends; used by `soak.py`.

A tiny network trains in two stages, with an anchor and averaged weights, until SIGTERM stops it
within an epoch. Each trial copies the run's folder and damages a file: one of the newest
checkpoint, in every third trial one of each checkpoint, or one outside the checkpoints. Then it
resumes the run, and once more after an error, because some errors announce that the next start
trains from scratch.
"""

import itertools
import json
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from jaxft import L2SP, Adam, JaxftError, Recipe, Stage, data, finetune, models
from jaxft.cli.program_cache import keep_programs
from jaxft.report.console import Console
from jaxft.train.metrics import MEASURED
from jaxft.train.signals import InterruptedRunError

SAME, REFUSED, WRONG, ERROR = OUTCOMES = (
    "identical end",
    "refused with the file's name",
    "wrong result",
    "other error",
)
FAILED = (WRONG, ERROR)
RECIPE = Recipe(
    model="tiny", data="noise", optimizer=Adam(), image_size=8, batch_size=8, augment="flip",
    checkpoint_steps=3,
    stages=(
        Stage("head", {"head": 1e-2}, epochs=2, anchor=L2SP()),
        Stage("all", {"*": 1e-2}, epochs=3, carry="keep", ema=0.9, anchor=L2SP()),
    ),
)  # fmt: skip
STOP_AFTER = 4  # epochs
IN_CHECKPOINT = {
    "array data": ("*/d/*", "*/ocdbt.process_0/d/*"),
    "array index": ("*/manifest.ocdbt", "*/ocdbt.process_0/manifest.ocdbt"),
    "array metadata": ("*/_*", "*/array_metadatas/*"),
    "progress (JSON)": ("header/metadata",),
    "checksums": ("checksums.json",),
    "checkpoint metadata": ("_CHECKPOINT_METADATA",),
}
OUTSIDE = {
    "anchor's weights": ("start/**/*",),
    "recipe.yaml": ("recipe.yaml",),
    "metrics.jsonl": ("metrics.jsonl",),
    "environment.json": ("environment.json",),
}
FILES = IN_CHECKPOINT | OUTSIDE
PAGE = 4096  # bytes


class Tiny(nn.Module):
    """A linear layer, a norm layer and a head."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns logits [b 3]; `images` are [b h w 3]."""
        x = nn.Dense(8, name="body")(images.mean((1, 2)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x)


class Stopping(Console):
    """Prints nothing; sends SIGTERM to this process after `epochs` epochs (0: never)."""

    def __init__(self, epochs: int = 0) -> None:
        super().__init__(quiet=True)
        self._left = epochs

    def epoch_row(self, epoch: int | str, *_: Any) -> None:
        """Counts the epoch; epoch 0 is the start of a stage."""
        self._left -= epoch != 0
        if epoch and self._left == 0:
            signal.raise_signal(signal.SIGTERM)


def train(workdir: Path, stop_after: int = 0) -> None:
    """Starts the run in a folder, or resumes it; SIGTERM stops it after `stop_after` epochs."""
    model, source, start = opened()
    console = Stopping(stop_after)
    finetune(RECIPE, workdir, model=model, data=source, start=start, console=console)


@cache
def opened() -> tuple[models.Model, data.Source, Any]:
    """Returns the network, images of noise, and the initial parameters."""
    model = models.Linen(Tiny(), shape=(8, 8, 3), head="head")
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    source = data.arrays(images, np.arange(32) % 3, classes=["a", "b", "c"])
    return model, source, model.init(jax.random.key(0))


def truncated(content: bytes, chance: random.Random) -> bytes:
    """Cuts the end off at a random place."""
    return content[: chance.randrange(len(content))]


def zeroed(content: bytes, chance: random.Random) -> bytes:
    """Replaces one page by zeros, as a power failure may leave it."""
    start = PAGE * chance.randrange(-(-len(content) // PAGE))
    page = content[start : start + PAGE]
    return content[:start] + bytes(len(page)) + content[start + PAGE :]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Inverts one bit."""
    place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes] | None] = {
    "truncated": truncated,
    "zeroed page": zeroed,
    "flipped bit": flipped,
    "missing": None,
}


def damage(run: Path, kind: str, how: str, each: bool, chance: random.Random) -> list[Path]:
    """Damages one file of a kind, with `each` one in each checkpoint; returns the damaged files."""
    folders = [run]
    if kind in IN_CHECKPOINT:
        steps = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
        folders = steps if each else steps[-1:]
    files = []
    for folder in folders:
        paths = {*itertools.chain.from_iterable(map(folder.glob, FILES[kind]))}
        file = chance.choice(sorted(path for path in paths if path.is_file()))
        change = DAMAGES[how]
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(file.read_bytes(), chance))
        files.append(file)
    return files


def outcome(run: Path, files: list[Path], whole: Path) -> tuple[str, str]:
    """Resumes a damaged run; returns its outcome, and a message about it."""
    refusals = []
    for _ in range(2):
        try:
            train(run)
        except JaxftError as error:
            refusals.append(str(error))
            if not any(file.name in str(error) for file in files):
                return ERROR, f"{type(error).__name__}: {error}"
        except Exception:
            return ERROR, traceback.format_exc()
        else:
            if different := list(differences(whole, run)):
                return WRONG, ", ".join(different)
            break
    return (REFUSED, refusals[0]) if refusals else (SAME, "")


def trials(count: int, seed: int) -> Counter[tuple[str, str]]:
    """Runs the trials; returns counts of (kind of file, outcome) and (kind of damage, outcome).

    Prints each trial that ends neither identically nor with an error that names the file.
    """
    keep_programs()
    chance, counts = random.Random(seed), Counter[tuple[str, str]]()
    kinds = list(itertools.product(FILES, DAMAGES))
    chance.shuffle(kinds)
    # In memory if possible, because checkpoints wait for the disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        whole, stopped, trial = (Path(name) / run for run in ("whole", "stopped", "trial"))
        train(whole)
        with suppress(InterruptedRunError):
            train(stopped, STOP_AFTER)
        for index, (kind, how) in zip(range(count), itertools.cycle(kinds), strict=False):
            shutil.copytree(stopped, trial)
            files = damage(trial, kind, how, index % 3 == 2, chance)
            end, message = outcome(trial, files, whole)
            counts.update([(kind, end), (how, end)])
            if end in FAILED:
                names = ", ".join(str(file.relative_to(trial)) for file in files)
                print(f"{how}: {names}\n  {end}: {message}", flush=True)
            shutil.rmtree(trial)
    return counts


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yields the differing parts of two ended runs."""
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        yield "model.safetensors"
    for ours, theirs in itertools.zip_longest(rows(one), rows(other)):
        if ours != theirs:
            yield f"metrics.jsonl, which should have {ours} and has {theirs}"
            break
    for item in ("params", "stats", "opt_state"):
        ours, theirs = arrays(one, item), arrays(other, item)
        same = jax.tree.structure(ours) == jax.tree.structure(theirs)
        if not (same and jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))):
            yield f"{item} of the last checkpoint"
    for path in (other / "checkpoints").iterdir():
        if not path.name.removeprefix("corrupt-").isdigit():
            yield str(path)


def rows(run: Path) -> list[dict[str, object]]:
    """Returns the rows of `metrics.jsonl` without timings and memory."""
    recorded = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in recorded]


def arrays(run: Path, item: str) -> object:
    """Reads one tree of arrays of the last checkpoint."""
    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(run / "checkpoints" / str(last) / item)
