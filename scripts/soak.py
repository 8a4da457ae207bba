"""Kills runs at random moments and corrupts their files; compares them with undisturbed runs.

    python scripts/soak.py [--kills 40] [--corruptions 160] [--seed 0] [--devices 1]

The protocol follows crash-consistency tests of training checkpoints (arXiv:2511.18323). Prints a
Markdown table of outcomes; exits with 1 after a wrong result or an error that names no file. Kills
and corruptions run at the same time, in two processes; `corruption.py` describes the latter.

The killed run has three short stages on the digits, with dropout, a checkpoint at every third step,
optimizer state carried between stages, averaged weights, and a stage that ends within an epoch.
SIGKILL, or sometimes SIGTERM, arrives at random moments: while a checkpoint is written, at the end
of a stage, in the first epoch of the next. A kill counts if this start of the run had begun a
checkpoint or ended a stage. At the end, weights, records (except timings) and last arrays must
be identical to an undisturbed run.
"""

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import corruption

from jaxft import Adam, Recipe, Stage
from jaxft.recipe_file import save

RECIPE = Recipe(
    model="cifar_resnet8", weights="asset:digits_0to4", data="digits:5-9", shots=6,
    train_split="train[:-100]", val_split="train[-100:]", augment="shift", image_size=8,
    resize_size=8, dropout=0.1, optimizer=Adam(), batch_size=8, checkpoint_steps=3,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=20),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=78, carry="keep", ema=0.9),
        Stage("all", {"*": 1e-3}, epochs=40, restore="last"),
    ),
)  # fmt: skip
STAGES = [stage.name for stage in RECIPE.stages]
WITHIN, SAVE, END, FIRST = COUNT = ("within", "in a save", "at the end", "in the first epoch")
MOMENTS = (*COUNT, "before a save", "in start-up", "SIGTERM")


class Start:
    """One start of the run as a child process, with its output and its checkpoints.

    Attributes:
      lines: the output so far, after an empty line.
      checkpoints: the folder of the run's checkpoints.
    """

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
        """Waits until `until()` is true or the process has ended."""
        while self.process.poll() is None and not until():
            time.sleep(0.001)

    def end(self, expected: int, send: signal.Signals | None = None) -> None:
        """Sends a signal, if given, and waits for the end; exits if the exit code is unexpected."""
        if send:
            self.process.send_signal(send)
        code = self.process.wait()
        self.reader.join()
        if code != expected:
            sys.exit(f"{''.join(self.lines)}\nThe run exited with {code} instead of {expected}.")

    def last(self, words: str) -> int:
        """Returns the index of the last line that contains these words, or 0."""
        return max(i for i, line in enumerate([*self.lines]) if words in line or not i)

    def trains(self) -> bool:
        """Returns whether this start has trained a step."""
        return self.last("train loss") > 0

    def saving(self) -> bool:
        """Returns whether a checkpoint is partly written or replaced."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return any(name.endswith("-tmp") or name.startswith("replaced-") for name in names)

    def moment(self) -> str:
        """Returns the moment of the kill, one of `MOMENTS`."""
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


def targets(chance: random.Random, kills: int) -> Iterator[tuple[int, str]]:
    """Yields a stage's index and a moment for each kill, from the first stage on, without end."""
    for index in range(len(STAGES) - 1):
        inner = [*(WITHIN, SAVE) * max(1, kills // 6 - 2), "in start-up", "SIGTERM"]
        yield from ((index, aim) for aim in chance.sample(inner, len(inner)))
        yield from ((index, aim) for aim in (END, FIRST) * 2)
    while True:
        yield index + 1, chance.choice([*(WITHIN, SAVE) * 4, "in start-up", "SIGTERM"])


def strike(start: Start, aim: str, chance: random.Random) -> None:
    """Ends the run a random time after the moment `aim`."""
    moments = {
        "in start-up": (lambda: True, 4.0),
        "SIGTERM": (start.trains, 0.6),
        WITHIN: (start.trains, 0.6),
        SAVE: (lambda: start.trains() and start.saving(), 0.02),
        # A resumed run also prints " ended" for the stages before it.
        END: (lambda: start.last(" ended") > 0, 0.005),
        FIRST: (lambda: start.last("train loss") > start.last(" ended") > 0, 0.6),
    }
    moment, seconds = moments[aim]
    start.wait(moment)
    deadline = time.monotonic() + chance.uniform(0, seconds)
    start.wait(lambda: time.monotonic() > deadline)
    if aim == "SIGTERM":
        start.end(75, signal.SIGTERM)
    else:
        start.end(-signal.SIGKILL, signal.SIGKILL)


def kill(folder: Path, known: argparse.Namespace) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs the recipe once undisturbed, once with kills; returns the kills and the differences."""
    if not known.kills:
        return Counter(), []
    save(RECIPE, folder / "recipe.yaml")
    Start(folder, "alone", known.devices).end(0)
    met = strike_often(folder, known)
    Start(folder, "killed", known.devices).end(0)
    return met, list(corruption.differences(folder / "alone", folder / "killed"))


def strike_often(folder: Path, known: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Starts the run until enough kills count; returns the counts of (moment, stage)."""
    chance, met, current = random.Random(known.seed), Counter[tuple[str, str]](), 0
    for index, aim in targets(chance, known.kills):
        if index < current:
            continue  # this stage has ended
        start = Start(folder, "killed", known.devices)
        strike(start, aim, chance)
        title = start.lines[start.last(f" of {len(STAGES)}: ")]
        stage = title.partition(": ")[2].partition(",")[0] or "-"
        current = max(current, STAGES.index(stage)) if stage in STAGES else current
        moment = aim if aim == "SIGTERM" else start.moment()
        met[moment, stage] += 1
        print(f"  aimed {aim:18}  met {moment:18}  {stage}", flush=True)
        if sum(n for (moment, _), n in met.items() if moment in COUNT) >= known.kills:
            break
    return met


def outcome_table(
    kills: Counter[tuple[str, str]], same: bool, corruptions: Counter[tuple[str, str]]
) -> Iterator[str]:
    """Yields the lines of a Markdown table with the number of trials per kind and outcome."""
    kinds = {"killed": MOMENTS, "damaged": corruption.FILES, "damage": corruption.DAMAGES}
    ends = Counter(corruptions)
    for (moment, _), n in kills.items():
        ends[moment, corruption.SAME if same else corruption.WRONG] += n
    yield f"| | trials | {' | '.join(corruption.OUTCOMES)} |"
    yield "|---|" + "---:|" * (1 + len(corruption.OUTCOMES))
    for title, names in kinds.items():
        for name in names:
            counts = [ends[name, outcome] for outcome in corruption.OUTCOMES]
            cells = " | ".join(map(str, (sum(counts), *counts)))
            yield f"| {title}: {name} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="number of counted kills")
    parser.add_argument("--corruptions", type=int, default=160, help="number of corrupted runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, files and damages")
    parser.add_argument("--devices", type=int, default=1, help="number of virtual devices")
    known = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")  # jax does not survive a fork
    with TemporaryDirectory() as name, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        trials = pool.submit(corruption.trials, known.corruptions, known.seed)
        met, differences = kill(Path(name), known)
        corruptions = trials.result()
    print(f"\n{'':20}" + "".join(f"{stage:>8}" for stage in (*STAGES, "-")))
    for moment in MOMENTS:
        print(f"{moment:20}" + "".join(f"{met[moment, stage]:8}" for stage in (*STAGES, "-")))
    print(f"{sum(met.values())} starts; {known.kills} kills count.")
    print(f"Different: {', '.join(differences)}" if differences else "Identical to the last bit.")
    print("", *outcome_table(met, not differences, corruptions), sep="\n")
    failed = any(n for (_, end), n in corruptions.items() if end in corruption.FAILED)
    sys.exit(bool(differences) or failed)


if __name__ == "__main__":
    main()
