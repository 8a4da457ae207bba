"""Kills a run again and again, lets it finish, and compares it with one that was left alone.

    python scripts/soak.py [--kills 40] [--seed 0] [--devices 1]

Three short stages on the digits: with dropout, a checkpoint every third step, optimizer state that
is kept, averaged weights, and an end within an epoch. SIGKILL comes at random moments, while a
checkpoint is written, as a stage ends, and in the first epoch of the next; now and then SIGTERM. A
kill counts if that start had begun a checkpoint or ended a stage. Exits with 1 if weights, records
or last arrays differ in anything but timings.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxft import Adam, Recipe, Stage
from jaxft.recipe import save

RECIPE = Recipe(
    model="cifar_resnet8", weights="asset:digits_0to4", data="digits:5-9", shots=6,
    train_split="train[:-100]", val_split="train[-100:]", augment="shift", image_size=8,
    resize_size=8, dropout=0.1, optimizer=Adam(), batch_size=8, checkpoint_steps=3,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=20),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=78, carry="keep", ema=0.9),
        Stage("all", {"*": 1e-3}, epochs=40, hand_on="last"),
    ),
)  # fmt: skip
STAGES = [stage.name for stage in RECIPE.stages]
WITHIN, SAVE, END, FIRST = COUNT = ("within", "in a save", "at the end", "in the first epoch")
MEASURED = ("seconds", "images_per_second", "input_wait_seconds", "peak_memory_mib")


class Start:
    """One start of the run: what it says and writes, and how it ends."""

    def __init__(self, folder: Path, name: str, devices: int) -> None:
        self.checkpoints, self.began, self.lines = folder / name / "checkpoints", time.time(), [""]
        script, recipe = Path(__file__).with_name("finetune.py"), folder / "recipe.yaml"
        flags = f"--xla_force_host_platform_device_count={devices}"
        self.process = subprocess.Popen(
            [sys.executable, "-u", script, recipe, "--workdir", folder / name],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "COLUMNS": "200", "XLA_FLAGS": flags},
        )  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()))
        self.reader.start()

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Waits for a moment, or until it ends by itself."""
        while self.process.poll() is None and not until():
            time.sleep(0.001)

    def end(self, expected: int, send: signal.Signals | None = None) -> None:
        """Ends it by a signal, or waits; the exit code must be the expected one."""
        if send:
            self.process.send_signal(send)
        code = self.process.wait()
        self.reader.join()
        if code != expected:
            sys.exit(f"{''.join(self.lines)}\nIt ended with {code}, not with {expected}.")

    def last(self, words: str) -> int:
        """The number of the last line that has these words; 0: there is none."""
        return max(i for i, line in enumerate([*self.lines]) if words in line or not i)

    def trains(self) -> bool:
        """Whether it has come to its first step in this start."""
        return self.last("train loss") > 0

    def saving(self) -> bool:
        """Whether a checkpoint is half written, or half replaced."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return any(name.endswith("-tmp") or name.startswith("replaced-") for name in names)

    def moment(self) -> str:
        """Where it was killed."""
        written = any(path.stat().st_ctime > self.began for path in self.checkpoints.glob("*"))
        if not self.trains():
            return "in start-up"
        if not (written or self.last(" ended: ")):
            return "before a save"
        if self.last(" ended: ") > self.last("train loss"):
            return END
        if self.lines[-1].strip().startswith("start "):
            return FIRST
        return SAVE if self.saving() else WITHIN


def aims(chance: random.Random, kills: int) -> Iterator[tuple[int, str]]:
    """A stage's index and what to aim at in it, from the first stage to the last; endless."""
    for index in range(len(STAGES) - 1):
        inner = [*(WITHIN, SAVE) * max(1, kills // 6 - 2), "in start-up", "SIGTERM"]
        yield from ((index, aim) for aim in chance.sample(inner, len(inner)))
        yield from ((index, aim) for aim in (END, FIRST) * 2)
    while True:
        yield index + 1, chance.choice([*(WITHIN, SAVE) * 4, "in start-up", "SIGTERM"])


def strike(start: Start, aim: str, chance: random.Random) -> None:
    """Waits for the moment to aim at, and a random time after it, and ends the run there."""
    moments = {
        "in start-up": (lambda: True, 4.0),
        "SIGTERM": (start.trains, 0.6),
        WITHIN: (start.trains, 0.6),
        SAVE: (lambda: start.trains() and start.saving(), 0.02),
        # The run says of a stage that it "ended" also where it goes on from there.
        END: (lambda: start.last(" ended") > 0, 0.005),
        FIRST: (lambda: start.last("train loss") > start.last(" ended") > 0, 0.6),
    }
    moment, seconds = moments[aim]
    start.wait(moment)
    late = time.monotonic() + chance.uniform(0, seconds)
    start.wait(lambda: time.monotonic() > late)
    if aim == "SIGTERM":
        start.end(75, signal.SIGTERM)
    else:
        start.end(-signal.SIGKILL, signal.SIGKILL)


def strike_often(folder: Path, known: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Starts the run until enough kills count; returns how often what was met in which stage."""
    chance, met, at = random.Random(known.seed), Counter[tuple[str, str]](), 0
    for index, aim in aims(chance, known.kills):
        if index < at:
            continue  # that stage is over
        start = Start(folder, "killed", known.devices)
        strike(start, aim, chance)
        title = start.lines[start.last(f" of {len(STAGES)}: ")]
        stage = title.partition(": ")[2].partition(",")[0] or "-"
        at = max(at, STAGES.index(stage)) if stage in STAGES else at
        moment = aim if aim == "SIGTERM" else start.moment()
        met[moment, stage] += 1
        print(f"  aimed {aim:18}  met {moment:18}  {stage}", flush=True)
        if sum(n for (moment, _), n in met.items() if moment in COUNT) >= known.kills:
            break
    return met


def differences(one: Path, other: Path) -> Iterator[str]:
    """What the ends of two runs do not share."""
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
    yield from (str(path) for path in (other / "checkpoints").iterdir() if not path.name.isdigit())


def rows(run: Path) -> list[dict[str, object]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in found]


def arrays(run: Path, item: str) -> object:
    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(run / "checkpoints" / str(last) / item)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="that count")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--devices", type=int, default=1, help="virtual ones")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(RECIPE, folder / "recipe.yaml")
        Start(folder, "alone", known.devices).end(0)
        met = strike_often(folder, known)
        Start(folder, "killed", known.devices).end(0)
        wrong = list(differences(folder / "alone", folder / "killed"))
    print(f"\n{'':20}" + "".join(f"{stage:>8}" for stage in (*STAGES, "-")))
    for moment in (*COUNT, "before a save", "in start-up", "SIGTERM"):
        print(f"{moment:20}" + "".join(f"{met[moment, stage]:8}" for stage in (*STAGES, "-")))
    print(f"{sum(met.values())} starts, of which {known.kills} kills count.")
    print(f"Different: {', '.join(wrong)}" if wrong else "The same to the last bit.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
